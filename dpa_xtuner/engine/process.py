"""The process of a stage: it locks the stage's folder, and becomes the next stage's process."""

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.logging import print_log

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import acquire_lock
from dpa_xtuner.layout import STAGE_NAMES, shipped
from dpa_xtuner.stages.pipeline import DATA_CHECKED, samples_of


def lock_stage_folder(config: Config) -> FileLock:
    """Lock a stage's folder for this run.

    The lock ends with the process, however that ends. A stage that replaces its process locks the
    next stage's folder.

    Raises:
        DPAError: another run trains in the folder, such as one whose parent alone was killed.
    """
    folder = Path(config.work_dir)
    return acquire_lock(
        folder / ".lock",
        f"Another run is training in {folder}. Wait for it, stop it, or use another --work-dir.",
    )


def check_ranks_agree(config: Config) -> None:
    """Check that all ranks are about to train the same.

    Raises:
        DPAError: the ranks' devices differ, or the nodes don't share the work dir or the images.
    """
    same = (
        (
            config.model.precision,
            "The processes' devices differ: precision='auto' means {} on them. Set precision to "
            "one that all of them support.",
        ),
        (
            (config.work_dir, config.load_from),
            "The processes don't see the same work dir: they would start {}. It must be on storage "
            "that all nodes share.",
        ),
        (
            samples_of(config),
            "The processes don't see the same samples: some image can be read on one node but not "
            "on another. Images must be the same on all nodes.",
        ),
    )
    for ours, message in same:
        if len(found := set(all_gather_object(ours))) > 1:
            raise DPAError(message.format(sorted(found, key=str)))


def remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(".*.partial"):
        print_log(f"Removing {path}, which was not written completely", "current")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_next(config: Config) -> None:
    """Continue with the next stage, if there is one, in a fresh process image.

    The process replaces itself, so that nothing of the finished stage stays in memory.
    Under a launcher, all ranks do so together and meet again on another port.
    """
    name = Path(config.work_dir).name
    if "DPA_STAGE" in os.environ or name == STAGE_NAMES[-1]:
        return
    for child in multiprocessing.active_children():  # dataloader workers
        child.terminate()
        child.join()
    if dist.is_available() and dist.is_initialized():
        port = [_free_port()]
        dist.broadcast_object_list(port)
        dist.barrier()
        dist.destroy_process_group()
        # The launcher's own store still listens on the old port.
        os.environ.update(MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE="False")
    os.environ[DATA_CHECKED] = str(Path(config.work_dir).parent)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *_arguments(sys.orig_argv[1:])], os.environ)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _arguments(given: list[str]) -> list[str]:
    """Return those of the next stage, without ``--resume``.

    Our script stands in the place of XTuner's, which imports packages before the plugin.
    """
    kept = []
    it = iter(given)
    for argument in it:
        if argument == "--resume":
            next(it)
        elif argument.endswith("xtuner/tools/train.py"):
            kept.append(str(shipped("tools") / "_xtuner_train.py"))
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return kept
