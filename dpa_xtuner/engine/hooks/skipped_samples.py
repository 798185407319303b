"""Counts the samples that training had to leave out, and stops at too many."""

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dpa_xtuner.errors import DPAError

_INFO = "skipped_samples"


@HOOKS.register_module()
class SkippedSamplesHook(Hook):
    """Warn about each skipped sample of any rank; stop where they are more than ``limit``.

    The list goes with the checkpoints, so that a resumed run goes on counting.

    Args:
        limit: share of the data set.
        interval: iterations between two exchanges between the ranks.
    """

    def __init__(self, limit: float = 0.01, interval: int = 50):
        self.limit, self.interval = limit, interval
        self.new: list[tuple[str, str]] = []
        self.skipped: dict[str, str] = {}

    def before_train(self, runner) -> None:
        """Go on counting where a checkpoint says so."""
        if _INFO in runner.message_hub.runtime_info:
            self.skipped = dict(runner.message_hub.get_info(_INFO))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count what the batch says it lacks.

        Raises:
            DPAError: more than the limit, with the list; on all ranks.
        """
        self.new += data_batch["data"]["skipped"]
        saves = runner.cfg.default_hooks.checkpoint.interval
        due = any(self.every_n_train_iters(runner, n) for n in (self.interval, saves))
        if due or batch_idx + 1 == runner.max_iters:
            self._exchange(runner)

    def after_train(self, runner) -> None:
        """Say how many there were."""
        if self.skipped:
            runner.logger.warning(f"{len(self.skipped)} samples were skipped in this stage.")

    def _exchange(self, runner) -> None:
        for found in all_gather_object(self.new):
            for sample, reason in found:
                runner.logger.warning(f"Skipped sample {sample}: {reason}")
                self.skipped[sample] = reason
        self.new = []
        runner.message_hub.update_info(_INFO, self.skipped)
        total = len(runner.train_dataloader.dataset)
        if len(self.skipped) > self.limit * total:
            listed = "\n".join(f"  {sample}: {reason}" for sample, reason in self.skipped.items())
            raise DPAError(
                f"{len(self.skipped)} of {total} samples had to be skipped, more than "
                f"skip_limit={self.limit:g}:\n{listed}\nCheck the data with tools/check_data.py."
            )
