"""The optimizer wrapper for bfloat16, and which parameters have rates and decays of their own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from dpa_xtuner.errors import nearest


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


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's, with a learning rate for the projector and no weight decay on norms and biases.

    As in LLaVA, parameters of one dimension (norms and biases) don't decay, unless
    ``paramwise_cfg`` says how they do. MMEngine's own ``norm_decay_mult`` does not know RMSNorm,
    and its ``flat_decay_mult`` takes every weight that ZeRO-3 has partitioned for one-dimensional.
    Tied weights are added once, and parameters with the same options share a group.

    Args:
        optim_wrapper_cfg: as MMEngine's.
        paramwise_cfg: as MMEngine's. In addition, ``projector_lr`` is the base learning rate of the
            projector, which multipliers such as ``lr_mult`` apply to.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        options = {"bypass_duplicate": True, **(paramwise_cfg or {})}
        self.projector_lr = options.pop("projector_lr", None)
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
        """Add the parameters of ``module``, in as few groups as there are different options.

        Args:
            params: the groups; extended in place.
            module: whose parameters are added.
            prefix: its name in the model; empty for the model itself.
            is_dcn_module: MMEngine's.
        """
        if prefix:
            self._add_part(params, module, prefix, is_dcn_module)
            return
        with _quiet():  # MMEngine logs a line for each option of each parameter
            super().add_params(params, module, prefix, is_dcn_module)
        for group in params:
            self._set_decay(group)
        params[:] = _merged(params)
        self._report(params, module)

    def _add_part(self, params: list[dict], module: nn.Module, prefix: str, dcn) -> None:
        if prefix != "projector" or self.projector_lr is None:
            super().add_params(params, module, prefix, dcn)
            return
        first, usual = len(params), self.base_lr
        self.base_lr = self.projector_lr
        super().add_params(params, module, prefix, dcn)
        self.base_lr = usual
        for group in params[first:]:
            group.setdefault("lr", self.projector_lr)

    def _set_decay(self, group: dict) -> None:
        unset = group.pop(_DECAY_UNSET, "weight_decay" not in group)
        (parameter,) = group["params"]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the real one there
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
        parts = {name.split(".")[0] for name in names}
        for key in self.paramwise_cfg["custom_keys"]:
            if not any(key in name for name in names):
                print_log(
                    f"paramwise_cfg.custom_keys: {key!r} is in the name of no parameter that this "
                    f"stage trains{nearest(key, parts)}",
                    "current",
                    logging.WARNING,
                )


_DECAY_UNSET = "decay_unset"


def _merged(groups: list[dict]) -> list[dict]:
    """The groups of equal options as one: hundreds of them cost time in every step."""
    merged: list[dict] = []
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        for other in merged:
            if {key: value for key, value in other.items() if key != "params"} == options:
                other["params"] += group["params"]
                break
        else:
            merged.append({**group, "params": list(group["params"])})
    return merged


@contextmanager
def _quiet() -> Iterator[None]:
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
