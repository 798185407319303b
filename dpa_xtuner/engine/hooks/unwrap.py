"""Finds the model inside its wrappers."""

from typing import Any

import torch
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from torch import nn

from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.proxy_llm import ProxyLLM


def unwrap(model: nn.Module) -> DPALLaVAModel | ProxyLLM:
    """Return our model without the wrappers of DDP, DeepSpeed and MMEngine."""
    inner: Any = model
    while is_model_wrapper(inner) or not hasattr(inner, "objective"):
        inner = inner.module if hasattr(inner, "module") else inner.model
    return inner


def autocast(runner) -> torch.autocast:
    """Return the context in which a hook lets the runner's model compute."""
    plain = not hasattr(runner, "strategy")  # DeepSpeed's weights have the run's dtype already
    return unwrap(runner.model).precision.autocast(get_device(), enabled=plain)
