"""The model inside its wrappers."""

from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn

from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.proxy_llm import ProxyLLM


def unwrap(model: nn.Module) -> DPALLaVAModel | ProxyLLM:
    """Our model, without what DDP or DeepSpeed and MMEngine put around it."""
    inner: Any = model
    while is_model_wrapper(inner) or not hasattr(inner, "objective"):
        inner = inner.module if hasattr(inner, "module") else inner.model
    return inner
