"""Which samples of which files an epoch is made of.

The records of all files form one list, which a fixed seed shuffles once. Its first ``held_out`` are
kept out of training, whatever the other settings say. Of the rest, the first ``share`` are trained
on, so that a smaller share is part of a larger one. Records are drawn rather than usable samples:
formats that cannot use the same ones (a text without its image, a caption that is cut off) still
agree on the others.

Without weights, an epoch holds each of these N samples once. With weights, it has N samples too, of
which file i gives N * weights[i] / sum(weights): all of its samples as often as they fit in whole,
and of the remaining number the first ones in the shuffled order. So a file of little weight gives
the same part of its samples in every epoch, and a file of much weight gives some of them once more
than others. Held-out samples are never weighted.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dpa_xtuner.errors import DPAError


def choose(
    positions: Sequence[np.ndarray],
    records: Sequence[int],
    held_out: int = 0,
    split: Literal["train", "held_out"] = "train",
    share: float = 1.0,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Choose the samples of a data set.

    Args:
        positions: per file, (S_i,): the place of each usable sample's record among its records.
        records: per file, the number of its records, usable or not.
        held_out: records that are kept out of training.
        split: "train", or "held_out" for these.
        share: fraction of the other records that is trained on, above 0 and at most 1.
        weights: per file, its part of an epoch relative to the others', above 0.

    Returns:
        (S,) int64, places in the list of all files' samples, file after file. A sample that is seen
        twice in an epoch is there twice.

    Raises:
        DPAError: a weighted file has nothing to give.
    """
    total = sum(records)
    rank = np.empty(total, np.int64)  # of each record in the shuffled order
    rank[np.random.default_rng(0).permutation(total)] = np.arange(total)
    starts = np.cumsum([0, *records[:-1]])
    drawn = rank[np.concatenate([p + start for p, start in zip(positions, starts, strict=True)])]
    end = held_out + round(share * max(total - held_out, 0))
    first, last = {"held_out": (0, held_out), "train": (held_out, end)}[split]
    rows = np.flatnonzero((drawn >= first) & (drawn < last))
    if weights is None or split == "held_out":
        return rows
    ends = np.cumsum([len(p) for p in positions])
    files = np.split(rows, np.searchsorted(rows, ends[:-1]))
    counts = _apportion(len(rows), weights)
    epoch = []
    for i, (file, count) in enumerate(zip(files, counts, strict=True)):
        if not len(file) or not count:
            raise DPAError(
                f"weights is {list(weights)}: file {i + 1} of {len(files)} gives {count} of an "
                f"epoch's {len(rows)} samples and has {len(file)}; leave it out, or change its "
                "weight."
            )
        times, rest = divmod(count, len(file))
        once_more = file[np.argsort(drawn[file])[:rest]]
        epoch.append(np.sort(np.concatenate([np.tile(file, times), once_more])))
    return np.concatenate(epoch)


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split a whole number by weights, the remainder to those that miss most by rounding down."""
    exact = total * np.array(weights, float) / math.fsum(weights)
    counts = np.floor(exact).astype(int)
    most_missed = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[most_missed] += 1
    return counts.tolist()
