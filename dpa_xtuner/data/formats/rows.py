"""Rows of Parquet and Arrow files, as Hugging Face's data sets are kept.

A picture in a row is not read here: its place is noted (:mod:`dpa_xtuner.data.places`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.places import in_row, open_table
from dpa_xtuner.errors import DPAError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET = b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # as a file, and as the stream that datasets writes
_ROWS = 256  # taken at a time
_PICTURES = ("image", "images")
_LISTS_OF_DICTS = ("texts", "conversations", "messages")


def parquet(files: tuple[Path, ...]) -> Source:
    """Open Parquet files, one after the other."""

    def items() -> Iterator[dict[str, Any]]:
        """Decode the rows of one file after the other, without the pictures' bytes."""
        for path in files:
            start = 0
            for batch, inside in _parquet_batches(path):
                yield from _rows(batch, "parquet", path, start, inside)
                start += len(batch)

    return Source("Parquet", files, items)


def arrow(files: tuple[Path, ...]) -> Source:
    """Open Arrow files, one after the other."""

    def items() -> Iterator[dict[str, Any]]:
        """Decode the rows of one file after the other."""
        import pyarrow as pa

        for path in files:
            start = 0
            try:
                table = open_table(str(path))
            except (pa.ArrowInvalid, OSError) as error:
                raise DPAError(f"data file {path} is no whole Arrow file: {error}") from None
            for batch in table.to_batches(max_chunksize=_ROWS):
                yield from _rows(batch, "arrow", path, start, {})
                start += len(batch)

    return Source("Arrow", files, items)


def _parquet_batches(path: Path) -> Iterator[tuple[pa.RecordBatch, dict[str, bool]]]:
    """Batches without the pictures' bytes, and for each such column whether there are any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            leaves, unread = _leaves(file)
            inside = {name: not _all_null(file, leaf) for name, leaf in unread.items()}
            for batch in file.iter_batches(_ROWS, columns=leaves, use_threads=False):
                yield batch, inside
    except (pa.ArrowInvalid, OSError) as error:
        raise DPAError(f"data file {path} is no whole Parquet file: {error}") from None


def _leaves(file: Any) -> tuple[list[str], dict[str, str]]:
    """Return the columns to read, and those of pictures' bytes that have a path instead."""
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    found, unread = [], {}
    for field in file.schema_arrow:
        own = [leaf for leaf in leaves if leaf.split(".")[0] == field.name]
        paths = [leaf for leaf in own if leaf.endswith(".path")]
        if _holds_bytes(field.type) and paths:
            found += paths
            unread[field.name] = next(leaf for leaf in own if leaf not in paths)
        else:
            found += own
    return found, unread


def _all_null(file: Any, leaf: str) -> bool:
    """Whether a column has no value at all, as the file itself says."""
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        column = next(
            each
            for each in map(group.column, range(group.num_columns))
            if each.path_in_schema == leaf
        )
        known = column.statistics is not None and column.statistics.has_null_count
        if not known or column.statistics.null_count < column.num_values:
            return False
    return True


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_picture(kind: pa.DataType) -> bool:
    """Whether values are pictures, or lists of them, rather than paths."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    if pa.types.is_struct(kind):  # of which the path may have been read alone
        return {"path", "bytes"} & {kind.field(i).name for i in range(kind.num_fields)} != set()
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _rows(
    batch: pa.RecordBatch, kind: str, path: Path, start: int, inside: Mapping[str, bool]
) -> Iterator[dict[str, Any]]:
    schema = batch.schema
    pictures = [n for n in _PICTURES if n in schema.names and _is_picture(schema.field(n).type)]
    others = [n for n in schema.names if n not in pictures]
    plain = [n for n in others if n not in inside and not _holds_bytes(schema.field(n).type)]
    for name in _LISTS_OF_DICTS:
        if name in others and name not in plain:
            raise DPAError(
                f"data file {path} has pictures inside of {name!r}; put them into 'images'."
            )
    found = {name: _pictures(batch.column(name), inside.get(name)) for name in pictures}
    unread = {
        name: _pictures(batch.column(name), inside.get(name))
        for name in others
        if name not in plain and _is_picture(schema.field(name).type)
    }
    for number, row in enumerate(batch.select(plain).to_pylist()):
        for name in _LISTS_OF_DICTS:
            if isinstance(value := row.get(name), dict):
                row[name] = _as_list_of_dicts(value)
        for name in pictures:
            row[name] = [
                in_row(kind, path, start + number, name, i) if named is None else named
                for i, named in enumerate(found[name][number])
            ]
        # What else has bytes, such as sounds, is told of by its name.
        row.update({name: b"..." for name in unread if set(unread[name][number]) - {""}})
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
    if "bytes" in fields:
        there = pc.is_valid(fields["bytes"]).to_pylist()
    else:
        there = [bool(inside)] * len(values)
    return [None if ok else (path or "") for path, ok in zip(paths, there, strict=True)]


def _as_list_of_dicts(value: dict[str, Any]) -> Any:
    """Turn datasets' dict of lists, such as {"user": [...], "assistant": [...]}, around."""
    lists = list(value.values())
    if not all(isinstance(each, list) for each in lists) or len(set(map(len, lists))) != 1:
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]
