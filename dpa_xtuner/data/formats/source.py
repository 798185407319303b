"""What a data file turns out to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A recognised data file or folder.

    Attributes:
        format: what it is, for people.
        files: the files that are read.
        items: gives its records one after the other: decoded values, or what is already a
            :class:`dpa_xtuner.data.records.Record` or a :class:`dpa_xtuner.data.problems.Problem`.
        path: the file or folder as it was named.
    """

    format: str
    files: tuple[Path, ...]
    items: Callable[[], Iterator[Any]]
    path: Path = Path()
