"""One table: what each stage builds, loads, trains and writes."""

from dataclasses import dataclass

from dpa_xtuner.stages.settings import Settings

STAGE_NAMES = ("proxy", "align", "tune")


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
    """The three rows, which depend on how ``tune`` trains its LLM and where it starts."""
    proxy = Stage(
        name="proxy",
        view="caption_text",
        builds=("llm", "llm_adapter"),
        loads={},
        trains=("llm_adapter",),
        writes={"llm_adapter": "proxy/llm_adapter"},
    )
    align = Stage(
        name="align",
        view="caption",
        builds=("llm", "visual_encoder", "projector"),
        loads=proxy.writes,
        trains=("projector",),
        writes={"projector": "align/projector"},
    )
    trained = "llm" if settings.tune.train_llm == "full" else "llm_adapter"
    tune = Stage(
        name="tune",
        view="chat",
        builds=tuple(dict.fromkeys(("llm", trained, "visual_encoder", "projector"))),
        loads=align.writes | (proxy.writes if settings.tune.start_from == "proxy" else {}),
        trains=(trained, "projector"),
        writes={trained: f"tune/{trained}", "projector": "tune/projector"},
    )
    return {stage.name: stage for stage in (proxy, align, tune)}
