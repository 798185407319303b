"""Hooks, one a file."""

from dpa_xtuner.hooks.contrast_cache import ContrastCacheHook
from dpa_xtuner.hooks.global_normalization import GlobalNormalizationHook
from dpa_xtuner.hooks.iteration_seed import IterationSeedHook
from dpa_xtuner.hooks.progress_bar import ProgressBarHook
from dpa_xtuner.hooks.proxy_llm import ProxyLLMHook
from dpa_xtuner.hooks.skipped_samples import SkippedSamplesHook

__all__ = [
    "ContrastCacheHook",
    "GlobalNormalizationHook",
    "IterationSeedHook",
    "ProgressBarHook",
    "ProxyLLMHook",
    "SkippedSamplesHook",
]
