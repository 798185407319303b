"""Runs of `xtuner train` in forked processes.

Importing XTuner takes seconds, so the tests' process imports it once and forks. What a child
does is what `python -m xtuner.tools.train` does with the same arguments and environment.
"""

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import deepspeed as _deepspeed  # noqa: F401, takes seconds as well
import numpy as np
import torch
from mmengine.config import config as mmengine_config
from mmengine.logging import MMLogger
from safetensors.torch import load_file, save_file
from torch import nn
from xtuner.tools import train

from dpa_xtuner.engine.hooks import HandOverHook
from dpa_xtuner.engine.hooks.unwrap import unwrap

# A third of a tiny run goes into laying out the dumped config, and into collecting garbage
# among the parent's objects.
mmengine_config.FormatCode = lambda code, **style: (code, True)
gc.freeze()

SUPPORT = Path(__file__).parent
TINY_CONFIG = SUPPORT / "tiny_config.py"
STAGES = ("proxy", "align", "tune")


@dataclass(frozen=True)
class Layout:
    """How a pipeline is run."""

    ranks: int = 1
    deepspeed: bool = False
    dropout: float = 0.0
    train_llm: str = "full"

    def how(self) -> dict:
        return {"ranks": self.ranks, "deepspeed": self.deepspeed}

    def options(self) -> list[str]:
        return [
            f"proxy.lora.lora_dropout={self.dropout}",
            f"tune.lora.lora_dropout={self.dropout}",
            f"tune.train_llm={self.train_llm}",
        ]

    def __str__(self) -> str:
        zero = "zero2" if self.deepspeed else "plain"
        return f"{self.ranks}-{zero}-{self.train_llm}-{self.dropout}"


@dataclass
class Reference:
    """A pipeline that ran to its end without a stop: where, and the seconds a stage took."""

    work_dir: Path
    seconds: dict[str, float]

    def watched(self, stage: str) -> dict:
        """What :func:`watch` saw."""
        return torch.load(self.work_dir / f"watched-{stage}.pt")


class Processes:
    """Forked children, one per rank, that share a log."""

    def __init__(self, bodies: list[Callable[[], None]], log: Path):
        self.log = log
        self.codes: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()  # finalizers of this process's objects are not for its children to run
        self.pids = [_fork(body, log) for body in bodies]

    def alive(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def wait(self, seconds: float = 240) -> int:
        """The exit code: 0, or that of the first rank to fail, which takes the others along."""
        end = time.time() + seconds
        while self.alive():
            failed = [code for code in self.codes.values() if code]
            if failed:  # as under torchrun, the others may still say and write why
                end = min(end, time.time() + 3)
            if time.time() > end:
                self.kill()
                assert failed, f"no end within {seconds} s:\n{self.log.read_text()[-3000:]}"
                return failed[0]
            time.sleep(0.01)
        return next((code for code in self.codes.values() if code), 0)

    def kill(self) -> None:
        """SIGKILL all ranks and whatever they have started."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
                with suppress(ProcessLookupError):  # it has not made its group yet, or is gone
                    os.killpg(pid, signal.SIGKILL)
        while self.alive():
            time.sleep(0.005)


def _fork(body: Callable[[], None], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # After a fork the first call makes torch's pool of threads anew. Two threads that call at
        # once, as when weights are loaded, find none: "Invalid thread pool".
        torch.set_num_threads(1)
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        MMLogger._instance_dict.clear()  # they write to the parent's output
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter would
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    stage: str | None,
    work_dir: Path,
    *options: str,
    ranks: int = 1,
    deepspeed: bool = False,
    config: Path = TINY_CONFIG,
    arguments: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    log_folder: Path | None = None,
) -> Processes:
    """Start one stage (all of them where it is None).

    Args:
        stage: goes into DPA_STAGE.
        work_dir: of the run.
        options: for --cfg-options.
        ranks: processes, with gloo between them.
        deepspeed: train with ZeRO-2.
        config: the config file.
        arguments: other arguments of `xtuner train`.
        env: other environment variables.
        prepare: called in each child before it begins.
        log_folder: where to log; a folder beside the work dir where it is None.
    """
    argv = ["train.py", str(config), "--work-dir", str(work_dir), *arguments]
    if deepspeed:
        argv += ["--deepspeed", "zero2"]
    if options:
        argv += ["--cfg-options", *options]
    beside = work_dir.parent / f"{work_dir.name}-logs"
    environment = {**(env or {}), **({"DPA_STAGE": stage} if stage else {})}
    if ranks > 1:
        argv += ["--launcher", "pytorch"]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}

    def body(rank: int) -> Callable[[], None]:
        def run() -> None:
            os.environ.update(environment)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = argv
            prepare()
            train.main()

        return run

    return Processes([body(rank) for rank in range(ranks)], _new_log(log_folder or beside))


def run(stage: str | None, work_dir: Path, *options: str, **how) -> tuple[int, str]:
    """Run a stage to its end: exit code and output."""
    processes = start(stage, work_dir, *options, **how)
    return processes.wait(), processes.log.read_text()


def finish(stage: str | None, work_dir: Path, *options: str, **how) -> str:
    """Run a stage that has to succeed: its output."""
    code, output = run(stage, work_dir, *options, **how)
    assert code == 0, output[-4000:]
    return output


def refusal(stage: str | None, work_dir: Path, *options: str, **how) -> str:
    """The message of a run that has to be refused."""
    code, output = run(stage, work_dir, *options, **how)
    assert code == 1, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    assert output.count("\ndpa_xtuner: ") == 1, output[-3000:]
    return output.split("\ndpa_xtuner: ")[1]


def forked(body: Callable[[], None], log: Path) -> None:
    """Do something in a child that must not leave traces in this process."""
    assert Processes([body], log).wait() == 0, log.read_text()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _new_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{len(list(folder.iterdir()))}.log"


def reference(work_dir: Path, layout: Layout) -> Reference:
    """Run all stages, each in processes of its own."""
    seconds = {}
    for stage in STAGES:
        began = time.time()
        prepare = watch(work_dir / f"watched-{stage}.pt")
        finish(stage, work_dir, *layout.options(), prepare=prepare, **layout.how())
        seconds[stage] = time.time() - began
    return Reference(work_dir, seconds)


def watch(file: Path) -> Callable[[], None]:
    """For `prepare`: save a stage's tensors before and after, and which are trainable."""

    def prepare() -> None:
        before, after = HandOverHook.before_train, HandOverHook.after_train
        seen = {}

        def look(runner) -> dict:
            model = unwrap(runner.model)
            return {k: v.detach().clone() for k, v in nn.Module.state_dict(model).items()}

        def before_train(self, runner):
            model = unwrap(runner.model)
            seen["trainable"] = {n for n, p in model.named_parameters() if p.requires_grad}
            seen["before"] = look(runner)
            before(self, runner)

        def after_train(self, runner):
            seen["after"] = look(runner)
            if runner.rank == 0:
                torch.save(seen, file)
            after(self, runner)

        HandOverHook.before_train, HandOverHook.after_train = before_train, after_train

    return prepare


def copy_stage(source: Path, target: Path, stage: str) -> None:
    """Give another work dir a finished stage."""
    shutil.copytree(source / stage, target / stage)


def copy_with_one_weight_changed(source: Path, target: Path) -> None:
    """Copy a model whose folder holds a model.safetensors, one of its weights another."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def held_out_split(tiny: Path) -> tuple[list[str], list[str]]:
    """Ids of the captions that are held out, and of those that are trained on."""
    ids = [record["id"] for record in json.loads((tiny / "captions.json").read_text())]
    order = np.random.default_rng(0).permutation(len(ids))
    held_out = {ids[i] for i in order[:3]}
    return [i for i in ids if i in held_out], [i for i in ids if i not in held_out]


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    """All weights that the stages have written, by file and name."""
    files = sorted(work_dir.glob("*/*/*.safetensors"))
    return {
        f"{file.relative_to(work_dir)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, or are in one only."""
    shared = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(
        name
        for name in shared
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    )


# Where a run can be killed, besides at any time: at each change it makes to its work dir.

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open"}
_WRITING = os.O_WRONLY | os.O_RDWR


def at_each_change(folder: Path, call: Callable[[str, str], None]) -> None:
    """Have `call(event, path)` called before each change below `folder` in this process."""

    def hook(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not (arguments[2] & _WRITING):
            return
        if os.fspath(arguments[0]).startswith(str(folder)):
            call(event, os.fspath(arguments[0]))

    sys.addaudithook(hook)


def die_at_change(folder: Path, number: int) -> Callable[[], None]:
    """For `prepare`: SIGKILL oneself before the `number`-th change below `folder`."""

    def prepare() -> None:
        seen = iter(range(1, number))
        at_each_change(folder, lambda *_: next(seen, None) or die())

    return prepare


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def note_changes(folder: Path, notes: Path) -> Callable[[], None]:
    """For `prepare`: write down each change below `folder`, a line each."""

    def prepare() -> None:
        out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        at_each_change(folder, lambda event, path: os.write(out, f"{event} {path}\n".encode()))

    return prepare
