"""The model inside its wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmengine.model import is_model_wrapper
from torch import nn

if TYPE_CHECKING:
    from dpa_xtuner.model import DPALLaVAModel, ProxyLLM


def unwrap(model: nn.Module) -> DPALLaVAModel | ProxyLLM:
    """Our model, without what DDP or DeepSpeed and MMEngine put around it."""
    inner: Any = model
    while is_model_wrapper(inner) or not hasattr(inner, "objective"):
        inner = inner.module if hasattr(inner, "module") else inner.model
    return inner
