"""The model inside its wrappers."""

from mmengine.model import is_model_wrapper
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Our model, without what DDP or DeepSpeed and MMEngine put around it."""
    while is_model_wrapper(model) or not hasattr(model, "objective"):
        model = model.module if hasattr(model, "module") else model.model
    return model
