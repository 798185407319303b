"""One table: what each stage builds, loads, trains and writes."""

import os
from dataclasses import dataclass, replace

from dpa_xtuner.data.templates import SampleFormat
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.layout import (
    ALIGN,
    COMPONENT_NAMES,
    LLM,
    LLM_ADAPTER,
    PROJECTOR,
    PROXY,
    TUNE,
    VISUAL_ENCODER,
)
from dpa_xtuner.stages.settings import LLMSettings, Settings


@dataclass(frozen=True)
class HeldOut:
    """How a stage is measured on held-out captions.

    Attributes:
        start: name of the figure that is measured before the first step.
        end: name of the figure that is measured from then on.
        shown: names of the figures that the log shows once they are measured.
        meaning: meaning of the figures, for the log.
        earlier_meaning: meaning of the earlier stage's figures, for the log.
        earlier: the stage whose figures are shown too.
    """

    start: str
    end: str
    shown: tuple[str, ...]
    meaning: str
    earlier_meaning: str = ""
    earlier: str | None = None


@dataclass(frozen=True)
class Stage:
    """A row of the table; components by name (:data:`dpa_xtuner.layout.COMPONENT_NAMES`).

    Attributes:
        name: one of :data:`dpa_xtuner.layout.STAGE_NAMES`; also its folder below the work dir.
        sample_format: the format of its samples (:mod:`dpa_xtuner.data.templates`).
        builds: components that its model has.
        loads: component -> folder below the work dir that an earlier stage wrote, or the absolute
            path of a folder that the config names.
        trains: components that get gradients.
        guards: components whose weights must not change by a bit while they are frozen.
        held_out: how it is measured, if captions are held out.

    Raises:
        DPAError: a component is unknown, trained but not built, or trained in two ways.
    """

    name: str
    sample_format: SampleFormat
    builds: tuple[str, ...]
    loads: dict[str, str]
    trains: tuple[str, ...]
    guards: tuple[str, ...] = ()
    held_out: HeldOut | None = None

    def __post_init__(self):
        for component in (*self.builds, *self.loads, *self.trains, *self.guards):
            if component not in COMPONENT_NAMES:
                hint = nearest(component, COMPONENT_NAMES) or "."
                raise DPAError(
                    f"{component!r} is not a component of a model{hint} Known: "
                    f"{', '.join(COMPONENT_NAMES)}."
                )
        if rest := [component for component in self.trains if component not in self.builds]:
            raise DPAError(f"Stage {self.name} trains {', '.join(rest)}, which it does not build.")
        if {LLM, LLM_ADAPTER} <= set(self.trains):
            raise DPAError(f"Stage {self.name} trains {LLM} and {LLM_ADAPTER}: choose one of them.")

    @property
    def writes(self) -> dict[str, str]:
        """The components that it writes, those it trains -> folder below the work dir."""
        return {component: f"{self.name}/{component}" for component in self.trains}

    @property
    def sees_pictures(self) -> bool:
        """Whether its model takes images."""
        return VISUAL_ENCODER in self.builds


def stage_table(settings: Settings) -> dict[str, Stage]:
    """Build the table of a run: the row of each of its stages, by name."""
    if settings.tune.init_projector is not None:
        given = {PROJECTOR: os.path.abspath(settings.tune.init_projector)}
        return {TUNE: _tune(settings, given)}
    rows: list[Stage] = []
    from_proxy: dict[str, str] = {}
    held_out = HeldOut(ALIGN, ALIGN, shown=(ALIGN,), meaning="with pictures")
    if settings.has_proxy and settings.proxy is not None:
        trained = _trained(settings.proxy)
        proxy = Stage(
            name=PROXY,
            sample_format="caption_text",
            builds=_unique(LLM, trained),
            loads={},
            trains=(trained,),
            held_out=HeldOut(
                start="original",
                end="floor",
                shown=("original", "floor"),
                meaning="text only: under the original LLM, and under the proxy (the floor)",
            ),
        )
        rows, from_proxy = [proxy], proxy.writes
        held_out = replace(
            held_out,
            shown=(ALIGN, "floor"),
            earlier=PROXY,
            earlier_meaning="and the floor without: below it, the picture is used",
        )
    align = Stage(
        name=ALIGN,
        sample_format="caption",
        builds=(LLM, VISUAL_ENCODER, PROJECTOR),
        loads=from_proxy,
        trains=(PROJECTOR,),
        guards=(LLM,),
        held_out=held_out,
    )
    loads = align.writes | (from_proxy if settings.tune.start_from == PROXY else {})
    rows += [align, _tune(settings, loads)]
    return {stage.name: stage for stage in rows}


def find_stage(settings: Settings, name: str, given: str) -> Stage:
    """Find the row of one stage.

    Args:
        settings: the settings of the run.
        name: name of the stage.
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
    encoder = (VISUAL_ENCODER,) if settings.tune.train_visual_encoder else ()
    trains = (_trained(settings.tune), *encoder, PROJECTOR)
    return Stage(
        name=TUNE,
        sample_format="chat",
        builds=_unique(LLM, _trained(settings.tune), VISUAL_ENCODER, PROJECTOR),
        loads=loads,
        trains=trains,
    )


def _trained(settings: LLMSettings) -> str:
    return LLM if settings.train_llm == "full" else LLM_ADAPTER


def _unique(*components: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(components))
