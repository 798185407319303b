"""The optimizer: bfloat16 autocast, the schedule, learning rates and decays of components."""

import logging
import math
from contextlib import contextmanager
from inspect import signature

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, _ParamScheduler
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
)
from torch import nn

from dpa_xtuner.errors import nearest
from dpa_xtuner.stages.components import COMPONENTS


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Trains float32 weights under bfloat16 autocast, on any device.

    MMEngine's ``AmpOptimWrapper`` refuses CPUs and scales the loss, which bfloat16 does
    not need.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the forward pass under autocast; don't synchronise gradients while accumulating."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Linear warm-up from 0, then a cosine to 0, over optimizer steps.

    The rates are those of transformers' ``get_cosine_schedule_with_warmup``. MMEngine's own
    schedules move with every micro-batch: under accumulation, a run of a single optimizer step
    would take it at a rate near 0.

    Args:
        optimizer: an optimizer or MMEngine's wrapper of one.
        end: iterations of the whole stage.
        warmup_steps: optimizer steps of the warm-up, fewer than all.
        accumulative_counts: iterations that make an optimizer step.
        kwargs: other arguments of MMEngine's schedulers; ``by_epoch`` must be false.
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


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's, with learning rates for components and no weight decay on norms and biases.

    As in LLaVA, one-dimensional parameters (norms and biases) don't decay, unless
    ``paramwise_cfg`` sets their decay. MMEngine's own ``norm_decay_mult`` does not know RMSNorm,
    and its ``flat_decay_mult`` treats every weight that ZeRO-3 has partitioned as one-dimensional.
    Tied weights are added once, and parameters with the same options share a group.

    Args:
        optim_wrapper_cfg: as MMEngine's.
        paramwise_cfg: as MMEngine's. In addition, ``projector_lr`` is the base learning rate of the
            projector, to which multipliers such as ``lr_mult`` apply, and likewise
            ``visual_encoder_lr``.
    """

    base_lr: float | None
    base_wd: float | None

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options = {"bypass_duplicate": True, **(paramwise_cfg or {})}
        self.rates = {c.module: options.pop(c.rate, None) for c in COMPONENTS if c.rate is not None}
        self.flat_decay_mult = options.pop("flat_decay_mult", 0.0)
        options["custom_keys"] = {
            key: {**given, _DECAY_UNSET: not set(given) & {"decay_mult", "weight_decay"}}
            for key, given in options.get("custom_keys", {}).items()
        }
        super().__init__(optim_wrapper_cfg, options)
        if self.base_wd is None:  # the optimizer's own default, which is above 0 in AdamW
            optimizer = OPTIMIZERS.get(self.optimizer_cfg["type"])
            default = signature(optimizer).parameters.get("weight_decay")
            self.base_wd = default.default if default is not None else None

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module=None
    ) -> None:
        """Add the parameters of ``module``, one group for each set of options.

        Args:
            params: the groups; extended in place.
            module: its parameters are added.
            prefix: its name in the model; empty for the model itself.
            is_dcn_module: as in MMEngine.
        """
        if prefix:
            self._add_module(params, module, prefix, is_dcn_module)
            return
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel(logging.ERROR)  # MMEngine logs a line for each option of each parameter
        try:
            super().add_params(params, module, prefix, is_dcn_module)
        finally:
            logger.setLevel(level)
        for group in params:
            self._set_decay(group)
        params[:] = _merged_groups(params)
        self._report(params, module)

    def _add_module(self, params: list[dict], module: nn.Module, prefix: str, dcn) -> None:
        rate = self.rates.get(prefix)
        if rate is None:
            super().add_params(params, module, prefix, dcn)
            return
        first, usual = len(params), self.base_lr
        self.base_lr = rate
        super().add_params(params, module, prefix, dcn)
        self.base_lr = usual
        for group in params[first:]:
            group.setdefault("lr", rate)

    def _set_decay(self, group: dict) -> None:
        unset = group.pop(_DECAY_UNSET, "weight_decay" not in group)
        (parameter,) = group["params"]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: before ZeRO-3 split it
        if unset and len(shape) <= 1 and self.base_wd:
            group["weight_decay"] = self.base_wd * self.flat_decay_mult

    def _report(self, params: list[dict], module: nn.Module) -> None:
        lines = [
            f"  {len(group['params'])} parameters: lr {group.get('lr', self.base_lr):g}, "
            f"weight decay {group.get('weight_decay', self.base_wd) or 0:g}"
            for group in params
        ]
        print_log("Parameter groups of the optimizer:\n" + "\n".join(lines), "current")
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        modules = {name.split(".")[0] for name in names}
        for key in self.paramwise_cfg["custom_keys"]:
            if not any(key in name for name in names):
                print_log(
                    f"paramwise_cfg.custom_keys: this stage trains no parameter with {key!r} in "
                    f"its name{nearest(key, modules)}",
                    "current",
                    logging.WARNING,
                )


_DECAY_UNSET = "decay_unset"


def _merged_groups(groups: list[dict]) -> list[dict]:
    """Merge groups with equal options: hundreds of groups cost time in every step."""
    merged: dict[str, dict] = {}
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        same = merged.setdefault(repr(sorted(options.items())), {"params": [], **options})
        same["params"] += group["params"]
    return list(merged.values())
