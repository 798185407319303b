"""The optimizer wrapper for bfloat16, and the learning rate's schedule."""

import math
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS
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


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Linear warm-up from 0, then a cosine to 0, over optimizer steps.

    The rates are those of transformers' ``get_cosine_schedule_with_warmup``. MMEngine's own
    schedules move with every micro-batch, so that under accumulation the optimizer's only step of
    a short run would be taken at a rate near 0.

    Args:
        optimizer: an optimizer or MMEngine's wrapper of one.
        end: iterations of the whole stage.
        warmup_steps: optimizer steps of the warm-up, fewer than all.
        accumulative_counts: iterations that make an optimizer step.
        kwargs: of MMEngine's schedulers; ``by_epoch`` has to be false.
    """

    def __init__(self, optimizer, end: int, warmup_steps: int, accumulative_counts: int, **kwargs):
        self.steps = end // accumulative_counts
        self.warmup_steps, self.accumulative_counts = warmup_steps, accumulative_counts
        super().__init__(optimizer, "lr", end=end, **kwargs)

    def _get_value(self) -> list[float]:
        step = self.last_step // self.accumulative_counts
        if step < self.warmup_steps:
            factor = step / self.warmup_steps
        else:
            done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        return [base * factor for base in self.base_values]
