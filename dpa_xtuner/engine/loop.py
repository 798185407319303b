"""The train loop: XTuner's, which goes on where it stopped without loading what it has seen."""

from collections.abc import Iterator
from typing import Any, cast

from mmengine.registry import LOOPS
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader
from xtuner.engine.runner import TrainLoop


@LOOPS.register_module()
class DPATrainLoop(TrainLoop):
    """XTuner's loop; on resuming, the sampler skips what was trained on.

    The stock loop loads every batch that was trained on, images included, to throw it
    away, which takes hours at iteration 100,000.
    """

    def run(self):
        """Train from the current iteration to the last."""
        if self._iter:
            self.dataloader_iterator = _after(self.dataloader, self._iter)
        return super().run()


def _after(dataloader: DataLoader, done: int) -> Iterator[dict | None]:
    for _ in range(done):  # the stock loop takes and drops these
        yield None
    epoch, batches = divmod(done, len(dataloader))
    sampler: Any = dataloader.sampler  # such as our GroupedSampler
    sampler.set_epoch(epoch)
    sampler.start = batches * cast("int", dataloader.batch_size)
    iterator = _InfiniteDataloaderIterator(dataloader)
    iterator._epoch = epoch
    yield from iterator
