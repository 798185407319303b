"""Records that can't be trained on: how they are told of, and how many are too many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpa_xtuner.data.records import Record
from dpa_xtuner.errors import DPAError


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that can't be trained on.

    Attributes:
        record_id: the record's id.
        reason: "kind" or "kind: details"; problems are counted by kind.
        image: path of the image whose size could not be read; None for any other problem.
        position: the record's place among all that the data file gives, from 0.
        file: the file that it is in; "" for the data file itself, in a store.
        number: its place in that file, where the data file names several; None elsewhere.
    """

    record_id: str
    reason: str
    image: str | None = None
    position: int = 0
    file: str = ""
    number: int | None = None

    @classmethod
    def of(cls, record: Record, reason: str, image: str | None = None) -> "Problem":
        """Say what is wrong with a record that could be read."""
        return cls(record.id, reason, image, record.position)

    @property
    def place(self) -> int:
        """The record's place in its file, from 0."""
        return self.position if self.number is None else self.number

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(": ")[0]


class NothingUsableError(DPAError):
    """No record of a data file can be used.

    Attributes:
        problems: what is wrong with the records of all files of the data set.
        files: these files.
    """

    def __init__(self, message: str, problems: list[Problem], files: Sequence[str | Path]) -> None:
        super().__init__(message)
        self.problems, self.files = problems, files


def list_problems(problems: Iterable[Problem]) -> str:
    """Write a line for each kind of problem: its count, the first 10 ids, the first details."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda pair: -len(pair[1])):
        ids = ", ".join(problem.record_id for problem in found[:10])
        more = ", ..." if len(found) > 10 else ""
        lines.append(f"{len(found):>8}  {kind}: {ids}{more}")
        if found[0].reason != kind:
            lines.append(f"{'':>10}first: {found[0].reason}")
    return "\n".join(lines)


def enforce_skip_limit(
    problems: list[Problem], total: int, limit: float, files: Sequence[str | Path]
) -> None:
    """Stop if too many records can't be used.

    Args:
        problems: what is wrong with them.
        total: number of records that they were found among.
        limit: fraction of the records that may be left out, 0 to 1.
        files: where the records are, for the message.

    Raises:
        DPAError: there are more; the message lists the counts and the first ids of each kind.
    """
    if len(problems) > limit * total:
        raise DPAError(
            f"{len(problems)} of {total} records of {', '.join(map(str, files))} cannot be used, "
            f"more than skip_limit={limit:g} allows; mend or remove them, or raise skip_limit:\n"
            f"{list_problems(problems)}"
        )
