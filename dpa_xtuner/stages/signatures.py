"""Finds keys in a config that no constructor takes, before anything is built."""

import inspect
from collections.abc import Iterator

from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)
from mmengine.utils import get_object_from_string

from dpa_xtuner.errors import DPAError, nearest

_REGISTRIES = (
    MODELS,
    DATASETS,
    DATA_SAMPLERS,
    HOOKS,
    LOOPS,
    OPTIMIZERS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)
# Their types are names of our own registries, which the settings were held against; above, they
# may stand for something else: pixel_shuffle is a layer of mmcv's too, once that is imported.
_OURS = ("encoder", "loss", "origin", "projector")
# MMEngine's build_optim_wrapper takes these for itself.
_BUILDER_TAKES = {"optim_wrapper": {"constructor", "paramwise_cfg"}}


def refuse_unknown_arguments(config: dict, filename: str) -> None:
    """Hold every ``dict(type=..., ...)`` of a config against the signature of its type.

    A type that takes any keyword, or that can't be found, is left to say so itself.

    Raises:
        DPAError: arguments that a type does not take, each with its place.
    """
    lines = list(_unknown(config, ""))
    if lines:
        raise DPAError(f"{filename} has arguments that nothing takes:\n" + "\n".join(lines))


def _unknown(node, place: str) -> Iterator[str]:
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _unknown(item, f"{place}[{i}].")
    if not isinstance(node, dict):
        return
    for key, value in dict.items(node):
        if key not in _OURS:
            yield from _unknown(value, f"{place}{key}.")
    known = _arguments(node.get("type"))
    if known is None:
        return
    known |= _BUILDER_TAKES.get(place.removesuffix("."), set())
    for key in dict.keys(node) - known - {"type"}:
        name = node["type"]
        yield f"  {place}{key}: {name} has no argument {key!r}{nearest(key, known)}"


def _arguments(kind) -> set[str] | None:
    found = next((r.module_dict[kind] for r in _REGISTRIES if kind in r.module_dict), None)
    if found is None and isinstance(kind, str) and "." in kind:
        try:
            found = get_object_from_string(kind)
        except (ImportError, AttributeError):
            return None
    if found is None:
        return None
    names: set[str] = set()
    # A class that passes **kwargs on is asked for all its parents' arguments too.
    calls = [c.__init__ for c in found.__mro__[:-1]] if inspect.isclass(found) else [found]
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        names.update(p.name for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None
