"""JSON: an array, or an object on each line, decoded one by one in bounded memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError

_CHUNK = 1 << 20  # characters read at a time
_LONGEST_RECORD = 1 << 26  # characters; an array item beyond this is taken for a missing bracket
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r"[ \t\r\n]*([,\]])")  # what follows an item of an array


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def decode(text: str) -> Any:
    """Decode a JSON text.

    Raises:
        ValueError: it is broken, an object has a key twice, or a number has too many digits.
        RecursionError: it is too deep.
    """
    return _DECODER.decode(text)


def hint(error: Exception) -> str:
    """Return what most often is behind an error of this kind."""
    if not str(error).startswith(("Expecting value", "Expecting property name")):
        return ""
    return " JSON has no comments, no comma before a closing bracket, and texts in double quotes."


def line_items(file: TextIO, path: Path) -> Iterator[Any]:
    """Decode JSON lines; a line that is broken is a :class:`Problem`.

    Args:
        file: the open file.
        path: its name, for messages.

    Raises:
        DPAError: not even the first line is JSON.
    """
    read = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            item = decode(line.rstrip())
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            if not read:
                raise DPAError(
                    f"data file {path} is neither a JSON array nor JSON lines: line {number}, "
                    f"{_told(error)}. Expected one whole record a line.{hint(error)}"
                ) from error
            item = Problem(f"line {number}", f"not JSON: {_told(error)}")
        read += 1
        yield item


def _told(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return str(error)


def array_items(file: TextIO, path: Path, position: int) -> Iterator[Any]:
    """Decode the items of a JSON array one by one, with about one chunk of its text in memory.

    Where an item and the mark behind it can't be read, the text may only end too early: they are
    read again with the next chunk.

    Args:
        file: the open file.
        path: its name, for messages.
        position: characters up to the array's ``[`` and with it, which are skipped.

    Raises:
        DPAError: the array is broken; the message names the place.
    """
    file.read(position)
    text, at, read, mark = "", 0, 0, ","
    while mark != "]":
        space = _SPACE.match(text, at)
        assert space is not None, "no space is space too"
        at = space.end()
        if not read and text.startswith("]", at):  # an empty array
            at += 1
            break
        try:
            item, end = _DECODER.raw_decode(text, at)
            found = _MARK.match(text, end)
            if not found:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        except json.JSONDecodeError as error:
            chunk = file.read(max(_CHUNK, len(text) - at))
            if not chunk or len(text) - at > _LONGEST_RECORD:
                place = position + error.pos
                raise _broken(path, place, read, error.msg, hint(error)) from error
            text, at, position = text[at:] + chunk, 0, position + at
            continue
        except (ValueError, RecursionError) as error:
            raise _broken(path, position + at, read, str(error)) from error
        yield item
        read += 1
        at, mark = found.end(), found[1]
    if (text[at:] + file.read(_CHUNK)).strip():
        raise _broken(path, position + at, read, "text after the closing ']'")


def _broken(path: Path, position: int, read: int, what: str, hint: str = "") -> DPAError:
    return DPAError(
        f"data file {path} is broken at character {position}, after {read} records: {what}. "
        f"Expected a JSON array of records.{hint}"
    )
