"""The registries of this package; whatever else it registers goes into MMEngine's own."""

from collections.abc import Callable
from inspect import signature

from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry, build_runner_from_cfg

from dpa_xtuner.declared import mistyped
from dpa_xtuner.declared import parameters as parameters_of
from dpa_xtuner.errors import DPAError, nearest

SCHEMES = Registry("weighting scheme", scope="dpa_xtuner", locations=["dpa_xtuner.loss"])
"""Weighting schemes: classes like those in :mod:`dpa_xtuner.loss.weighting`."""

FAMILIES = Registry("family", scope="dpa_xtuner", locations=["dpa_xtuner.families"])
"""LLM families: classes like those in :mod:`dpa_xtuner.families`."""

ENCODERS = Registry("encoder", scope="dpa_xtuner", locations=["dpa_xtuner.model.encoders"])
"""Kinds of visual encoders: classes like those in :mod:`dpa_xtuner.model.encoders`."""

PROJECTORS = Registry("projector", scope="dpa_xtuner", locations=["dpa_xtuner.model.projectors"])
"""Projectors: modules like those in :mod:`dpa_xtuner.model.projectors`."""

RUNNERS = Registry(
    "runner",
    build_func=build_runner_from_cfg,
    parent=MMENGINE_RUNNERS,
    scope="dpa_xtuner",
    locations=["dpa_xtuner.stages.runner"],
)
"""Runners under the names that XTuner asks for, found by configs with ``_scope_='dpa_xtuner'``.

``xtuner train`` names ``Runner`` or, with ``--deepspeed``, ``FlexibleRunner``, whatever
the config says; a scope is MMEngine's way to give a name another meaning.
"""


def find_named(registry: Registry, cfg: str | dict, positional: int = 0) -> tuple[Callable, dict]:
    """What a name, or ``dict(type=name, ...)``, stands for in one of our registries.

    Args:
        registry: where the name is registered.
        cfg: a name, or a dict of one and the keyword arguments.
        positional: how many of its arguments the user does not give.

    Returns:
        What is registered, and the keyword arguments to call it with.

    Raises:
        DPAError: unknown name or argument, or one is missing.
    """
    keywords = dict(cfg) if isinstance(cfg, dict) else {"type": cfg}
    name = keywords.pop("type", None)
    registry.import_from_location()
    found = registry.module_dict.get(name) if isinstance(name, str) else None
    if found is None:
        known = sorted(registry.module_dict)
        raise DPAError(
            f"{name!r} is not a known {registry.name}{nearest(str(name), known) or '.'} Known: "
            f"{', '.join(known)}. One of your own needs its file in custom_imports."
        )
    parameters = list(signature(found).parameters.values())[positional:]
    names = [parameter.name for parameter in parameters]
    declared, _ = parameters_of(found)
    for key, value in keywords.items():
        if key not in names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            takes = f"it takes {', '.join(names)}" if names else "it takes no arguments"
            raise DPAError(
                f"The {registry.name} {name!r} has no {key!r}{nearest(key, names)}; {takes}."
            )
        if key in declared and (expected := mistyped(declared[key], value)):
            raise DPAError(f"{registry.name} {name!r}: {key}={value!r} is not of type {expected}.")
    missing = [p.name for p in parameters
               if p.name not in keywords and p.default is p.empty and p.kind is not p.VAR_KEYWORD
               and p.kind is not p.VAR_POSITIONAL]  # fmt: skip
    if missing:
        raise DPAError(f"The {registry.name} {name!r} needs {', '.join(missing)}.")
    return found, keywords


def build_named(registry: Registry, cfg: str | dict, *args):
    """Build what :func:`find_named` finds.

    Args:
        registry: where the name is registered.
        cfg: a name, or a dict of one and the keyword arguments.
        args: positional arguments, which the user does not give.

    Raises:
        DPAError: unknown name or argument.
    """
    found, keywords = find_named(registry, cfg, len(args))
    return found(*args, **keywords)
