"""Batches grouped by length and modality, which can begin in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.registry import DATA_SAMPLERS
from xtuner.dataset.samplers import LengthGroupedSampler


@DATA_SAMPLERS.register_module()
class GroupedSampler(LengthGroupedSampler):
    """Stock `LengthGroupedSampler` with a place to begin.

    With `mega_batch_mult=1` it shuffles and sorts by length within one global batch only.

    Args:
        *args: As in the stock sampler.
        start: Samples of this rank that the next iteration leaves out; later ones are whole. A run
            that resumes sets it (also as an attribute) and loads none of what it skips.
        **kwargs: As in the stock sampler, such as `length_property="modality_length"`.
    """

    def __init__(self, *args: Any, start: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's indices, the first `start` left out this once."""
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)
