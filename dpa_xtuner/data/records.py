"""Read LLaVA-format data: a JSON array or JSON lines, one record at a time, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError

_CHUNK = 1 << 20  # characters read at a time
_LONGEST_RECORD = 1 << 26  # characters; an array item beyond this is taken for a missing bracket
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r"[ \t\r\n]*([,\]])")  # what follows an item of an array


@dataclass(frozen=True, slots=True)
class Record:
    """A well-formed LLaVA record.

    Attributes:
        id: the record's "id"; its index in the file where it has none.
        images: paths as written in the file, in the order of the ``<image>`` marks.
        system: text of a leading "system" turn, or None.
        turns: (human text with its ``<image>`` marks, gpt text) per turn, at least one.
        position: its place among the file's records, from 0.
        sizes: (width, height) of each image in pixels; empty where they were not read.
    """

    id: str
    images: tuple[str, ...]
    system: str | None
    turns: tuple[tuple[str, str], ...]
    position: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


def read_records(path: str | Path) -> Iterator[Record | Problem]:
    """Stream the records of a JSON array or of JSON lines; the content decides which it is.

    Args:
        path: the data file, UTF-8.

    Yields:
        a :class:`Record`, or a :class:`Problem` for a record that is malformed.

    Raises:
        DPAError: the file is missing, empty or no JSON; the message names the position.
    """
    for index, item in enumerate(_read_items(Path(path))):
        yield item if isinstance(item, Problem) else parse_record(item, index)


def parse_record(item: Any, index: int) -> Record | Problem:
    """Check one decoded JSON value.

    Args:
        item: what the file holds at this place.
        index: its index in the file, the id of a record without "id".

    Returns:
        The :class:`Record`, or the :class:`Problem` with it.
    """
    if not isinstance(item, dict):
        return Problem(str(index), f"not a record: {type(item).__name__}, expected an object")
    record_id = item.get("id", index)
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        return Problem(str(index), "malformed id: expected a string or a number")
    record_id = str(record_id)
    try:
        images = _images(item.get("image"))
        system, turns = _turns(item.get("conversations"))
        _check_marks(images, system, turns)
        "".join([record_id, *images, system or "", *chain.from_iterable(turns)]).encode()
    except UnicodeEncodeError:
        name = ascii(record_id)[1:-1]
        return Problem(name, "malformed text: half of a surrogate pair, which is no Unicode text")
    except _Malformed as error:
        return Problem(record_id, str(error))
    return Record(record_id, images, system, turns, index)


class _Malformed(Exception):
    """A reason, from the checks below to :func:`parse_record`."""


def _images(value: Any) -> tuple[str, ...]:
    images = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise _Malformed("malformed image: expected a path or a list of paths")
    return tuple(images)


def _turns(messages: Any) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    if not isinstance(messages, list) or not messages:
        raise _Malformed("no conversations: expected a list of turns under 'conversations'")
    if not all(isinstance(m, dict) and isinstance(m.get("value"), str) for m in messages):
        raise _Malformed("malformed turn: expected {'from': ..., 'value': a string}")
    system = messages[0]["value"] if messages[0].get("from") == "system" else None
    messages = messages[system is not None :]
    roles = [message.get("from") for message in messages]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        shown = ", ".join(map(str, roles[:6])) + (", ..." if len(roles) > 6 else "")
        raise _Malformed(f"roles not alternating: expected human, gpt, ...; got {shown or 'none'}")
    values = [message["value"] for message in messages]
    return system, tuple(zip(values[::2], values[1::2], strict=True))


def _check_marks(
    images: tuple[str, ...], system: str | None, turns: tuple[tuple[str, str], ...]
) -> None:
    if any(DEFAULT_IMAGE_TOKEN in text for text in [system or "", *(gpt for _, gpt in turns)]):
        raise _Malformed(f"misplaced {DEFAULT_IMAGE_TOKEN}: it belongs into human turns only")
    marks = sum(human.count(DEFAULT_IMAGE_TOKEN) for human, _ in turns)
    if marks != len(images):
        raise _Malformed(
            f"wrong number of {DEFAULT_IMAGE_TOKEN}: {marks} in the text, {len(images)} images"
        )


def _read_items(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            before = 0
            while (first := file.read(1)).isspace():
                before += 1
            if first == "[":
                yield from _array_items(file, path, before + 1)
                return
            if first == "{":
                file.seek(0)
                yield from _line_items(file, path)
                return
    except FileNotFoundError:
        raise DPAError(f"data file {path} does not exist; check data_path.") from None
    except UnicodeDecodeError as error:
        raise DPAError(
            f"data file {path} is not UTF-8 text ({error.reason}); expected a JSON array or JSON "
            "lines in UTF-8."
        ) from error
    found = f"begins with {first!r}" if first else "is empty"
    raise DPAError(f"data file {path} {found}; expected a JSON array ('[') or JSON lines ('{{').")


def _line_items(file: TextIO, path: Path) -> Iterator[Any]:
    read = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            if not read:
                raise DPAError(
                    f"data file {path} is neither a JSON array nor JSON lines: line {number}, "
                    f"column {error.colno}: {error.msg}. Expected one whole record a line."
                ) from error
            item = Problem(f"line {number}", f"not JSON: {error.msg} at column {error.colno}")
        read += 1
        yield item


def _array_items(file: TextIO, path: Path, position: int) -> Iterator[Any]:
    """Decode the items of a JSON array one by one, with about one chunk of its text in memory.

    Where an item and the mark behind it can't be read, the text may only end too early: they are
    read again with the next chunk.

    Args:
        file: the open file, behind the array's ``[``.
        path: the file, for messages.
        position: characters before the file's place.
    """
    decode = json.JSONDecoder().raw_decode
    text, at, read, mark = "", 0, 0, ","
    while mark != "]":
        space = _SPACE.match(text, at)
        assert space is not None, "no space is space too"
        at = space.end()
        if not read and text.startswith("]", at):  # an empty array
            at += 1
            break
        try:
            item, end = decode(text, at)
            found = _MARK.match(text, end)
            if not found:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        except json.JSONDecodeError as error:
            chunk = file.read(max(_CHUNK, len(text) - at))
            if not chunk or len(text) - at > _LONGEST_RECORD:
                raise _broken(path, position + error.pos, read, error.msg) from error
            text, at, position = text[at:] + chunk, 0, position + at
            continue
        yield item
        read += 1
        at, mark = found.end(), found[1]
    if (text[at:] + file.read(_CHUNK)).strip():
        raise _broken(path, position + at, read, "text after the closing ']'")


def _broken(path: Path, position: int, read: int, what: str) -> DPAError:
    return DPAError(
        f"data file {path} is broken at character {position}, after {read} records: {what}. "
        "Expected a JSON array of records; write the file again."
    )
