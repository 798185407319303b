"""Checks the keys of a config against the classes that take them, before anything is built."""

import copy
import logging
import math
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine import registry
from mmengine._strategy import BaseStrategy
from mmengine.config.lazy import LazyObject
from mmengine.dist import init_dist
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority
from mmengine.utils import get_object_from_string
from mmengine.utils.dl_utils import set_multi_processing
from torch.distributed import Backend, init_process_group
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from dpa_xtuner.declared import problems
from dpa_xtuner.errors import nearest

_CLIP = Registry("way to clip gradients")
_CLIP.register_module("norm", module=clip_grad_norm_)
_CLIP.register_module("value", module=clip_grad_value_)


@dataclass(frozen=True)
class Place:
    """A dict of a config, and what takes its keys.

    Attributes:
        known: the registry of its ``type``.
        type: its default type.
        calls: callables that take its keys, after the one that the type names.
        also: keys that MMEngine removes first.
        optional: whether it may be None.
    """

    known: Registry | None = None
    type: str | None = None
    calls: tuple[Callable, ...] = ()
    also: tuple[str, ...] = ()
    optional: bool = False


def _nothing() -> None:
    """Take no argument."""


# The keys of paramwise_cfg: string constants in the code of MMEngine's constructor.
_PARAMWISE = tuple(
    name
    for name in DefaultOptimWrapperConstructor.add_params.__code__.co_consts
    if isinstance(name, str) and name.endswith(("_mult", "_keys", "_duplicate"))
)
_HOOK = Place(registry.HOOKS, also=("priority",), optional=True)
# By path; * stands for any key or any index of a list.
_PLACES = {
    "custom_hooks.*": _HOOK,
    "custom_imports": Place(),
    "default_hooks.checkpoint": Place(
        registry.HOOKS, also=_HOOK.also, calls=(Runner.save_checkpoint,)
    ),
    "default_hooks.*": _HOOK,
    "env_cfg": Place(calls=(BaseStrategy._setup_env,)),
    "env_cfg.mp_cfg": Place(calls=(set_multi_processing,)),
    # A timeout is a number of seconds here.
    "env_cfg.dist_cfg": Place(calls=(init_dist, init_process_group), also=("timeout",)),
    "image_processor": Place(),
    "log_processor": Place(registry.LOG_PROCESSORS, "LogProcessor", optional=True),
    "model": Place(registry.MODELS, "DPALLaVAModel"),
    "model.llm": Place(),
    "model.visual_encoder": Place(),
    "optim_wrapper": Place(
        registry.OPTIM_WRAPPERS, "OptimWrapper", also=("clip_grad", "constructor", "paramwise_cfg")
    ),
    "optim_wrapper.clip_grad": Place(_CLIP, "norm", optional=True),
    "optim_wrapper.optimizer": Place(registry.OPTIMIZERS),
    "optim_wrapper.paramwise_cfg": Place(also=_PARAMWISE, calls=(_nothing,), optional=True),
    "optim_wrapper.paramwise_cfg.custom_keys": Place(),
    "optim_wrapper.paramwise_cfg.custom_keys.*": Place(
        registry.OPTIMIZERS, also=("lr_mult", "decay_mult")
    ),
    "randomness": Place(calls=(Runner.set_randomness,)),
    "strategy": Place(registry.STRATEGIES, optional=True),
    "tokenizer": Place(),
    "train_dataloader": Place(calls=(DataLoader,), also=("num_batch_per_epoch",)),
    "visualizer": Place(registry.VISUALIZERS, "Visualizer", optional=True),
    "visualizer.vis_backends.*": Place(registry.VISBACKENDS),
}
# Top-level keys that are neither settings nor arguments of MMEngine's runner.
_OTHERS = {"_scope_", "custom_imports", "image_processor", "runner_type", "strategy", "tokenizer"}
# Keys that the stages set, but that XTuner requires: their values in the base config.
_BASE = {
    "default_hooks.checkpoint.interval": -1,
    "optim_wrapper.optimizer.lr": 0.0,
    "train_dataloader.batch_size": 1,
}


def config_problems(config: dict, settings: set[str], owned: Mapping[str, str]) -> dict[str, str]:
    """Check the keys of a config that are not settings; return dotted key -> message.

    This checks the names of types and arguments and the declared types of values. It also builds
    MMEngine's own hooks and log processor, the optimizer and the data loader, and reports their
    errors.

    Args:
        config: a DPA config as plain dicts.
        settings: its top-level keys that are checked elsewhere.
        owned: keys that the stages set -> what to do instead.
    """
    found = {
        key: f"each stage sets it; {way_out}"
        for key, way_out in owned.items()
        if not _is_unset(_at(config, key), _BASE.get(key))
    }
    for key, what in problems([Runner], config, settings | _OTHERS):
        if _place(key) is None:  # else the visit below reports it
            found.setdefault(key, what)
    for key, what in _ruled(config):
        if not any(key == other or key.startswith(f"{other}.") for other in found):
            found[key] = what
    visit = _Visit(config, found)
    for key, value in config.items():
        if key not in settings:
            visit(value, key)
    return found


def _is_unset(value: Any, base: Any) -> bool:
    return value is None or value is False or value == base


def _at(config: dict, path: str) -> Any:
    """Return the value at a dotted path, None if there is none."""
    node: Any = config
    for key in path.split("."):
        node = dict.get(node, key) if isinstance(node, dict) else None
    return node


def _above_zero(value: Any) -> bool:
    return not isinstance(value, (int, float)) or not value <= 0


def _one_of(known: Iterable[str]) -> tuple[Callable[[Any], bool], str, Iterable[str]]:
    return lambda value: value is None or value in known, f"expected {', '.join(known)}", known


_ABOVE_ZERO = (_above_zero, "expected a number above 0", ())
_CONSTRUCTORS = registry.OPTIM_WRAPPER_CONSTRUCTORS
# Rules that no signature shows: a test of the value (None for a missing key), the message, and the
# known names.
_RULES: dict[str, tuple[Callable[[Any], Any], str, Iterable[str]]] = {
    "_scope_": (
        lambda scope: scope in (None, "dpa_xtuner"),  # MMEngine takes it out on the way to us
        "expected 'dpa_xtuner', by which XTuner finds our runner: leave it out",
        ("dpa_xtuner",),
    ),
    "default_hooks.checkpoint.max_keep_ckpts": (
        lambda number: number not in (0, 1),
        "expected at least 2, since MMEngine removes the oldest before the newest is on disk",
        (),
    ),
    "env_cfg.dist_cfg.backend": _one_of(Backend.backend_list),
    "env_cfg.mp_cfg.mp_start_method": _one_of(multiprocessing.get_all_start_methods()),
    "log_level": _one_of(logging._nameToLevel),
    "log_processor.window_size": _ABOVE_ZERO,
    "optim_wrapper.clip_grad.clip_value": _ABOVE_ZERO,
    "optim_wrapper.clip_grad.max_norm": _ABOVE_ZERO,
    "optim_wrapper.constructor": (
        lambda name: name is None or _find(name, _CONSTRUCTORS),
        f"not a known {_CONSTRUCTORS.name}",
        _CONSTRUCTORS.module_dict,
    ),
    "optim_wrapper.type": (
        lambda name: name in (None, "OptimWrapper", "DeepSpeedOptimWrapper"),
        "each stage sets it; set precision instead",
        (),
    ),
    "randomness.seed": (
        lambda seed: type(seed) is int and 0 <= seed < 2**32,
        "expected a number from 0 on, below 2^32, to draw the same samples again: give --seed",
        (),
    ),
}


def _ruled(config: dict) -> Iterator[tuple[str, str]]:
    """Report what breaks :data:`_RULES` and the rules that involve several keys."""
    for key, (is_right, expected, known) in _RULES.items():
        around = _at(config, key.rpartition(".")[0]) if "." in key else config
        if isinstance(around or {}, dict) and not is_right(value := _at(config, key)):
            yield key, f"{expected} (got {value!r}){nearest(str(value), filter(None, known))}"
    if config.get("load_from") and not config.get("resume"):
        yield "load_from", "the stages hand over by themselves: leave it out"
    if config.get("strategy") and config.get("runner_type") != "FlexibleRunner":
        yield "strategy", "give --deepspeed, which sets it"
    for kind in ("val", "test"):
        keys = [f"{kind}_{name}" for name in ("dataloader", "cfg", "evaluator")]
        lacking = [key for key in keys if config.get(key) is None]
        if 0 < len(lacking) < len(keys):
            given = next(key for key in keys if key not in lacking)
            yield given, f"it goes together with {', '.join(lacking)}, not set here"
    clip = (config.get("strategy") and _at(config, "optim_wrapper.clip_grad")) or {}
    usual = {"type": "norm", "norm_type": 2.0, "error_if_nonfinite": False, "foreach": None}
    for key in usual.keys() & clip.keys():
        if clip[key] != usual[key]:
            yield (
                f"optim_wrapper.clip_grad.{key}",
                f"DeepSpeed clips gradients by max_norm alone: leave out {key}={clip[key]!r}, or "
                f"train without --deepspeed",
            )


class _Visit:
    """Walks through a config and collects what is wrong.

    Args:
        config: the whole config.
        found: known problems, extended in place; their keys are not visited.
    """

    def __init__(self, config: dict, found: dict[str, str]):
        self.config, self.found = config, found

    def __call__(self, node: Any, path: str) -> None:
        """Check the value at a dotted path."""
        if path in self.found or self._belongs_to_user(path):
            return
        place = _place(path)
        if isinstance(node, dict):
            self._dict(node, path, place)
        elif place is not None and not (node is None and place.optional):
            self.found[path] = f"expected a dict (got {node!r})"
        elif isinstance(node, (list, tuple)):
            for i, item in enumerate(node):
                self(item, f"{path}.{i}")
        elif what := _wrong_number(node, path):
            self.found[path] = what

    def _belongs_to_user(self, path: str) -> bool:
        """Tell whether the user's own optimizer constructor reads it; that may take any key."""
        ours = (None, "DefaultOptimWrapperConstructor", "DPAOptimWrapperConstructor")
        constructor = _at(self.config, "optim_wrapper.constructor")
        return path == "optim_wrapper.paramwise_cfg" and constructor not in ours

    def _dict(self, node: dict, path: str, place: Place | None) -> None:
        place = place or Place()
        given = {key: value for key, value in node.items() if f"{path}.{key}" not in self.found}
        kind = given.pop("type", place.type)
        if path.startswith("optim_wrapper.paramwise_cfg.custom_keys."):
            kind = _at(self.config, "optim_wrapper.optimizer.type")
        call = None if kind is None else _find(kind, place.known)
        if call is None and kind == node.get("type", place.type) and place.known is not None:
            names = sorted(place.known.module_dict)
            message = f"{kind!r} is not a known {place.known.name}" if kind else "it is missing"
            self.found[f"{path}.type"] = message + nearest(str(kind), names)
        calls = [call, *place.calls] if call is not None else list(place.calls)
        whole = place.known is registry.HOOKS
        for key, what in problems(calls, given, place.also, whole=whole) if calls else ():
            if _place(f"{path}.{key}") is None:  # else the visit below reports it
                self.found[f"{path}.{key}"] = what
        for key, value in dict.items(node):
            self(value, f"{path}.{key}")
        if "priority" in place.also and "priority" in given:
            self._try(f"{path}.priority", lambda: get_priority(given["priority"]))
        if calls and not any(key.startswith(f"{path}.") for key in self.found):
            options = {key: value for key, value in given.items() if key not in place.also}
            self._build(path, calls[0], copy.deepcopy(options))

    def _build(self, path: str, call: Callable, given: dict) -> None:
        """Build those objects of MMEngine and torch whose constructors only check arguments.

        Other classes are not built: they may do more, such as load a model.
        """
        module = getattr(call, "__module__", "")
        if call is DataLoader:
            data: Any = [0]
            self._try(path, lambda: DataLoader(data, sampler=data, **given))
        elif module.startswith("torch.optim"):
            weight = torch.zeros(1, requires_grad=True)
            self._try(path, lambda: call([weight], **given))
        elif module.startswith(("mmengine.hooks.", "mmengine.runner.log_processor")):
            self._try(path, lambda: call(**given))

    def _try(self, path: str, build: Callable[[], Any]) -> None:
        try:
            build()
        except Exception as error:  # whatever it is, it would end the run
            self.found[path] = str(error) or type(error).__name__


def _wrong_number(value: Any, path: str) -> str:
    key = path.rpartition(".")[2]
    if path.startswith("optim_wrapper.paramwise_cfg.") and key.endswith(("_mult", "lr")):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and value >= 0 else f"expected a number from 0 on (got {value!r})"
    # The norm to clip by may be infinite: gradients are then measured, but not clipped.
    may_be_infinite = path.startswith("optim_wrapper.clip_grad.")
    if not isinstance(value, float) or math.isfinite(value) or (value > 0 and may_be_infinite):
        return ""
    return f"not a number to compute with (got {value!r})"


def _place(path: str) -> Place | None:
    for pattern, place in _PLACES.items():
        if re.fullmatch(pattern.replace(".", r"\.").replace("*", "[^.]+"), path):
            return place
    return None


def _find(kind: Any, known: Registry | None) -> Callable | None:
    """Find the callable of a type, given by name or itself; None if it can't be found."""
    if isinstance(kind, LazyObject):
        return kind.build()
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    if known is not None and kind in known.module_dict:
        return known.module_dict[kind]
    # MMEngine registers DeepSpeed's optimizers only when it builds DeepSpeed's strategy.
    if known is registry.OPTIMIZERS:
        for module in ("ops.adam", "ops.lamb", "runtime.fp16.onebit"):
            if (found := get_object_from_string(f"deepspeed.{module}.{kind}")) is not None:
                return found
    if "." in kind:
        try:
            return get_object_from_string(kind) or (known and known.get(kind))
        except (ImportError, AttributeError):
            return None
    return None
