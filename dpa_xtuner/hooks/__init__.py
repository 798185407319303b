"""Hooks, one a file."""

from dpa_xtuner.hooks.contrast_cache import ContrastCacheHook
from dpa_xtuner.hooks.hand_over import HandOverHook
from dpa_xtuner.hooks.held_out import HeldOutHook
from dpa_xtuner.hooks.iteration_seed import IterationSeedHook
from dpa_xtuner.hooks.optimizer_step import OptimizerStepHook
from dpa_xtuner.hooks.progress_bar import ProgressBarHook
from dpa_xtuner.hooks.skipped_samples import SkippedSamplesHook

__all__ = [
    "ContrastCacheHook",
    "HandOverHook",
    "HeldOutHook",
    "IterationSeedHook",
    "OptimizerStepHook",
    "ProgressBarHook",
    "SkippedSamplesHook",
]
