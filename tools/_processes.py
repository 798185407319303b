"""Run a training as a child process, and end all its processes when this one is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
from _configs import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS = 7  # until the processes are killed; each one ends by itself after about 4
LAUNCHER = "DPA_LAUNCHER"  # as in dpa_xtuner.engine.stopping, which is slow to import


class _Told(BaseException):
    pass


def run(command: list[str]) -> int:
    """Run a command and return its exit code; 128 + N after signal N, as in a shell.

    Raises:
        SystemExit: this process got SIGINT, SIGTERM or SIGHUP. All processes of the command have
            ended.
    """

    def told(number: int, frame) -> None:
        for each in _SIGNALS:  # a second signal must not interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        raise _Told(number)

    heeded = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, told) for each in heeded}
    # A terminal sends Ctrl-C to all processes, but only this one may act on it, once.
    # torchrun's agent handles the signals that it is told to handle, even ignored ones.
    environment = os.environ | {LAUNCHER: str(os.getpid()), "PET_SIGNALS_TO_HANDLE": "SIGTERM"}
    child = None
    try:
        child = subprocess.Popen(command, env=environment, preexec_fn=_ignore_ctrl_c)
        code = child.wait()
    except _Told as stop:
        number = stop.args[0]
        if child is not None:
            _end(child)
        if LAUNCHER not in os.environ:  # otherwise the tool that started this one says it
            name = signal.Signals(number).name
            say(f"\nStopped ({name}); call the same command again to go on.", sys.stderr)
        raise SystemExit(128 + number) from None
    for each, handler in before.items():
        signal.signal(each, handler)
    return code if code >= 0 else 128 - code


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(child: subprocess.Popen) -> None:
    """Tell the ranks to end, which end their own workers; then kill what is left."""
    try:
        root = psutil.Process(child.pid)
        ranks, everything = [root], [root, *root.children(recursive=True)]
        if "torch.distributed.run" in root.cmdline():  # its agent would report the end as a failure
            ranks = root.children()
            root.kill()
    except psutil.NoSuchProcess:
        return
    for process in ranks:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    end = time.monotonic() + _SECONDS
    while any(map(_is_alive, everything)) and time.monotonic() < end:
        time.sleep(0.05)
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
