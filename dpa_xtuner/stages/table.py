"""One table: what each stage builds, loads, trains and writes."""

from dataclasses import dataclass

from dpa_xtuner.stages.settings import LLMSettings, Settings

STAGE_NAMES = ("proxy", "align", "tune")
"""All stages in their order; a method without a proxy has the last two."""


@dataclass(frozen=True)
class Stage:
    """A row of the table. Parts are those of :data:`dpa_xtuner.model.parts.PARTS`.

    Attributes:
        name: one of :data:`STAGE_NAMES`, and the stage's folder below the work dir.
        view: how it sees the data (:mod:`dpa_xtuner.data.templates`).
        builds: parts that its model has.
        loads: part -> folder below the work dir that an earlier stage wrote.
        trains: parts that get gradients.
        writes: part -> folder below the work dir.
    """

    name: str
    view: str
    builds: tuple[str, ...]
    loads: dict[str, str]
    trains: tuple[str, ...]
    writes: dict[str, str]


def stage_table(settings: Settings) -> dict[str, Stage]:
    """The rows of a method's stages, which depend on what trains its LLM in full or by LoRA."""
    stages = []
    proxy_writes: dict[str, str] = {}
    if settings.recipe.proxy:
        trained = _trained(settings.proxy)
        proxy_writes = {trained: f"proxy/{trained}"}
        stages.append(
            Stage(
                name="proxy",
                view="caption_text",
                builds=tuple(dict.fromkeys(("llm", trained))),
                loads={},
                trains=(trained,),
                writes=proxy_writes,
            )
        )
    align = Stage(
        name="align",
        view="caption",
        builds=("llm", "visual_encoder", "projector"),
        loads=proxy_writes,
        trains=("projector",),
        writes={"projector": "align/projector"},
    )
    trained = _trained(settings.tune)
    tune = Stage(
        name="tune",
        view="chat",
        builds=tuple(dict.fromkeys(("llm", trained, "visual_encoder", "projector"))),
        loads=align.writes | (proxy_writes if settings.tune.start_from == "proxy" else {}),
        trains=(trained, "projector"),
        writes={trained: f"tune/{trained}", "projector": "tune/projector"},
    )
    return {stage.name: stage for stage in (*stages, align, tune)}


def _trained(settings: LLMSettings) -> str:
    return "llm" if settings.train_llm == "full" else "llm_adapter"
