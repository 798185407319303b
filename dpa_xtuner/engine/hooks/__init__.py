"""Hooks, one a file; importing them registers them."""

from dpa_xtuner.engine.hooks.contrast_cache import ContrastCacheHook
from dpa_xtuner.engine.hooks.hand_over import HandOverHook
from dpa_xtuner.engine.hooks.held_out import HeldOutHook
from dpa_xtuner.engine.hooks.iteration_seed import IterationSeedHook
from dpa_xtuner.engine.hooks.leakage import LeakageHook
from dpa_xtuner.engine.hooks.optimizer_step import OptimizerStepHook
from dpa_xtuner.engine.hooks.progress_bar import ProgressBarHook
from dpa_xtuner.engine.hooks.skipped_samples import SkippedSamplesHook
