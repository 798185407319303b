"""Writes how far a stage is and how its process ended, in its ``stage.json``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_distributed

from dpa_xtuner.engine.stopping import Stopped, stopped_in_order
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import write_json
from dpa_xtuner.layout import STATE_FILE
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.versions import installed_versions

_LONGEST_REASON = 200


class StateFile:
    """The ``stage.json`` of the stage that this process trains.

    Its ``status`` is ``running``, ``finished``, ``stopped`` (by a signal) or ``failed``, with the
    ``reason`` of the last two. A process that is killed leaves ``running``.

    Args:
        folder: folder of the stage.
        rank: rank of this process.

    Attributes:
        measured: what the stage has measured on held-out captions, by name.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.measured: dict[str, float] = {}
        self.before = read_state(folder).get("seconds", 0.0)
        self.began = time.monotonic()
        # Looked up now: another rank may fail, and say why, while this one writes.
        self.versions = installed_versions()

    def seconds(self) -> float:
        """Count the seconds of this run and of those it continues, as far as these wrote them."""
        return round(self.before + time.monotonic() - self.began, 1)

    def begin(self) -> None:
        """Mark the stage running; keep what an earlier run wrote. For rank 0, with the lock."""
        state = read_state(self.folder)
        state.pop("reason", None)
        write_json(self.folder / STATE_FILE, state | {"status": "running"})

    def write(self, state: dict) -> None:
        """Replace the file's content."""
        about = {"seconds": self.seconds(), "versions": self.versions}
        write_json(self.folder / STATE_FILE, state | about)

    def write_measured(self) -> None:
        """Replace :attr:`measured` alone; keep everything else."""
        self.write(read_state(self.folder) | {"measured": self.measured})

    @contextmanager
    def ends_noted(self, steps: Callable[[], int] | None = None) -> Iterator[None]:
        """Record an exception as the end of the stage, and let it pass.

        Args:
            steps: counts the optimizer steps done; called at the end.
        """
        try:
            with stopped_in_order():
                yield
        except BaseException as error:
            stopped = isinstance(error, Stopped | KeyboardInterrupt)
            status = "stopped" if stopped else "failed"
            end = {"status": status, "reason": _reason(error), "seconds": self.seconds()}
            if steps is not None and (done := steps()):  # 0: it did not reach the first one
                end["steps"] = done
            with suppress(OSError, DPAError):  # the first error is the one to show
                self._note(end)
            raise

    def _note(self, end: dict) -> None:
        # Before the ranks have met, another run may hold the folder: rank 0 alone knows.
        if self.rank != 0 and not is_distributed():
            return
        state = read_state(self.folder)
        # The first rank to fail knows why; the others fail because it is gone.
        if state.get("status") == "running":
            write_json(self.folder / STATE_FILE, state | end, f".{self.rank}")


def steps_done(cfg: Config, iterations: int) -> int:
    """Count the optimizer steps in ``iterations`` of a stage."""
    counts = cfg.optim_wrapper.get("accumulative_counts", 1)
    if "strategy" in cfg:
        counts = cfg.strategy.gradient_accumulation_steps
    return iterations // counts


def _reason(error: BaseException) -> str:
    if isinstance(error, Stopped):
        return error.name
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if not isinstance(error, DPAError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:_LONGEST_REASON]
