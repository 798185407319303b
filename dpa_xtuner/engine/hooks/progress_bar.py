"""How far a stage is, and how long it will take."""

import time
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows how far a stage is, where a person looks on (a terminal, rank 0).

    On a CPU, where a stage may take minutes or months, one line says so once a step was timed.
    """

    def before_train(self, runner) -> None:
        """Begin where a resumed run begins."""
        self.first = runner.iter
        self.bar = tqdm(
            total=runner.max_iters,
            initial=runner.iter,
            desc=Path(runner.work_dir).name,
            disable=None if is_main_process() else True,  # None: where there is no terminal
        )

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Note when the iteration began."""
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
            f"On this CPU, an optimizer step takes {seconds * counts:.3g} s: about "
            f"{_duration(left)} are left of stage {Path(runner.work_dir).name}"
        )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
