"""Reads LLaVA-format data: a JSON array or JSON lines, one record at a time, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.errors import DPAError

_CHUNK = 1 << 20  # characters read at a time
_LONGEST_RECORD = 1 << 26  # characters; an array item beyond this is taken for a missing bracket
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_CUT_NUMBER = re.compile(r"[-+.eE0-9]*\Z")  # what follows a number that the window's end has cut


@dataclass(frozen=True, slots=True)
class Record:
    """A well-formed LLaVA record.

    Attributes:
        id: The record's "id"; its index in the file where it has none.
        images: Paths as written in the file, in the order of the `<image>` marks.
        system: Text of a leading "system" turn, or None.
        turns: (human text with its `<image>` marks, gpt text) per turn, at least one.
        position: Its place among the file's records, from 0.
        sizes: (width, height) of each image in pixels; empty where they were not read.
    """

    id: str
    images: tuple[str, ...]
    system: str | None
    turns: tuple[tuple[str, str], ...]
    position: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be trained on.

    Attributes:
        record_id: The record's id.
        reason: "kind" or "kind: details"; problems are counted by kind.
    """

    record_id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(": ")[0]


def read_records(path: str | Path) -> Iterator[Record | Problem]:
    """Streams the records of a JSON array or of JSON lines; the content decides which it is.

    Args:
        path: The data file, UTF-8.

    Yields:
        A `Record`, or a `Problem` for a record that is malformed.

    Raises:
        DPAError: The file is missing, empty or no JSON; the message names the position.
    """
    for index, item in enumerate(_read_items(Path(path))):
        yield item if isinstance(item, Problem) else parse_record(item, index)


def parse_record(item: Any, index: int) -> Record | Problem:
    """Checks one decoded JSON value.

    Args:
        item: What the file holds at this place.
        index: Its index in the file, the id of a record without "id".

    Returns:
        The `Record`, or the `Problem` with it.
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
    """Carries a reason from the checks below to `parse_record`."""


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
            window = _Window(file)
            first = window.peek()
            if first == "[":
                yield from _array_items(window, path)
                return
        if first == "{":
            with path.open(encoding="utf-8-sig") as file:
                yield from _line_items(file, path)
            return
    except FileNotFoundError:
        raise DPAError(f"data file {path} does not exist; check `data_path`.") from None
    except UnicodeDecodeError as error:
        raise DPAError(
            f"data file {path} is not UTF-8 text ({error.reason}); expected a JSON array or JSON "
            "lines in UTF-8."
        ) from error
    found = f"begins with {first!r} at character {window.position}" if first else "is empty"
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


def _array_items(window: _Window, path: Path) -> Iterator[Any]:
    read = 0

    def broken(what: str, position: int) -> DPAError:
        return DPAError(
            f"data file {path} is broken at character {position}, after {read} records: {what}. "
            "Expected a JSON array of records; write the file again."
        )

    window.skip("[")
    while window.peek() != "]":
        try:
            yield window.value()
        except json.JSONDecodeError as error:
            raise broken(error.msg, window.position - window.at + error.pos) from error
        read += 1
        if window.peek() == ",":
            window.skip(",")
            if window.peek() == "]":
                raise broken("a comma before the closing ']'", window.position)
        elif window.peek() != "]":
            raise broken(
                f"expected ',' or ']', got {window.peek() or 'its end'!r}", window.position
            )
    window.skip("]")
    if window.peek():
        raise broken("text after the closing ']'", window.position)


class _Window:
    """A window that slides over a text file, so that a whole array is never in memory.

    The standard decoder's `raw_decode` reads one item; where it runs into the window's end, the
    window is widened and the item read again.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._dropped = 0
        self.at = 0

    @property
    def position(self) -> int:
        """Characters between the file's start and the window's current place."""
        return self._dropped + self.at

    def skip(self, text: str) -> None:
        """Moves past `text`, which `peek` has shown to be next."""
        self.at += len(text)

    def peek(self) -> str:
        """Moves to the next character that is no white space and returns it, '' at the end."""
        while True:
            self.at = _WHITESPACE.match(self._text, self.at).end()
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._widen():
                return ""

    def value(self) -> Any:
        """Reads one JSON value and moves past it.

        Raises:
            json.JSONDecodeError: There is none, or it is longer than 64M characters.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
            except json.JSONDecodeError:
                if len(self._text) - self.at > _LONGEST_RECORD or not self._widen():
                    raise
                continue
            if _CUT_NUMBER.match(self._text, end) and self._widen():
                continue
            self.at = end
            return value

    def _widen(self) -> bool:
        chunk = self._file.read(max(_CHUNK, len(self._text) - self.at))
        if chunk:
            self._text = self._text[self.at :] + chunk
            self._dropped += self.at
            self.at = 0
        return bool(chunk)
