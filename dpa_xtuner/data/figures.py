"""What is in a data file, in figures: lengths, answers, pictures, scripts, duplicates."""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.data.dataset import DPADataset
from dpa_xtuner.data.store import TokenStore

_BINS = 8  # of the histogram of lengths, each of the same width
_BAR = 30  # characters of its longest bar
_READ = 500  # samples whose answers are read for their scripts, evenly spread
_COMMON_SCRIPTS = 4


@dataclass(frozen=True)
class FileFigures:
    """A data file in figures; as a string, some lines of text.

    Attributes:
        file: as in the config.
        format: what kind of file it is.
        records: number of records, usable or not.
        samples: usable ones.
        pictures: pictures that these name.
        truncated: samples whose end is cut off.
        lengths: (edges (B + 1,), counts (B,)) of the histogram of tokens, images expanded.
        answers: shortest, median and longest supervised part, in tokens.
        scripts: script of the answers' letters -> share of them.
        duplicates: samples with the tokens and pictures of an earlier one.
        notes: what is special about usable records: kind -> number and first ids.
    """

    file: str
    format: str
    records: int
    samples: int
    pictures: int
    truncated: int
    lengths: tuple[np.ndarray, np.ndarray]
    answers: tuple[int, int, int]
    scripts: dict[str, float]
    duplicates: int
    notes: dict[str, tuple[int, list[str]]]

    def __str__(self) -> str:
        """Return the lines."""
        shortest, median, longest = self.answers
        scripts = ", ".join(f"{name} {share:.0%}" for name, share in self.scripts.items())
        cut = f"{self.truncated / self.samples:.1%}"
        lines = [
            f"{self.file}: {self.format}",
            f"{self.records:>8}  records, {self.samples} usable, with {self.pictures} pictures",
            f"{self.duplicates:>8}  samples that an earlier one equals",
            f"{self.truncated:>8}  samples cut off at their end ({cut})",
            f"{'':>10}answers of {shortest} to {longest} tokens, median {median}",
            f"{'':>10}letters of the answers: {scripts or 'none'}",
        ]
        for kind, (count, ids) in self.notes.items():
            more = ", ..." if count > len(ids) else ""
            lines.append(f"{count:>8}  records with {kind}: {', '.join(ids)}{more}")
        lines.append(f"{'':>10}tokens of a sample, images included:")
        edges, counts = self.lengths
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            bar = "#" * round(_BAR * count / counts.max())
            lines.append(f"{'':>10}{low:>6} to {high - 1:<6} {count:>8}  {bar}".rstrip())
        return "\n".join(lines)


def file_figures(dataset: DPADataset, tokenizer: Any) -> list[FileFigures]:
    """Count what is in each file of a data set that holds all samples.

    Args:
        dataset: the data set.
        tokenizer: that it was made by.
    """
    return [
        _figures(str(file), store, tokenizer)
        for file, store in zip(dataset.files, dataset.stores, strict=True)
    ]


def _figures(file: str, store: TokenStore, tokenizer: Any) -> FileFigures:
    arrays = store.arrays
    starts = np.cumsum(arrays["counts"], dtype=np.int64) - arrays["counts"]
    answers = np.add.reduceat(arrays["supervised"].astype(np.int32), starts)
    lengths = np.abs(arrays["lengths"])
    width = -(-(int(np.ptp(lengths)) + 1) // _BINS)
    edges = int(lengths.min()) + np.arange(_BINS + 1) * width
    return FileFigures(
        file=file,
        format=store.format,
        records=store.records,
        samples=len(store),
        pictures=int((arrays["tokens"] == IMAGE_TOKEN_INDEX).sum()),
        truncated=int(arrays["truncated"].sum()),
        lengths=(edges, np.histogram(lengths, edges)[0]),
        answers=(int(answers.min()), int(np.median(answers)), int(answers.max())),
        scripts=_scripts(store, tokenizer),
        duplicates=len(store) - len({_content(store, i) for i in range(len(store))}),
        notes=store.notes,
    )


def _content(store: TokenStore, index: int) -> int:
    tokens, _ = store.tokens(index)
    return hash((tokens.tobytes(), *store.names(index)[1]))


def _scripts(store: TokenStore, tokenizer: Any) -> dict[str, float]:
    """Return the scripts of the answers' letters, by the first word of their Unicode names."""
    letters: Counter[str] = Counter()
    for index in np.unique(np.linspace(0, len(store) - 1, _READ, dtype=np.int64)).tolist():
        tokens, supervised = store.tokens(index)
        text = tokenizer.decode(tokens[supervised].tolist(), skip_special_tokens=True)
        letters.update(
            unicodedata.name(letter, "other").split()[0].lower()
            for letter in text
            if letter.isalpha()
        )
    total = max(1, letters.total())
    return {name: count / total for name, count in letters.most_common(_COMMON_SCRIPTS)}
