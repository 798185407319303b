"""The formats that data are read from, recognised by the content; ``docs/data.md`` shows each.

A file or folder is opened by one of the readers (JSON, tables, rows of Parquet and Arrow, tar
shards, lists of files), which gives its records as plain dicts. What a dict means is told by its
keys: LLaVA, messages, query/response, user/assistant texts, image and caption.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from dpa_xtuner.data.formats import captions, messages, opened, pairs
from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.formats.turns import refuse_unread_pictures, refuse_what_is_not_read
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Malformed, Parts, Record, make_record, shown_id
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256


class _Format(NamedTuple):
    """A format of records: its name, for each key that it needs the known names, its reader."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any]], Parts]


_CAPTIONS = _Format("image and caption", (captions.IMAGES, captions.CAPTIONS), captions.read)
_FORMATS = (
    _Format("LLaVA", (("conversations",),), functools.partial(messages.read, key="conversations")),
    _Format("messages", (("messages",),), messages.read),
    _Format("query/response", (("query",), ("response",)), pairs.read_query),
    _Format("user/assistant texts", (("texts",),), pairs.read_texts),
    _CAPTIONS,
)
# What other formats call what ours need.
_ALIKE = {
    "query": ("question", "instruction", "prompt", "input", "prefix"),
    "response": ("answer", "answers", "output", "completion", "suffix"),
    "conversations": ("conversation", "dialog", "dialogue", "turns"),
    "caption": ("captions",),
    "image": ("url", "image_url", "img"),
}
_SHOWN = 300  # characters of a record that no format fits
_ENDS = 1 << 20  # bytes at either end of a file with pictures that stand for all of it


def open_source(path: str | Path, lists: frozenset[str] = frozenset()) -> Source:
    """Find out what a data file or folder is.

    Args:
        path: the file or folder.
        lists: the lists that it is named by, one in the other.

    Raises:
        DPAError: it is missing, or is nothing that is read.
    """
    real = os.path.realpath(path)
    if real in lists:
        raise DPAError(f"data file {path} names itself, or a list that names it.")
    find = functools.partial(open_source, lists=lists | {real})
    return replace(opened.open_source(Path(path), find, read_source), path=Path(path))


def read_records(path: str | Path) -> Iterator[Record | Problem]:
    """Stream the records of a data file or folder in any of the formats.

    Yields:
        a :class:`Record`, or a :class:`Problem` for one that can't be used.

    Raises:
        DPAError: the file is missing, empty, broken, or of no format that is read.
    """
    return read_source(open_source(path))


def read_source(source: Source) -> Iterator[Record | Problem]:
    """Stream the records of what :func:`open_source` has found."""
    first = True
    for position, item in enumerate(source.items()):
        if isinstance(item, (Record, Problem)):
            yield replace(item, position=position)
            continue
        if first and isinstance(value := messages.as_item(item), dict):
            if not (_format_of(value) or _format_of(_without_nulls(value))):
                raise DPAError(f"data file {source.path}: {_fits_none(value)}")
            first = False
        yield parse_record(item, position)


def parse_record(item: Any, index: int) -> Record | Problem:
    """Read one decoded record.

    Args:
        item: what the file holds at this place.
        index: its place among the file's records, the id of a record without "id".

    Returns:
        The :class:`Record`, or the :class:`Problem` with it.
    """
    item = _without_nulls(item)
    if not isinstance(item, dict):
        reason = f"not a record: {type(item).__name__}, expected an object"
        return Problem(str(index), reason, position=index)
    try:
        if (found := _format_of(item)) is None:
            raise Malformed(f"unknown format: {_nearest(item)}")
        refuse_what_is_not_read(item)
        parts = found.read(item)
        refuse_unread_pictures(item, parts.images)
        return make_record(item, parts, index)
    except Malformed as error:
        return Problem(shown_id(item, index), str(error), position=index)


def _without_nulls(item: Any) -> Any:
    """Return a record without the keys that have no value, as a row of a table may lack some."""
    item = messages.as_item(item)
    if isinstance(item, dict) and None in item.values():
        return {key: value for key, value in item.items() if value is not None}
    return item


def _format_of(item: Mapping[str, Any]) -> _Format | None:
    fit = (each for each in _FORMATS if all(_first(names, item) for names in each.needs))
    found = next(fit, None)
    return None if found is _CAPTIONS and captions.reserved(item) else found


def _first(names: Iterable[str], keys: Iterable[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def data_sha256(path: str | Path) -> str:
    """Hash a data file's content; of a list or a folder, that of all its files.

    A file with pictures inside is known by its size and its two ends: of Parquet files the place
    and size of all columns is there.
    """
    files = open_source(path).files
    hashes = [_ends_sha256(f) if opened.holds_pictures(f) else file_sha256(f) for f in files]
    if files == (Path(path),):
        return hashes[0]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.cache
def _ends_sha256(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(f"{path.name} {size} ".encode())
        for start in (0, max(0, size - _ENDS)):
            file.seek(start)
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _fits_none(item: Mapping[str, Any]) -> str:
    shown = json.dumps(item, ensure_ascii=False, default=str)
    shown = shown[:_SHOWN] + "..." * (len(shown) > _SHOWN)
    near = _nearest(item)
    if messages.as_item([item]) != [item]:
        near = "They are single messages: a record has a list of them, under 'messages'."
    return (
        f"its records fit no format that is read. {near} Its first record: {shown} "
        "docs/data.md shows a record of each format."
    )


def _nearest(item: Mapping[str, Any]) -> str:
    """Name the nearest format, which of its keys are there, and which are missing."""
    keys = list(map(str, item))

    def likeness(names: tuple[str, ...]) -> float:
        alike = 0.9 if _first(_ALIKE.get(names[0], ()), keys) else 0.0
        ratios = [0.8 * SequenceMatcher(None, names[0], key).ratio() for key in keys]
        return 1.0 if _first(names, keys) else max([alike, *ratios])

    best = max(_FORMATS, key=lambda each: sum(map(likeness, each.needs)) / len(each.needs))
    needs = [names[0] for names in best.needs]
    has = [repr(found) for names in best.needs if (found := _first(names, keys))]
    told = f"Nearest is {best.name!r}, which needs {' and '.join(map(repr, needs))}: "
    told += f"has {' and '.join(has) or 'none of it'}"
    if lacks := [names[0] for names in best.needs if not _first(names, keys)]:
        meant = {need: _first(_ALIKE.get(need, ()), keys) for need in lacks}
        shown = (f"{n!r}" + (f" (perhaps {meant[n]!r})" if meant[n] else "") for n in lacks)
        told += f", lacks {' and '.join(shown)}"
    elif others := captions.reserved(keys):
        told += f", but with {', '.join(map(repr, others))} it may be something else"
    return f"{told}. Keys: {', '.join(map(repr, keys[:12])) or 'none'}."
