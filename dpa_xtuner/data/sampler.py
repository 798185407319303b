"""Batches grouped by length and modality, which can begin in the middle of an epoch."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from mmengine.registry import DATA_SAMPLERS
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.dataset.samplers.length_grouped import get_length_grouped_indices

NOTHING = -1
"""Stands for no sample, where a micro-batch is not full."""


@DATA_SAMPLERS.register_module()
class GroupedSampler(LengthGroupedSampler):
    """Stock ``LengthGroupedSampler`` that gives each sample once, and has a place to begin.

    With ``mega_batch_mult=1`` it shuffles and sorts by length within one global batch only. The
    stock sampler fills up the last global batch with samples that were seen before. This one gives
    ``NOTHING`` instead: all ranks take the same number of micro-batches, and the samples that are
    left are spread evenly over them.

    The stock sampler deals the samples of a global batch to the ranks one by one. With
    ``micro_batch_size``, :func:`deal` does, so that all ranks have about as many tokens. The
    global batches stay the same.

    Args:
        dataset: as in the stock sampler.
        per_device_batch_size: samples of a rank in a global batch, on average.
        *args: as in the stock sampler.
        start: entries of this rank that the next iteration leaves out; later ones are whole. A run
            that resumes sets it (also as an attribute) and loads none of what it skips.
        micro_batch_size: samples in a micro-batch, on average. None deals them one by one.
        most: samples in the largest micro-batch, if ``micro_batch_size`` is given. Smaller ones are
            filled up with ``NOTHING``: the data loader's ``batch_size`` has to be the same.
        **kwargs: as in the stock sampler, such as ``length_property="modality_length"``.
    """

    def __init__(
        self,
        dataset: Any,
        per_device_batch_size: int,
        *args: Any,
        start: int = 0,
        micro_batch_size: int | None = None,
        most: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, per_device_batch_size, *args, **kwargs)
        self.start, self.micro_batch_size, self.most = start, micro_batch_size, most
        if micro_batch_size is not None:
            self._counts = per_device_batch_size // micro_batch_size  # micro-batches of a step
            steps = -(-len(dataset) // self.total_batch_size)
            self.num_samples = steps * self._counts * most

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices, the first ``start`` left out this once."""
        start, self.start = self.start, 0
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.length, self.group_batch_size, generator)
        given = self._one_by_one(order) if self.micro_batch_size is None else self._dealt(order)
        return islice(given, start, None)

    def _one_by_one(self, order: list[int]) -> Iterator[int]:
        whole = len(order) // self.total_batch_size * self.total_batch_size
        mine = order[self.rank : whole : self.world_size]
        rest = order[whole + self.rank :: self.world_size]
        last = [NOTHING] * (self.num_samples - len(mine))
        for i, index in enumerate(rest):
            last[i * len(last) // len(rest)] = index
        return iter([*mine, *last])

    def _dealt(self, order: list[int]) -> Iterator[int]:
        for first in range(0, len(order), self.total_batch_size):
            batch = order[first : first + self.total_batch_size]
            lengths = [abs(self.length[index]) for index in batch]
            for micro_batch in deal(lengths, self.world_size, self._counts, self.most)[self.rank]:
                yield from (batch[i] for i in micro_batch)
                yield from [NOTHING] * (self.most - len(micro_batch))


def deal(lengths: Sequence[int], ranks: int, counts: int, most: int) -> list[list[list[int]]]:
    """Cut a global batch into micro-batches of about as many padded tokens, and deal these.

    A micro-batch is padded to its longest sample, so it holds samples of similar length: many
    short ones or few long ones. None has more padded tokens than the longest samples had in
    micro-batches of equal numbers. Of micro-batches whose numbers differ and of equal ones, those
    are taken with which the step is shorter. ``normalize="global"`` makes the cut irrelevant to the
    objective.

    Args:
        lengths: tokens of the samples.
        ranks: number of ranks.
        counts: micro-batches of each rank.
        most: samples in the largest micro-batch.

    Returns:
        Of each rank its micro-batches, as places in ``lengths``. One is empty only if there are
        fewer samples than micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    fewest = -(-len(order) // (ranks * counts))
    ways = [
        _assign(_cut(order, lengths, ranks * counts, size), lengths, ranks)
        for size in dict.fromkeys((fewest, most))
    ]
    return min(ways, key=lambda way: _duration(way, lengths))


def _padded(micro_batch: list[int], lengths: Sequence[int]) -> int:
    return len(micro_batch) * lengths[micro_batch[0]] if micro_batch else 0  # the longest is first


def _cut(order: list[int], lengths: Sequence[int], count: int, most: int) -> list[list[int]]:
    """Cut samples, the longest first, into ``count`` micro-batches of the least padded tokens."""

    def cut(tokens: int) -> list[list[int]]:
        found, i = [], 0
        while i < len(order):
            size = min(most, tokens // lengths[order[i]])
            found.append(order[i : i + size])
            i += size
        return found

    longest = lengths[order[0]]
    bounds = range(longest, most * longest + 1)  # the last one always suffices
    found = cut(bounds[bisect_left(bounds, True, key=lambda tokens: len(cut(tokens)) <= count)])
    while len(found) < min(count, len(order)):  # leave no rank without a sample
        largest = max(found, key=lambda part: (len(part) > 1, _padded(part, lengths)))
        found.remove(largest)
        found += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return found + [[]] * (count - len(found))


def _assign(
    micro_batches: list[list[int]], lengths: Sequence[int], ranks: int
) -> list[list[list[int]]]:
    """Give each rank one of the largest, then one of the next, the largest to who has least.

    So micro-batches that run at the same time are alike (ZeRO-2 and 3 wait after each one), and
    the ranks' sums are alike too (others wait at the end of the step).
    """
    largest_first = sorted(micro_batches, key=lambda part: _padded(part, lengths), reverse=True)
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for first in range(0, len(largest_first), ranks):
        least_first = sorted(range(ranks), key=lambda rank: sums[rank])
        for rank, part in zip(least_first, largest_first[first : first + ranks], strict=True):
            dealt[rank].append(part)
            sums[rank] += _padded(part, lengths)
    return dealt


def _duration(dealt: list[list[list[int]]], lengths: Sequence[int]) -> int:
    """Add up a step's padded tokens, if ranks wait at its end and after each micro-batch."""
    tokens = [[_padded(part, lengths) for part in parts] for parts in dealt]
    return max(map(sum, tokens)) + sum(map(max, zip(*tokens, strict=True)))
