"""Counts the samples that training had to leave out, and stops at too many."""

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dpa_xtuner.errors import DPAError


@HOOKS.register_module()
class SkippedSamplesHook(Hook):
    """Warn about each skipped sample; stop where they are more than ``limit`` of the data.

    Args:
        limit: share of a rank's samples of one epoch.
    """

    def __init__(self, limit: float = 0.01):
        self.limit = limit
        self.skipped: dict[str, str] = {}

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count what the batch says it lacks.

        Raises:
            DPAError: more than the limit, with the list.
        """
        for sample, reason in data_batch["data"]["skipped"]:
            runner.logger.warning(f"Skipped sample {sample}: {reason}")
            self.skipped[sample] = reason
        allowed = self.limit * len(runner.train_dataloader.dataset) / get_world_size()
        if len(self.skipped) > allowed:
            listed = "\n".join(f"  {sample}: {reason}" for sample, reason in self.skipped.items())
            raise DPAError(
                f"{len(self.skipped)} samples had to be skipped, more than {self.limit:.0%} of the "
                f"data:\n{listed}\nCheck the data with tools/check_data.py."
            )

    def after_train(self, runner) -> None:
        """Say how many there were."""
        if self.skipped:
            runner.logger.warning(f"{len(self.skipped)} samples were skipped in this run.")
