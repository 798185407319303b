"""Keeps a process alive when the reader of its output has gone."""

import errno
import io
import os
import sys
from typing import Any, BinaryIO

_replaced: list[BinaryIO] = []  # a garbage-collected layer would close its file descriptor


def outlive_readers() -> None:
    """Let this process continue when nobody reads its output, as after ``| head``.

    From then on its output is dropped. The streams stay the same objects, since the handlers of
    loggers hold them already.
    """
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is not io.TextIOWrapper:  # None, or a notebook's stream
            continue
        buffer = stream.buffer
        raw = getattr(buffer, "raw", buffer)  # python -u has no buffer in between
        if type(raw) is not io.FileIO or raw.fileno() not in (1, 2):
            continue
        name, mode = stream.name, stream.mode
        options: dict[str, Any] = {
            "encoding": stream.encoding,
            "errors": stream.errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        lasting = _Lasting(raw.fileno(), "w", closefd=False)
        lasting.name = name
        try:
            stream.flush()
        except OSError as error:
            lasting.drop(error)
        _replaced.append(stream.detach())
        layer = lasting if buffer is raw else io.BufferedWriter(lasting)
        io.TextIOWrapper.__init__(stream, layer, **options)
        stream.mode = mode  # type: ignore[misc]  # can be set, whatever the stubs say


class _Lasting(io.FileIO):
    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.drop(error)
            return memoryview(data).nbytes

    def drop(self, error: OSError) -> None:
        # EPIPE: a pipe without a reader. EIO: a closed terminal.
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())
