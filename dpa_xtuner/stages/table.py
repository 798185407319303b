"""One table: what each stage builds, loads, trains and writes."""

import os
from dataclasses import dataclass

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.layout import STAGE_NAMES as STAGE_NAMES
from dpa_xtuner.stages.settings import LLMSettings, Settings


@dataclass(frozen=True)
class Stage:
    """A row of the table. Parts are those of :data:`dpa_xtuner.model.parts.PARTS`.

    Attributes:
        name: one of :data:`STAGE_NAMES`, and the stage's folder below the work dir.
        sample_format: how it sees the data (:mod:`dpa_xtuner.data.templates`).
        builds: parts that its model has.
        loads: part -> folder below the work dir that an earlier stage wrote, or the absolute path
            of one that the config gives.
        trains: parts that get gradients.
        writes: part -> folder below the work dir.
    """

    name: str
    sample_format: str
    builds: tuple[str, ...]
    loads: dict[str, str]
    trains: tuple[str, ...]
    writes: dict[str, str]


def stage_table(settings: Settings) -> dict[str, Stage]:
    """The rows of a run's stages, which depend on what trains its LLM in full or by LoRA."""
    if settings.tune.init_projector is not None:
        given = {"projector": os.path.abspath(settings.tune.init_projector)}
        return {"tune": _tune(settings, given)}
    stages = []
    proxy_writes: dict[str, str] = {}
    if settings.has_proxy:
        trained = _trained(settings.proxy)
        proxy_writes = {trained: f"proxy/{trained}"}
        stages.append(
            Stage(
                name="proxy",
                sample_format="caption_text",
                builds=tuple(dict.fromkeys(("llm", trained))),
                loads={},
                trains=(trained,),
                writes=proxy_writes,
            )
        )
    align = Stage(
        name="align",
        sample_format="caption",
        builds=("llm", "visual_encoder", "projector"),
        loads=proxy_writes,
        trains=("projector",),
        writes={"projector": "align/projector"},
    )
    from_proxy = proxy_writes if settings.tune.start_from == "proxy" else {}
    tune = _tune(settings, align.writes | from_proxy)
    return {stage.name: stage for stage in (*stages, align, tune)}


def find_stage(settings: Settings, name: str, given: str) -> Stage:
    """The row of one stage.

    Args:
        settings: the method's.
        name: the stage's.
        given: what named it, for the message, such as ``"--stage "`` or ``"DPA_STAGE="``.

    Raises:
        DPAError: the run has no such stage.
    """
    table = stage_table(settings)
    if name not in table:
        alone = settings.tune.init_projector is not None
        raise DPAError(
            f"{given}{name!r} is not a stage of method={settings.method!r}"
            f"{' with tune.init_projector' * alone}{nearest(name, table) or '.'} "
            f"Stages: {', '.join(table)}."
        )
    return table[name]


def _tune(settings: Settings, loads: dict[str, str]) -> Stage:
    trained = _trained(settings.tune)
    return Stage(
        name="tune",
        sample_format="chat",
        builds=tuple(dict.fromkeys(("llm", trained, "visual_encoder", "projector"))),
        loads=loads,
        trains=(trained, "projector"),
        writes={trained: f"tune/{trained}", "projector": "tune/projector"},
    )


def _trained(settings: LLMSettings) -> str:
    return "llm" if settings.train_llm == "full" else "llm_adapter"
