"""Batches grouped by length and modality, which can begin in the middle of an epoch."""

import math
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

FEW = 16
"""Samples of a rank in a step, up to which they are too few to be cut evenly at every moment."""
WINDOW = 16
"""Steps that exchange samples where they are too few: more hardly gain anything."""


@DATA_SAMPLERS.register_module()
class GroupedSampler(LengthGroupedSampler):
    """Stock ``LengthGroupedSampler`` that gives each sample once, and has a place to begin.

    With ``mega_batch_mult=1`` it shuffles and sorts by length within one global batch only. The
    stock sampler fills up the last global batch with samples that were seen before. This one gives
    ``NOTHING`` instead: all ranks take the same number of micro-batches, and the samples that are
    left are spread evenly over them.

    The stock sampler deals the samples of a global batch to the ranks one by one. With
    ``micro_batch_size``, :func:`deal` does, so that all ranks have about as many tokens. The
    global batches stay the same, except where ranks wait after each micro-batch and a rank takes
    at least 4 of them with at most ``FEW`` samples in a step. There, steps exchange samples, so
    that those of one length run at the same time.

    Args:
        dataset: as in the stock sampler.
        per_device_batch_size: samples of a rank in a global batch, on average.
        *args: as in the stock sampler.
        start: entries of this rank that the next iteration leaves out; later ones are whole. A run
            that resumes sets it (also as an attribute) and loads none of what it skips.
        micro_batch_size: samples in a micro-batch, on average. None deals them one by one.
        most: samples in the largest micro-batch, if ``micro_batch_size`` is given. Smaller ones are
            filled up with ``NOTHING``: the data loader's ``batch_size`` has to be the same.
        wait_each: whether the ranks wait for each other after each micro-batch (ZeRO-2 and 3), and
            not only at the end of a step.
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
        wait_each: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, per_device_batch_size, *args, **kwargs)
        self.start, self.micro_batch_size, self.most = start, micro_batch_size, most
        self.wait_each, self._few = wait_each, per_device_batch_size <= FEW
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
        if self.micro_batch_size is None:
            return islice(self._one_by_one(order), start, None)
        if self.wait_each and self._few and self._counts >= 4:
            order = self._exchanged(order, generator)
        steps, start = divmod(start, self._counts * self.most)
        return islice(self._dealt(order[steps * self.total_batch_size :]), start, None)

    def _one_by_one(self, order: list[int]) -> Iterator[int]:
        whole = len(order) // self.total_batch_size * self.total_batch_size
        mine = order[self.rank : whole : self.world_size]
        rest = order[whole + self.rank :: self.world_size]
        last = [NOTHING] * (self.num_samples - len(mine))
        for i, index in enumerate(rest):
            last[i * len(last) // len(rest)] = index
        return iter([*mine, *last])

    def _exchanged(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Let each step hold a few lengths in place of all, and as many tokens as the others.

        Samples are sorted over a window of steps and cut into groups that all ranks take at the
        same time. Each step gets groups whose lengths add up to the same. So a supervised token
        counts as much as in a step of all lengths, which short samples alone would break. The
        first step has the longest sample and stays as it is, and so do those that are not full or
        mix modalities.
        """
        size, width = self.total_batch_size, self.total_batch_size // self._counts
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for images in (True, False):
            alike = [
                place
                for place, batch in enumerate(batches)
                if place and len(batch) == size
                and all((self.length[i] > 0) == images for i in batch)
            ]  # fmt: skip
            shuffled = torch.randperm(len(alike), generator=generator).tolist()
            places = [alike[i] for i in shuffled]
            windows = -(-len(places) // WINDOW)  # of about as many steps
            for window in (places[i::windows] for i in range(windows)):
                pool = [i for place in window for i in batches[place]]
                pool.sort(key=lambda i: abs(self.length[i]), reverse=True)
                groups = [pool[i : i + width] for i in range(0, len(pool), width)]
                tokens = [sum(abs(self.length[i]) for i in group) for group in groups]
                for place, groups_of_step in zip(window, spread(tokens, len(window)), strict=True):
                    batches[place] = [i for group in groups_of_step for i in groups[group]]
        return [i for batch in batches for i in batch]

    def _dealt(self, order: list[int]) -> Iterator[int]:
        for first in range(0, len(order), self.total_batch_size):
            batch = order[first : first + self.total_batch_size]
            lengths = [abs(self.length[index]) for index in batch]
            dealt = deal(lengths, self.world_size, self._counts, self.most, self.wait_each)
            for micro_batch in dealt[self.rank]:
                yield from (batch[i] for i in micro_batch)
                yield from [NOTHING] * (self.most - len(micro_batch))


def deal(
    lengths: Sequence[int], ranks: int, counts: int, most: int, wait_each: bool = False
) -> list[list[list[int]]]:
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
        wait_each: whether ranks wait for each other after each micro-batch; else at the end alone.

    Returns:
        Of each rank its micro-batches, the largest first, as places in ``lengths``. One is empty
        only if there are fewer samples than micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    fewest = -(-len(order) // (ranks * counts))
    ways = []
    for size in dict.fromkeys((fewest, most)):
        parts = _cut(order, lengths, ranks * counts, size)
        tokens = [_padded(part, lengths) for part in parts]
        # What runs at the same time is alike before anything changes places.
        given = spread(tokens, ranks, math.inf if wait_each else 0.005)
        given = [sorted(of_rank, key=lambda part: tokens[part], reverse=True) for of_rank in given]
        rows = [[tokens[part] for part in of_rank] for of_rank in given]
        duration = sum(map(max, zip(*rows, strict=True))) if wait_each else max(map(sum, rows))
        ways.append((duration, [[parts[part] for part in of_rank] for of_rank in given]))
    return min(ways, key=lambda way: way[0])[1]


def spread(costs: Sequence[int], sets: int, enough: float = 0.0) -> list[list[int]]:
    """Spread things over sets of equal numbers, so that the sets cost about the same.

    Each set gets one of the dearest things, then one of the next, and so on; the dearest goes to
    the set that has cost least. Then things of the dearest set change places with cheaper ones.

    Args:
        costs: of the things, a multiple of ``sets``.
        sets: number of sets.
        enough: share of the mean by which the dearest set may cost more than the mean.

    Returns:
        Of each set its things, as places in ``costs``.
    """
    order = sorted(range(len(costs)), key=lambda i: costs[i], reverse=True)
    given: list[list[int]] = [[] for _ in range(sets)]
    sums = [0] * sets
    for first in range(0, len(order), sets):
        cheapest_first = sorted(range(sets), key=lambda other: sums[other])
        for other, thing in zip(cheapest_first, order[first : first + sets], strict=True):
            given[other].append(thing)
            sums[other] += costs[thing]
    bound = sum(costs) / sets * (1 + enough)
    while (high := max(sums)) > bound:
        dearest = sums.index(high)
        for other in sorted(range(sets), key=lambda other: sums[other]):
            # The best exchange moves half of the gap; one that moves none of it or all is no use.
            gap = high - sums[other]
            off, i, j = min(
                (abs(gap - 2 * (costs[a] - costs[b])), i, j)
                for i, a in enumerate(given[dearest])
                for j, b in enumerate(given[other])
            )
            if off < gap:
                a, b = given[dearest][i], given[other][j]
                given[dearest][i], given[other][j] = b, a
                sums[dearest] -= costs[a] - costs[b]
                sums[other] += costs[a] - costs[b]
                break
        else:
            break  # nothing helps
    return given


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
