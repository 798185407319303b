"""The optimizer wrapper for bfloat16."""

from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Float32 weights under bfloat16 autocast, on any device.

    MMEngine's ``AmpOptimWrapper`` refuses CPUs and scales the loss, which bfloat16 does
    not need.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Forward pass under autocast, without gradient synchronisation while accumulating."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield
