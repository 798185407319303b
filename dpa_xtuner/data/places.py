"""Pictures wherever they are: a file, a row of a table, a place in a tar, or in the text itself.

A record names a picture by a text: a path, or one of these.

| name                                        | picture                                     |
|---------------------------------------------|---------------------------------------------|
| ``parquet:///data/a.parquet#row=7&image=0`` | the first of row 7, in the column "image"   |
| ``arrow:///data/a.arrow#row=7&images=2``    | the third                                   |
| ``tar:///data/a.tar#at=1536&size=20480``    | these bytes of the tar                      |
| ``data:image/png;base64,...``               | these bytes                                 |
"""

import base64
import binascii
import functools
import io
import os
import re
import threading
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

_ROW = re.compile(r"(parquet|arrow)://(.*)#row=(\d+)&(images?)=(\d+)", re.DOTALL)
_TAR = re.compile(r"tar://(.*)#at=(\d+)&size=(\d+)", re.DOTALL)
_SCHEMES = ("parquet://", "arrow://", "tar://", "data:")
_TABLES = 4  # Arrow files that are mapped at a time
_FOOTERS = 256  # Parquet files whose row groups are known
_LARGEST_GROUP = 1 << 29  # bytes of the pictures of a row group, which is read whole
_last = threading.local()  # the row group that a thread has read last


def is_place(name: str) -> bool:
    """Whether a picture's name is no path, but one of the other kinds."""
    return name.startswith(_SCHEMES)


def joined(folder: str | Path | None, name: str) -> str:
    """Return a picture's name with the folder that its path is relative to."""
    return name if is_place(name) else os.path.join(folder or "", name)


def short(name: str) -> str:
    """Shorten a picture's name for a message."""
    return name if len(name) <= 300 else f"{name[:60]}... ({len(name)} characters)"


def in_row(kind: str, path: Path, row: int, column: str, index: int) -> str:
    """Return the name of a picture in a row of a "parquet" or "arrow" file."""
    return f"{kind}://{os.path.realpath(path)}#row={row}&{column}={index}"


def in_tar(path: Path, start: int, size: int) -> str:
    """Return the name of a picture that takes ``size`` bytes of a tar from ``start`` on."""
    return f"tar://{os.path.realpath(path)}#at={start}&size={size}"


def open_bytes(name: str) -> str | io.BytesIO:
    """Return what ``PIL.Image.open`` takes for a picture: its path, or its bytes.

    Args:
        name: the picture's name. Where a row has a path in place of bytes, it is relative to the
            table's folder.

    Raises:
        OSError, ValueError: it can't be read; FileNotFoundError where the file is not there.
    """
    if not is_place(name):
        return name
    if name.startswith("data:"):
        header, _, content = name.partition(",")
        try:
            return io.BytesIO(base64.b64decode(content, validate=True))
        except binascii.Error as error:
            raise ValueError(f"{header} holds no base64 ({error})") from None
    if match := _TAR.fullmatch(name):
        with open(match[1], "rb") as file:
            file.seek(int(match[2]))
            return io.BytesIO(file.read(int(match[3])))
    match = _ROW.fullmatch(name)
    if match is None:
        raise ValueError("its name says no place")
    kind, path, row, column, index = match.groups()
    value = _value(kind, path, int(row), column)
    if isinstance(value, list):
        value = value[int(index)]
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return os.path.join(os.path.dirname(path), value["path"])
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise FileNotFoundError(f"no picture in {name}")
    return io.BytesIO(value)


def _value(kind: str, path: str, row: int, column: str) -> Any:
    if kind == "arrow":
        return open_table(path).column(column)[row].as_py()
    groups = _row_groups(path)
    number = bisect_right(groups, row) - 1
    table = _row_group(path, number, column)
    return table.column(0)[row - groups[number]].as_py()


@functools.lru_cache(_TABLES)
def open_table(path: str) -> Any:
    """Return an Arrow file as a table, mapped into memory."""
    import pyarrow as pa

    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


@functools.lru_cache(_FOOTERS)
def _row_groups(path: str) -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        found = file.metadata
        sizes = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
    return [0, *accumulate(sizes)]


def _row_group(path: str, number: int, column: str) -> Any:
    """Read a row group's pictures, unless this thread has read them last."""
    import pyarrow.parquet as pq

    asked = path, number, column
    if getattr(_last, "asked", None) == asked:
        return _last.table
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(
            c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == column
        )
        if size > _LARGEST_GROUP:
            raise ValueError(
                f"row group {number} of {path} holds {size >> 20} MiB of pictures, too many to "
                "open one; write the file again with row groups of 100 rows"
            )
        _last.asked, _last.table = asked, file.read_row_group(number, [column], use_threads=False)
    return _last.table
