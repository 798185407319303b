"""The end of a training process: by a signal, or because the command that started it is gone.

    python tools/train.py          or  xtuner train
      torchrun's agent             where there are several processes
        a training process         calls :func:`guard`
          dataloader workers

The main thread ends in order: a signal raises :class:`Stopped` there. A thread sees that it does
so in time, as the main thread may be in the middle of a slow step or wait for a dead rank.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from dpa_xtuner.errors import is_first_of_node

LAUNCHER = "DPA_LAUNCHER"
"""Environment variable: the process of ``tools/train.py``, which tells of the end itself."""

_FOUND = "DPA_ANCESTORS"  # what guard() found, for the process image of the next stage
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_GRACE = 4  # seconds that the main thread has for an orderly end
_POLL = 1.0  # seconds between two looks at the launcher
_TORCHRUN = ["--nnodes", "--node_rank", "--nproc_per_node", "--master_addr", "--master_port"]
_GONE = "the command that started it has ended"
_installed = False
_stopped: "Stopped | None" = None


class Stopped(SystemExit):
    """The process was told to end; its exit code is that of a shell for the signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def guard() -> None:
    """End this training process in time after SIGTERM, SIGHUP, SIGINT or its launcher's end.

    A signal that was ignored when the process started, as SIGHUP is under ``nohup``, stays ignored,
    and one that has a handler keeps it.

    Raises:
        Stopped: the launcher has ended before this could look for it.
    """
    global _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    _installed = True
    launchers, orphaned = _launchers()
    if orphaned:
        _kill_agent(launchers)
        _say(_GONE)
        raise Stopped(signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python runs handlers between two of its own instructions only; this is written at once.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    free = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [number for number in _SIGNALS if signal.getsignal(number) in free]
    for number in numbers:
        signal.signal(number, _stop)
    # A child that is ended before it has let go of the pipe would end this process.
    os.register_at_fork(before=_hold, after_in_parent=_let, after_in_child=_leave_to_parent)
    watch = (reader, numbers, launchers)
    threading.Thread(target=_watch, args=watch, name="stopping", daemon=True).start()


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let whatever goes wrong after a signal be the end by that signal.

    A bare ``except`` makes another error of it, as MMEngine's config writer does, and a process
    that ends takes something away from the next.
    """
    try:
        yield
    except BaseException:
        if _stopped is not None:
            raise _stopped from None
        raise


def _stop(number: int, frame) -> None:
    global _stopped
    for each in _SIGNALS:  # a second one would interrupt the orderly end
        signal.signal(each, signal.SIG_IGN)
    _stopped = Stopped(number)
    raise _stopped


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _let() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _leave_to_parent() -> None:
    """In a forked child, such as a dataloader worker: Ctrl-C reaches it too, its parent ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
    _let()


def _watch(reader: int, numbers: list[signal.Signals], launchers: list[psutil.Process]) -> None:
    number: signal.Signals | None = None
    while number is None:
        if not all(map(_is_alive, launchers)):
            number, reason = signal.SIGTERM, _GONE
            _kill_agent(launchers)
            os.kill(os.getpid(), number)
        elif select.select([reader], [], [], _POLL)[0]:
            sent = os.read(reader, 4096)
            number = next((each for each in numbers if each in sent), None)
            reason = number.name if number else ""
    # The system's own timer ends a process that can't run this thread any more.
    signal.alarm(_GRACE + 2)
    _say(reason)
    time.sleep(_GRACE)
    _kill(psutil.Process().children(recursive=True))
    os._exit(128 + number)


def _launchers() -> tuple[list[psutil.Process], bool]:
    """The processes that this one must not outlive, and whether one of them is gone already.

    Any other parent may end: a shell after ``nohup ... &``, for example.
    """
    known = os.environ.get(_FOUND) or os.environ.get(LAUNCHER)
    try:
        found = [psutil.Process(int(pid)) for pid in known.split()] if known else []
        if _FOUND in os.environ:  # by the stage before, in this process
            return found, False
        top = psutil.Process()
        orphaned = False
        if "TORCHELASTIC_RUN_ID" in os.environ:
            if _has_our_arguments(top.parent()):
                top = top.parent()
                found.append(top)
            else:  # an agent's own child leads a session; a script between them would lead it
                orphaned = os.getsid(0) == os.getpid()
        if LAUNCHER not in os.environ and top.parent() is not None:
            if _is_xtuner(top.parent()):
                found.append(top.parent())
            else:
                orphaned = orphaned or _was_left(top)
    except psutil.NoSuchProcess:
        return [], True
    os.environ[_FOUND] = " ".join(str(process.pid) for process in found)
    return found, orphaned


def _has_our_arguments(process: psutil.Process | None) -> bool:
    return process is not None and set(sys.argv[1:]) <= set(process.cmdline())


def _is_xtuner(process: psutil.Process) -> bool:
    return any(Path(argument).name == "xtuner" for argument in process.cmdline()[:2])


def _was_left(top: psutil.Process) -> bool:
    """Whether ``xtuner train`` started a process and ended before that could look for it.

    The process has the very command line that XTuner 0.2.0 gives, and stands in the process group
    of one that is gone. ``nohup`` is the way to let a run outlive what started it.
    """
    command = top.cmdline()
    script = command.index(sys.argv[0]) if sys.argv[0] in command else 0
    before = [argument.split("=")[0] for argument in command[:script]]
    alone = before == ["python"]
    by_torchrun = before[-5:] == _TORCHRUN
    if not (os.path.isabs(sys.argv[0]) and (alone or by_torchrun)):
        return False
    ancestors = {top.pid, *(process.pid for process in top.parents())}
    ignores = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return not ignores and os.getpgid(top.pid) not in ancestors


def _kill_agent(launchers: list[psutil.Process]) -> None:
    """End torchrun's agent, whose workers then end; by a signal that it reports nothing about."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _kill([process for process in launchers if process.pid == os.getppid()])


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _say(reason: str) -> None:
    """Tell of the end, once on each node, unless the launcher does."""
    if LAUNCHER not in os.environ and is_first_of_node():
        text = f"\nStopped ({reason}); call the same command again to go on."
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
