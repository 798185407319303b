"""The process of a stage: it owns the stage's folder, and becomes the process of the next stage."""

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
from dpa_xtuner.layout import STAGE_NAMES
from dpa_xtuner.stages.pipeline import DATA_CHECKED, samples_of


def lock_stage_folder(config: Config) -> FileLock:
    """Take a stage's folder for this run.

    The lock goes with the process, however that ends, and a stage that replaces its
    process takes the next one's.

    Raises:
        DPAError: another run trains in it, such as one whose parent alone was killed.
    """
    folder = Path(config.work_dir)
    return acquire_lock(
        folder / ".lock",
        f"Another run is training in {folder}. Wait for it, stop it, or use another --work-dir.",
    )


def check_ranks_agree(config: Config) -> None:
    """See that all ranks are about to do the same.

    Raises:
        DPAError: they read other files, since the work dir or the images are not shared by all
            nodes.
    """
    same = (
        (
            config.model.precision,
            "The processes' devices differ: precision='auto' means {} on them. Set precision to "
            "one that all of them compute.",
        ),
        (
            (config.work_dir, config.load_from),
            "The processes don't see the same work dir: they would start {}. It must be on storage "
            "that all nodes share.",
        ),
        (
            samples_of(config),
            "The processes don't see the same samples: an image can be read on one node and not on "
            "another. Images must be the same on all nodes.",
        ),
    )
    for own, told in same:
        if len(found := set(all_gather_object(own))) > 1:
            raise DPAError(told.format(sorted(found, key=str)))


def remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(".*.partial"):
        print_log(f"Removing {path}, which was not written to its end", "current")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_next(config: Config) -> None:
    """After a stage: go on with the next in a fresh process image, if there is one.

    The process replaces itself, so that nothing of the finished stage stays in memory.
    Under a launcher all ranks do so together and meet again on another port.
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
    os.execve(sys.executable, [sys.executable, *_without_resume(sys.orig_argv[1:])], os.environ)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _without_resume(arguments: list[str]) -> list[str]:
    kept = []
    it = iter(arguments)
    for argument in it:
        if argument == "--resume":
            next(it)
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return kept
