"""The registries of this package; whatever else it registers goes into MMEngine's own."""

from collections.abc import Callable
from inspect import signature

from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry, build_runner_from_cfg

from dpa_xtuner.declared import problems
from dpa_xtuner.errors import DPAError, cli_errors, nearest

SCHEMES = Registry("weighting scheme", scope="dpa_xtuner", locations=["dpa_xtuner.loss"])
"""Weighting schemes: classes like those in :mod:`dpa_xtuner.loss.weighting`."""

FAMILIES = Registry("family", scope="dpa_xtuner", locations=["dpa_xtuner.families"])
"""LLM families: classes like those in :mod:`dpa_xtuner.families`."""

ENCODERS = Registry("encoder", scope="dpa_xtuner", locations=["dpa_xtuner.model.encoders"])
"""Kinds of visual encoders: classes like those in :mod:`dpa_xtuner.model.encoders`."""

PROJECTORS = Registry("projector", scope="dpa_xtuner", locations=["dpa_xtuner.model.projectors"])
"""Projectors: modules like those in :mod:`dpa_xtuner.model.projectors`."""


class _Runners(Registry):
    def get(self, key: str) -> type:
        """The runner of a name; ends the process where there is none, which MMEngine would not."""
        with cli_errors():
            if (found := super().get(key)) is None:
                raise DPAError(f"runner_type={key!r} is not a known runner: set it to 'Runner'.")
        return found


RUNNERS = _Runners(
    "runner",
    build_func=build_runner_from_cfg,
    parent=MMENGINE_RUNNERS,
    scope="dpa_xtuner",
    locations=["dpa_xtuner.engine.runner"],
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
        DPAError: unknown name, or an argument that is unknown, mistyped or missing.
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
    wrong = dict(problems([found], keywords, positional=positional, whole=True))
    if wrong:
        listed = "; ".join(f"{key}: {what}" for key, what in wrong.items())
        names = list(signature(found).parameters)[positional:]
        takes = f"It takes {', '.join(names)}." if names else "It takes no arguments."
        raise DPAError(f"The {registry.name} {name!r} can't be built: {listed}. {takes}")
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
