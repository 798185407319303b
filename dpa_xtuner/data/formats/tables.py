"""CSV and TSV tables whose first row names a column of pictures and one of captions."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dpa_xtuner.data.formats import captions
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError

_LONGEST_FIELD = 1 << 26


def delimiter(header: str) -> str | None:
    """Find what separates the columns of a table by its first row; None for no table."""
    found = "\t" if "\t" in header else ","
    return found if found in header else None


def rows(file: TextIO, path: Path, separator: str) -> Iterator[Any]:
    """Read the rows as dicts; one of another number of fields is a :class:`Problem`.

    Raises:
        DPAError: the first row does not name the columns.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(file, delimiter=separator, strict=True)
    names = [name.strip() for name in next(reader)]
    known = all(set(needed) & set(names) for needed in (captions.IMAGES, captions.CAPTIONS))
    if not known or captions.reserved(names) or len(set(names)) < len(names):
        raise DPAError(
            f"data file {path} is a table without a first row that names a column of pictures "
            f"({', '.join(captions.IMAGES)}) and one of captions ({', '.join(captions.CAPTIONS)}); "
            f"its first row: {', '.join(map(repr, names[:8]))}."
        )
    while True:
        begun = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # an open quote may have swallowed many rows
            for line in range(begun, reader.line_num + 1):
                yield Problem(f"line {line}", f'broken row: {error}; a quote in quotes is ""')
            continue
        if row and [field.strip() for field in row] == names:
            yield Problem(f"line {begun}", "broken row: it is the first row again")
        elif row and len(row) != len(names):
            found = f"{len(row)} fields, the first row names {len(names)}"
            yield Problem(f"line {begun}", f"broken row: {found}")
        elif separator == "\t" and any("\t" in field and "\n" in field for field in row):
            for line in range(begun, reader.line_num + 1):
                yield Problem(f"line {line}", 'broken row: an open quote; a quote in quotes is ""')
        elif row:
            yield dict(zip(names, row, strict=True))
