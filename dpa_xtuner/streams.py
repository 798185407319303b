"""Keeps a process alive when the reader of its output has gone."""

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


def outlive_readers() -> None:
    """Let this process continue when nobody reads its output, as after ``| head``.

    From then on its output is dropped. The streams stay the same objects, since the handlers of
    loggers hold them already.
    """
    for stream in (sys.stdout, sys.stderr):
        # None, a notebook's stream and a file of the user's are left alone.
        if type(stream) is not io.TextIOWrapper or _descriptor(stream) not in (1, 2):
            continue
        if "write" not in vars(stream):
            for name in ("write", "flush"):
                setattr(stream, name, _lasting(stream, getattr(stream, name)))


def _descriptor(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError):  # a stream into memory has none
        return stream.fileno()
    return None


def _lasting(stream: TextIO, method: Callable) -> Callable:
    def call(*args):
        """Do what the method does; from a closed reader on, do it to nowhere."""
        try:
            return method(*args)
        except OSError as error:
            # EPIPE: a pipe without a reader. EIO: a closed terminal.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())

    return call
