"""Holds a config against what its constructors declare, before anything is built."""

import copy
import inspect
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine._strategy import BaseStrategy
from mmengine.config.lazy import LazyObject
from mmengine.dist import init_dist
from mmengine.hooks import CheckpointHook
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority
from mmengine.utils import get_object_from_string
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.distributed import Backend, init_process_group
from torch.utils.data import DataLoader

from dpa_xtuner.declared import parameters, problems
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.model.components import COMPONENTS, PROJECTOR

# What a place of a config names a type of. In lists and dicts of such, * stands for any.
_REGISTRIES: dict[str, Registry] = {
    "model": MODELS,
    "train_dataloader.dataset": DATASETS,
    "train_dataloader.sampler": DATA_SAMPLERS,
    "optim_wrapper": OPTIM_WRAPPERS,
    "optim_wrapper.optimizer": OPTIMIZERS,
    "param_scheduler.*": PARAM_SCHEDULERS,
    "train_cfg": LOOPS,
    "default_hooks.*": HOOKS,
    "custom_hooks.*": HOOKS,
    "log_processor": LOG_PROCESSORS,
    "visualizer": VISUALIZERS,
    "visualizer.vis_backends.*": VISBACKENDS,
    "strategy": STRATEGIES,
}
# What a dict without a type is handed to, as keyword arguments.
_CALLS: dict[str, tuple[Callable, ...]] = {
    "randomness": (Runner.set_randomness,),
    "env_cfg": (BaseStrategy._setup_env,),
    "env_cfg.mp_cfg": (set_multi_processing,),
    "env_cfg.dist_cfg": (init_dist, init_process_group),
    "train_dataloader": (DataLoader,),
    "optim_wrapper.clip_grad": (torch.nn.utils.clip_grad_norm_,),
}
# What MMEngine takes out of a dict before it calls what the dict is for.
_MMENGINE_TAKES = {
    "optim_wrapper": {"constructor", "paramwise_cfg"},
    "default_hooks.*": {"priority"},
    "custom_hooks.*": {"priority"},
    "optim_wrapper.clip_grad": {"type"},
    "train_dataloader": {"num_batch_per_epoch"},
    "log_processor": {"type"},
    "env_cfg.dist_cfg": {"timeout"},  # a number of seconds
}
# A hook that takes any keyword, and what it hands them to.
_HANDS_ON = {CheckpointHook: Runner.save_checkpoint}
_ABOVE_ZERO = (
    "log_processor.window_size",
    "optim_wrapper.clip_grad.max_norm",
    "optim_wrapper.clip_grad.clip_value",
)
_CHOICES = {
    "log_level": list(logging.getLevelNamesMapping()) if hasattr(
        logging, "getLevelNamesMapping") else list(logging._nameToLevel),
    "env_cfg.mp_cfg.mp_start_method": multiprocessing.get_all_start_methods(),
    "env_cfg.dist_cfg.backend": Backend.backend_list,
    "optim_wrapper.clip_grad.type": ["norm", "value"],
}  # fmt: skip
_DEFAULT_TYPES = {
    "optim_wrapper": "OptimWrapper",
    "log_processor": "LogProcessor",
    "visualizer": "Visualizer",
}
# MMEngine's, which it looks up where it takes them, and ours.
_PARAMWISE = {
    name
    for name in DefaultOptimWrapperConstructor.add_params.__code__.co_consts
    if isinstance(name, str) and name.endswith(("_mult", "_keys", "_duplicate"))
} | {component.rate for component in COMPONENTS if component.rate is not None}
# Made of the settings, which were checked. Above, their types may stand for something else:
# pixel_shuffle is a layer of mmcv's too, once that is imported.
_OURS = ("encoder", "llm_lora", "lora", "loss", "origin", PROJECTOR)


def check_arguments(configs: list[dict], filename: str) -> None:
    """Hold every argument that configs give against what the one who takes it declares.

    Checked are the names of types and arguments, the types of values where they are declared, and
    what MMEngine's own hooks, log processor, optimizer and data loader say of them.

    Args:
        configs: of the stages.
        filename: where they come from, for the message.

    Raises:
        DPAError: what can't be used, each once and with its place.
    """
    lines = [line for config in configs for line in _wrong(config, ())]
    if not lines:  # else they would say the same again
        lines = [line for config in configs for line in _tried(config)]
    lines = list(dict.fromkeys(lines))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise DPAError(f"{filename} (or --cfg-options) has what can't be used:\n{listed}")


def _wrong(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    where = ".".join(path)
    if isinstance(node, float) and not _usable(node, where):
        yield f"{where}: not a number to compute with (got {node!r})"
    if where in _ABOVE_ZERO and isinstance(node, (int, float)) and node <= 0:
        yield f"{where}: expected a number above 0 (got {node!r})"
    if (choices := _CHOICES.get(where)) and node not in choices:
        yield f"{where}: {node!r} is none of {', '.join(choices)}{nearest(str(node), choices)}"
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _wrong(item, (*path, str(i)))
    if not isinstance(node, dict):
        if _place(path).endswith("hooks.*") and node is not None:
            yield f"{where}: expected a dict (got {node!r})"
        return
    yield from (f"{where}.{key}: {problem}" for key, problem in _of_dict(node, path))
    for key, value in dict.items(node):
        if key not in _OURS:
            yield from _wrong(value, (*path, str(key)))


def _usable(number: float, where: str) -> bool:
    # A norm to clip by may be infinite: gradients are measured, and not clipped.
    return math.isfinite(number) or (number > 0 and where.startswith("optim_wrapper.clip_grad."))


def _of_dict(node: dict, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What is wrong with the keys of a dict: each key, and what to say of it."""
    where, place = ".".join(path), _place(path)
    kind = dict.get(node, "type", _DEFAULT_TYPES.get(where))
    others = _MMENGINE_TAKES.get(place, set()) | {"type"}
    given = {key: value for key, value in dict.items(node) if key != "type"}
    if place in _CALLS:
        calls = _CALLS[place]
        if place == "optim_wrapper.clip_grad" and kind == "value":
            calls = (torch.nn.utils.clip_grad_value_,)
        for call in calls:  # what the first hands on to the second
            wrong = list(problems(call, given, others))
            yield from wrong
            if not parameters(call)[1]:
                break
    elif place in _REGISTRIES or kind is not None:
        known = _REGISTRIES.get(place)
        call = _find(kind, known)
        if call is not None:
            yield from problems(call, given, others)
            yield from _handed_on(call, given, others)
            yield from _missing(call, given, place)
        elif known is not None:
            names = sorted(known.module_dict)
            said = f"{kind!r} is not a known {known.name}" if kind else "it is missing"
            yield "type", said + nearest(str(kind), names)
    if place == "optim_wrapper":
        yield from _of_groups(node)
    if place in ("default_hooks.*", "custom_hooks.*") and "priority" in given:
        try:
            get_priority(given["priority"])
        except (TypeError, ValueError, KeyError) as error:
            yield "priority", f"{error} (got {given['priority']!r})"


def _place(path: tuple[str, ...]) -> str:
    """The path as in the tables above: with * for a hook's name or a number in a list."""
    parts = ["*" if part.isdigit() else part for part in path]
    if len(parts) == 2 and parts[0] == "default_hooks":
        parts[1] = "*"
    return ".".join(parts)


def _handed_on(call: Callable, given: dict, others: set[str]) -> Iterator[tuple[str, str]]:
    if call in _HANDS_ON:
        names = {*parameters(call)[0], *parameters(_HANDS_ON[call])[0], *others}
        for key in given.keys() - names:
            yield key, f"not an argument{nearest(key, names)}"


def _missing(call: Callable, given: dict, place: str) -> Iterator[tuple[str, str]]:
    """What a hook, as users add them, needs and is not given."""
    if place not in ("default_hooks.*", "custom_hooks.*"):
        return
    for name, parameter in parameters(call)[0].items():
        if parameter.default is parameter.empty and name not in (*given, "self"):
            yield name, "it is missing"


def _find(kind: Any, registry: Registry | None) -> Callable | None:
    """What a type is, by name or itself; None where it can't be found."""
    if isinstance(kind, LazyObject):
        return kind.build()
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    for each in [registry] if registry is not None else _REGISTRIES.values():
        if kind in each.module_dict:
            return each.module_dict[kind]
    if registry is OPTIMIZERS and (found := _deepspeeds(kind)) is not None:
        return found
    if "." in kind:
        try:
            return get_object_from_string(kind) or (registry and registry.get(kind))
        except (ImportError, AttributeError):
            return None
    return None


def _deepspeeds(name: str) -> type | None:
    """An optimizer that MMEngine registers when its DeepSpeed strategy is built."""
    modules = ("deepspeed.ops.adam", "deepspeed.ops.lamb", "deepspeed.runtime.fp16.onebit")
    places = (f"{module}.{name}" for module in modules)
    return next((found for place in places if (found := get_object_from_string(place))), None)


def _of_groups(wrapper: dict) -> Iterator[tuple[str, str]]:
    """What is wrong with ``constructor`` and ``paramwise_cfg``."""
    constructor, known = dict.get(wrapper, "constructor"), OPTIM_WRAPPER_CONSTRUCTORS
    if constructor is not None and _find(constructor, known) is None:
        names = [name for name in known.module_dict if name is not None]
        yield (
            "constructor",
            f"{constructor!r} is not a known {known.name}{nearest(str(constructor), names)}",
        )
    default = (None, "DefaultOptimWrapperConstructor", "DPAOptimWrapperConstructor")
    paramwise = dict.get(wrapper, "paramwise_cfg")
    if paramwise is None or constructor not in default:
        return
    if not isinstance(paramwise, dict):
        yield "paramwise_cfg", f"expected a dict (got {paramwise!r})"
        return
    names = _PARAMWISE
    for key, value in dict.items(paramwise):
        if key not in names:
            yield f"paramwise_cfg.{key}", f"not an argument{nearest(key, names)}"
        elif key.endswith(("_mult", "_lr")) and not _is_number(value):
            yield f"paramwise_cfg.{key}", f"expected a number (got {value!r})"
    optimizer = _find(dict.get(wrapper["optimizer"], "type"), OPTIMIZERS)
    options = {"lr_mult", "decay_mult"} | (set(parameters(optimizer)[0]) if optimizer else set())
    custom = dict.get(paramwise, "custom_keys", {})
    if not isinstance(custom, dict):
        yield "paramwise_cfg.custom_keys", f"expected a dict (got {custom!r})"
        return
    for name, given in dict.items(custom):
        where = f"paramwise_cfg.custom_keys.{name}"
        if not isinstance(given, dict):
            yield where, f"expected a dict with lr_mult or decay_mult (got {given!r})"
            continue
        for key, value in dict.items(given):
            if key not in options:
                yield f"{where}.{key}", f"not an argument{nearest(key, options)}"
            elif key in ("lr_mult", "decay_mult", "lr") and not _is_number(value):
                yield f"{where}.{key}", f"expected a number from 0 on (got {value!r})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _tried(config: dict) -> Iterator[str]:
    """What MMEngine and torch say of their own parts, which do nothing but look at their arguments.

    Parts of others are left alone: they may do more, such as load a model.
    """
    for name, hook in dict.items(config.get("default_hooks") or {}):
        if hook is not None:
            yield from _built(HOOKS, f"default_hooks.{name}", hook)
    for i, hook in enumerate(config.get("custom_hooks") or []):
        yield from _built(HOOKS, f"custom_hooks.{i}", hook)
    if processor := config.get("log_processor"):
        yield from _built(LOG_PROCESSORS, "log_processor", {"type": "LogProcessor", **processor})
    wrapper = config.get("optim_wrapper")
    if wrapper and _is_torchs(_find(wrapper["optimizer"].get("type"), OPTIMIZERS)):
        wrapper = {**wrapper, "type": "OptimWrapper"}  # others may need a GPU
        yield from _said("optim_wrapper", lambda: build_optim_wrapper(nn.Linear(1, 1), wrapper))
    if loader := config.get("train_dataloader"):
        unbuilt = ("dataset", "sampler", "collate_fn", "worker_init_fn")
        options = {key: value for key, value in dict.items(loader) if key not in unbuilt}
        yield from _said("train_dataloader", lambda: DataLoader([0], sampler=[0], **options))


def _built(registry: Registry, where: str, cfg: dict) -> Iterator[str]:
    found = _find(dict.get(cfg, "type"), registry)
    if getattr(found, "__module__", "").startswith("mmengine."):
        given = {key: v for key, v in dict.items(cfg) if key not in ("type", "priority")}
        yield from _said(where, lambda: found(**copy.deepcopy(given)))


def _is_torchs(found: Any) -> bool:
    return inspect.isclass(found) and found.__module__.startswith("torch.optim")


def _said(where: str, build: Callable) -> Iterator[str]:
    try:
        build()
    except Exception as error:  # whatever it is, the run would end by it
        yield f"{where}: {error or type(error).__name__}"
