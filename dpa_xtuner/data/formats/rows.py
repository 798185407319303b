"""Rows of Parquet and Arrow files, as Hugging Face's data sets are kept.

A picture in a row is not read here: its place is noted (:mod:`dpa_xtuner.data.places`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.places import in_row, open_table
from dpa_xtuner.errors import DPAError

if TYPE_CHECKING:
    import pyarrow as pa

    # Batches, and for each column of pictures without their bytes whether there are any.
    _Batches = Iterator[tuple[pa.RecordBatch, dict[str, bool]]]

PARQUET = b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # as a file, and as the stream that datasets writes
_ROWS = 256  # taken at a time
_PICTURES = ("image", "images")
_LISTS_OF_DICTS = ("texts", "conversations", "messages")


def parquet(files: tuple[Path, ...]) -> Source:
    """Open Parquet files, one after the other."""
    return _source("Parquet", _parquet_batches, files)


def arrow(files: tuple[Path, ...]) -> Source:
    """Open Arrow files, one after the other."""
    return _source("Arrow", _arrow_batches, files)


def _source(name: str, batches: Callable[[Path], _Batches], files: tuple[Path, ...]) -> Source:
    def items() -> Iterator[dict[str, Any]]:
        for path in files:
            start = 0
            for batch, inside in batches(path):
                yield from _rows(batch, name.lower(), path, start, inside)
                start += len(batch)

    return Source(name, files, items)


def _arrow_batches(path: Path) -> _Batches:
    import pyarrow as pa

    try:
        table = open_table(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DPAError(f"data file {path} is no whole Arrow file: {error}") from None
    for batch in table.to_batches(max_chunksize=_ROWS):
        yield batch, {}


def _parquet_batches(path: Path) -> _Batches:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            leaves, inside = _leaves(file)
            for batch in file.iter_batches(_ROWS, columns=leaves, use_threads=False):
                yield batch, inside
    except (pa.ArrowInvalid, OSError) as error:
        raise DPAError(f"data file {path} is no whole Parquet file: {error}") from None


def _leaves(file: Any) -> tuple[list[str], dict[str, bool]]:
    """Choose the columns to read: of pictures that have a path, this alone.

    Returns:
        The columns' paths in the schema, and for each field whose bytes are left out whether it has
        any.
    """
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    left_out, inside = set(), {}
    for field in file.schema_arrow:
        inner = [leaf for leaf in leaves if leaf.split(".")[0] == field.name]
        found = {leaf.rpartition(".")[2]: leaf for leaf in inner}
        if _has_bytes(field.type) and {"bytes", "path"} <= found.keys():
            left_out.update(set(inner) - {found["path"]})
            inside[field.name] = not _all_null(file, leaves.index(found["bytes"]))
    return [leaf for leaf in leaves if leaf not in left_out], inside


def _all_null(file: Any, leaf: int) -> bool:
    """Whether a column has no value at all, as the file itself says."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    columns = [group.column(leaf) for group in groups]
    known = [column.statistics for column in columns if column.is_stats_set]
    nulls = sum(each.null_count for each in known if each.has_null_count)
    return nulls == sum(column.num_values for column in columns)


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether there are pictures or other media in a type, rather than texts alone."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _rows(
    batch: pa.RecordBatch, kind: str, path: Path, start: int, inside: Mapping[str, bool]
) -> Iterator[dict[str, Any]]:
    media = {
        field.name: batch.column(field.name)
        for field in batch.schema
        if field.name in inside or _has_bytes(field.type)
    }
    for name in media.keys() & set(_LISTS_OF_DICTS):
        raise DPAError(f"data file {path} has pictures inside of {name!r}; put them into 'images'.")
    found = {name: _pictures(column, inside.get(name)) for name, column in media.items()}
    plain = [name for name in batch.schema.names if name not in media]
    for number, row in enumerate(batch.select(plain).to_pylist()):
        for name in _LISTS_OF_DICTS:
            if isinstance(value := row.get(name), dict):
                row[name] = _as_list_of_dicts(value)
        for name, named in found.items():
            if name in _PICTURES:
                row[name] = [
                    in_row(kind, path, start + number, name, i) if each is None else each
                    for i, each in enumerate(named[number])
                ]
            elif set(named[number]) - {""}:  # such as sounds, told of by their column's name
                row[name] = b"..."
        yield row


def _pictures(column: pa.Array, inside: bool | None) -> list[list[str | None]]:
    """Return each row's pictures: None if the row holds the bytes, else the path or "".

    Args:
        column: pictures or lists of them.
        inside: whether the bytes are there, where they were left out; None: as the column says.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        named = iter(_named(column.flatten(), inside))
        lengths = pc.list_value_length(column).to_pylist()
        return [[next(named) for _ in range(length or 0)] for length in lengths]
    valid = pc.is_valid(column).to_pylist()
    return [[name] if ok else [] for name, ok in zip(_named(column, inside), valid, strict=True)]


def _named(values: pa.Array, inside: bool | None) -> list[str | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(values.type):
        return [None if ok else "" for ok in pc.is_valid(values).to_pylist()]
    fields = dict(zip((field.name for field in values.type), values.flatten(), strict=True))
    paths = fields["path"].to_pylist() if "path" in fields else [""] * len(values)
    content = [each for each in fields.values() if _has_bytes(each.type)]
    there = pc.is_valid(content[0]).to_pylist() if content else [inside] * len(values)
    return [None if ok else (path or "") for path, ok in zip(paths, there, strict=True)]


def _as_list_of_dicts(value: dict[str, Any]) -> Any:
    """Turn datasets' dict of lists, such as {"user": [...], "assistant": [...]}, around."""
    lists = list(value.values())
    if not all(isinstance(each, list) for each in lists) or len(set(map(len, lists))) != 1:
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]
