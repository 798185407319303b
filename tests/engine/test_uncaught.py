"""Errors that end a process, or a thread of it, without the plugin's runner."""

import sys
import time
from multiprocessing import process, resource_sharer
from multiprocessing.connection import Client

import pytest

from dpa_xtuner.engine.uncaught import answer_uncaught


@pytest.mark.parametrize("installed", [True, False])
def test_a_worker_whose_parent_is_gone_prints_nothing(installed, capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    if installed:
        answer_uncaught()
    sharer = resource_sharer._ResourceSharer()
    address, _ = sharer.register(lambda conn, pid: None, lambda: None)
    Client(address, authkey=process.current_process().authkey).close()  # asks for nothing
    time.sleep(0.3)
    sharer.stop(timeout=1)
    assert ("EOFError" in capfd.readouterr().err) is not installed


def test_other_errors_are_shown_as_usual(capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    answer_uncaught()
    try:
        raise EOFError("of a file")
    except EOFError as error:
        sys.excepthook(EOFError, error, error.__traceback__)
    assert "Traceback" in capfd.readouterr().err
