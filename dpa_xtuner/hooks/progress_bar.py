"""A progress bar beside the log."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows how far a stage is, where a person looks on (a terminal, rank 0)."""

    def before_train(self, runner) -> None:
        """Begin where a resumed run begins."""
        self.bar = tqdm(
            total=runner.max_iters,
            initial=runner.iter,
            desc=Path(runner.work_dir).name,
            disable=None if is_main_process() else True,  # None: where there is no terminal
        )

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count an iteration."""
        self.bar.update()

    def after_train(self, runner) -> None:
        """Leave the full bar."""
        self.bar.close()
