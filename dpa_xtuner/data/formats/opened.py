"""Recognise a data file or folder by what is in it."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dpa_xtuner.data.formats import folders, json_text, lists, messages, rows, tables, tars
from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.errors import DPAError

_GZIP = b"\x1f\x8b"
_OTHERS = {
    _GZIP: "compressed twice over; unpack it: gunzip",
    b"version https://git-lfs": "a pointer to a file; fetch it by: git lfs pull",
    b"PK\x03\x04": "a zip file; unpack it, or save an Excel table as CSV",
    b"\x89HDF": "an HDF5 file, which is not read",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"BZh": "compressed by bzip2; unpack it, or compress it by gzip",
    b"\xfd7zXZ": "compressed by xz; unpack it, or compress it by gzip",
    b"\x80\x04": "a pickle, which is not read",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}
_SHOWN = 60  # characters of a file that is nothing that is read
_HEAD = 1 << 10  # bytes that tell binary files apart
_LONGEST_HEAD = 1 << 20  # characters of a first line that may be a list of messages
_LARGEST_OBJECT = 1 << 24  # characters of a file that is one JSON object
_EXPECTED = (
    "expected a JSON array ('['), JSON lines ('{'), a CSV or TSV table with a column of pictures "
    "and one of captions, a YAML list of files, Parquet, Arrow, or tar shards; see docs/data.md"
)


def holds_pictures(path: Path) -> bool:
    """Whether a file is one that pictures may be inside of, and so may be too large to hash."""
    with path.open("rb") as file:
        return _binary(file.read(_HEAD)) is not None


def _binary(head: bytes) -> Callable[[tuple[Path, ...]], Source] | None:
    """Find what opens files that begin like this, if pictures may be inside of them."""
    if head.startswith(rows.PARQUET):
        return rows.parquet
    if head.startswith(rows.ARROW):
        return rows.arrow
    return tars.shards if tars.is_tar(head) else None


def open_source(path: Path, find: lists.Find, read: lists.Read) -> Source:
    """Find out what a data file or folder is.

    Args:
        path: the file or folder.
        find: finds out the same of a file that another one names.
        read: streams the records of what it has found.

    Raises:
        DPAError: it is missing, empty, or nothing that is read.
    """
    if path.is_dir():
        return folders.open_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        packed = head.startswith(_GZIP)
        if packed:
            with gzip.open(path) as file:
                head = file.read(_HEAD)
    except FileNotFoundError:
        raise DPAError(f"data file {path} does not exist; check data_path.") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise DPAError(f"data file {path} is no whole gzip file: {error}.") from None
    binary = _binary(head)
    if binary and packed:
        raise DPAError(
            f"data file {path} is a compressed tar or table, whose pictures can't be opened one by "
            "one; unpack it: gunzip."
        )
    if binary:
        return binary((path,))
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise DPAError(f"data file {path} is {what}; {_EXPECTED}.")
    if b"\0" in head:
        raise DPAError(f"data file {path} is not UTF-8 text (it has zero bytes); {_EXPECTED}.")
    return _text(path, gzip.open if packed else open, find, read)


def _text(path: Path, opener: Callable[..., Any], find: lists.Find, read: lists.Read) -> Source:
    def source(name: str, items: Callable[..., Iterator[Any]], *arguments: Any) -> Source:
        def run() -> Iterator[Any]:
            with _opened(path, opener) as file:
                yield from items(file, path, *arguments)

        return Source(name, (path,), run)

    with _opened(path, opener) as file:
        head = file.read(_LONGEST_HEAD)
        text = head.lstrip()
        first, line = text[:1], re.split("[\r\n]", text, maxsplit=1)[0]
        if first == "[" and not _is_list_of_messages(line):
            return source("JSON array", json_text.array_items, len(head) - len(text) + 1)
        if first == "{" and (named := _object(file, line, path)) is not None:
            return lists.meta(path, named, find, read)
        if first in ("[", "{"):
            return source("JSON lines", json_text.line_items)
        if lists.is_yaml(text):
            return lists.yaml(path, head + file.read(_LONGEST_HEAD), find, read)
        if first and (table := tables.delimiter(line)) is not None:
            return source({",": "CSV", "\t": "TSV"}[table], tables.rows, table)
    found = f"begins with {line.strip()[:_SHOWN]!r}" if first else "is empty"
    raise DPAError(f"data file {path} {found}; {_EXPECTED}.")


@contextmanager
def _opened(path: Path, opener: Callable[..., Any]) -> Iterator[TextIO]:
    """Open a text; tells of bytes that are none."""
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DPAError(
            f"data file {path} is not UTF-8 text ({error.reason}); {_EXPECTED}."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DPAError(
            f"data file {path} is no whole gzip file ({error}); copy it again."
        ) from error


def _is_list_of_messages(line: str) -> bool:
    try:
        return isinstance(messages.as_item(json_text.decode(line)), dict)
    except (ValueError, RecursionError):
        return False


def _object(file: TextIO, line: str, path: Path) -> dict[str, Any] | None:
    """Return the files that a file of one JSON object names; None for JSON lines.

    Raises:
        DPAError: the object takes several lines, and is broken.
    """
    with suppress(ValueError, RecursionError):
        found = json_text.decode(line)
        return found if lists.is_meta(found) else None
    file.seek(0)
    try:
        return json_text.decode(file.read(_LARGEST_OBJECT))
    except (ValueError, RecursionError) as error:
        if line.strip() != "{":  # a line of JSON lines may be broken too
            return None
        raise DPAError(
            f"data file {path} is neither JSON lines nor one JSON object: {error}."
            f"{json_text.hint(error)}"
        ) from None
