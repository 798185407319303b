"""Ends a training process after a signal, or when the command that started it is gone.

    python tools/train.py          or  xtuner train
      torchrun's agent             where there are several processes
        a training process         calls :func:`guard`
          dataloader workers

The main thread ends in order: a signal raises :class:`Stopped` there. It may be in a slow step, or
wait for a dead rank; so a second thread ends the process if the main thread is too late.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from dpa_xtuner.errors import is_first_of_node

LAUNCHER = "DPA_LAUNCHER"
"""Environment variable: the process of ``tools/train.py``, which reports the end itself."""

_FOUND = "DPA_ANCESTORS"  # the launchers that guard() found, for the next stage's process image
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_GRACE = 4  # seconds that the main thread has for an orderly end
_POLL = 1.0  # seconds between two checks of the launcher
_TORCHRUN = ["--nnodes", "--node_rank", "--nproc_per_node", "--master_addr", "--master_port"]
_GONE = "the command that started it has ended"
_installed = False
_stopped: "Stopped | None" = None


class Stopped(SystemExit):
    """A signal ended the process; the exit code is that of a shell for the signal.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def guard() -> None:
    """Make this training process end in time after SIGTERM, SIGHUP, SIGINT or its launcher's end.

    A signal that was ignored when the process started, as SIGHUP is under ``nohup``, stays ignored.
    A signal that has a handler keeps it.

    Raises:
        Stopped: the launcher ended before this function could look for it.
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
    # Python runs handlers only between two of its own instructions; the pipe is written at once.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    free = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [number for number in _SIGNALS if signal.getsignal(number) in free]
    for number in numbers:
        signal.signal(number, _stop)
    # A child shares the pipe at first. A signal to the child in that moment would end this process.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, _SIGNALS),
        after_in_parent=_unblock_signals,
        after_in_child=_leave_to_parent,
    )
    watch = (reader, numbers, launchers)
    threading.Thread(target=_watch, args=watch, name="stopping", daemon=True).start()


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Report any error after a signal as the end by that signal.

    Some code turns :class:`Stopped` into another error by a bare ``except`` (MMEngine's config
    writer does), and a rank that ends makes the others fail.
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


_unblock_signals = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _SIGNALS)


def _leave_to_parent() -> None:
    """Leave the end of a forked child, such as a dataloader worker, to its parent.

    Ctrl-C reaches the child too.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


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
    # If this thread can't run any more, the system's timer ends the process.
    signal.alarm(_GRACE + 2)
    _say(reason)
    time.sleep(_GRACE)
    _kill(psutil.Process().children(recursive=True))
    os._exit(128 + number)


def _launchers() -> tuple[list[psutil.Process], bool]:
    """Find the processes that this one must not outlive, and whether one of them is gone already.

    Any other parent may end, such as a shell after ``nohup ... &``.
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
            else:  # an agent's direct child leads a session; a script in between would lead it
                orphaned = os.getsid(0) == os.getpid()
        if LAUNCHER not in os.environ and top.parent() is not None:
            if _is_xtuner(top.parent()):
                found.append(top.parent())
            else:
                orphaned = orphaned or _was_orphaned(top)
    except psutil.NoSuchProcess:
        return [], True
    os.environ[_FOUND] = " ".join(str(process.pid) for process in found)
    return found, orphaned


def _has_our_arguments(process: psutil.Process | None) -> bool:
    return process is not None and set(sys.argv[1:]) <= set(process.cmdline())


def _is_xtuner(process: psutil.Process) -> bool:
    return any(Path(argument).name == "xtuner" for argument in process.cmdline()[:2])


def _was_orphaned(top: psutil.Process) -> bool:
    """Tell whether ``xtuner train`` started a process and ended before that could look for it.

    Then the process has the command line that XTuner 0.2.0 gives, and the leader of its process
    group is gone. Use ``nohup`` to let a run outlive its launcher.
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
    """Kill torchrun's agent, silently; its workers then end."""
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
    """Report the end, once on each node, unless the launcher does."""
    if LAUNCHER not in os.environ and is_first_of_node():
        text = f"\nStopped ({reason}); run the same command again to continue."
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
