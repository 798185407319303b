"""Batches grouped by length and modality, which can begin in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.registry import DATA_SAMPLERS
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.dataset.samplers.length_grouped import get_length_grouped_indices

NOTHING = -1
"""Stands for no sample, where the last global batch of an epoch is not full."""


@DATA_SAMPLERS.register_module()
class GroupedSampler(LengthGroupedSampler):
    """Stock ``LengthGroupedSampler`` that gives each sample once, and has a place to begin.

    With ``mega_batch_mult=1`` it shuffles and sorts by length within one global batch only. The
    stock sampler fills up the last global batch with samples that were seen before. This one gives
    ``NOTHING`` instead: all ranks take the same number of micro-batches, and the samples that are
    left are spread evenly over them.

    Args:
        *args: as in the stock sampler.
        start: samples of this rank that the next iteration leaves out; later ones are whole. A run
            that resumes sets it (also as an attribute) and loads none of what it skips.
        **kwargs: as in the stock sampler, such as ``length_property="modality_length"``.
    """

    def __init__(self, *args: Any, start: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices, the first ``start`` left out this once."""
        start, self.start = self.start, 0
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.length, self.group_batch_size, generator)
        whole = len(order) // self.total_batch_size * self.total_batch_size
        mine = order[self.rank : whole : self.world_size]
        rest = order[whole + self.rank :: self.world_size]
        last = [NOTHING] * (self.num_samples - len(mine))
        for i, index in enumerate(rest):
            last[i * len(last) // len(rest)] = index
        return iter([*mine, *last][start:])
