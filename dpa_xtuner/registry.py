"""The registries of this package; whatever else it registers goes into MMEngine's own."""

from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry, build_runner_from_cfg

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
