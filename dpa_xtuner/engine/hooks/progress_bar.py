"""Shows how far a stage is, and how long it will take."""

import time
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows the progress of a stage in a terminal, on rank 0.

    On a CPU, a stage may take minutes or months: one line gives an estimate after the first steps.
    """

    def before_train(self, runner) -> None:
        """Start the bar at the first iteration of this run."""
        self.first = runner.iter
        self.bar = tqdm(
            total=runner.max_iters,
            initial=runner.iter,
            desc=Path(runner.work_dir).name,
            disable=None if is_main_process() else True,  # None: where there is no terminal
        )

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Start the clock of the iteration."""
        self.began = time.monotonic()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count an iteration."""
        self.bar.update()
        # The first one is slower: it allocates, and compiles kernels.
        if batch_idx == min(self.first + 1, runner.max_iters - 1):
            self._estimate(runner, batch_idx)

    def after_train(self, runner) -> None:
        """Leave the full bar."""
        self.bar.close()

    def _estimate(self, runner, batch_idx: int) -> None:
        if torch.cuda.is_available() or not is_main_process():
            return
        seconds = time.monotonic() - self.began
        counts = runner.cfg.param_scheduler[0].accumulative_counts
        left = (runner.max_iters - batch_idx - 1) * seconds
        runner.logger.info(
            f"On this CPU, an optimizer step takes {seconds * counts:.3g} s. Time left of stage "
            f"{Path(runner.work_dir).name}: about {timedelta(seconds=round(left))}"
        )
