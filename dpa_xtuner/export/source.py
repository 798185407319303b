"""What is exported: a finished stage of a run, or a checkpoint of one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.model.components import LLM, LLM_ADAPTER, PROJECTOR, PUBLISHED, VISUAL_ENCODER
from dpa_xtuner.model.encoders import Encoder, build_encoder
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.models import complete
from dpa_xtuner.stages.pipeline import STATE, input_hashes, newest_checkpoint, read_state
from dpa_xtuner.stages.settings import (
    Settings,
    config_from_file,
    differences,
    refuse_idle_options,
)
from dpa_xtuner.stages.table import TUNE, StagePlan, find_stage

# Captions are learned as image, text, newline: a template without words of its own.
_CAPTION = {"INSTRUCTION": "{input}", "SUFFIX": "\n", "SUFFIX_AS_EOS": True}


@dataclass(frozen=True, kw_only=True)
class Source(StagePlan):
    """Where a model's weights are, and what is known of it before they are loaded.

    Attributes:
        checkpoint: a .pth file or DeepSpeed folder in place of what the finished stage wrote.
        precision: what the stage computed in; bfloat16 for a run that has no record of it.
    """

    checkpoint: Path | None
    precision: Precision

    @property
    def template(self) -> dict[str, Any]:
        """The chat template that the stage trained with."""
        return self.settings.template if self.stage.view == "chat" else dict(_CAPTION)

    @property
    def encoder(self) -> Encoder:
        """The kind of visual encoder, its layer as the config sets it."""
        kind = build_encoder(self.settings.encoder)
        if (layer := self.cfg.model.get("visual_select_layer")) is not None:
            kind.layer = layer
        return kind

    @property
    def record(self) -> Path:
        """The folder whose ``stage.json`` tells of the training."""
        return _record(self.base, self.stage.name, self.checkpoint)

    @property
    def origin(self) -> dict[str, Any]:
        """What the stage was trained from; empty for a checkpoint of which there is no record.

        Raises:
            DPAError: the record does not say it, or is of another stage.
        """
        state = read_state(self.record)
        origin = state.get("origin", {} if self.checkpoint else None)
        if not isinstance(origin, dict):
            raise DPAError(
                f"{self.record / STATE} does not say what the stage was trained from (no origin "
                f"in it). Restore it, or remove {self.record} to train the stage again."
            )
        if origin.get("stage", self.stage.name) != self.stage.name:
            raise DPAError(
                f"{self.checkpoint or self.record} is of stage {origin['stage']}, not of "
                f"{self.stage.name}: give --stage {origin['stage']}."
            )
        return origin

    def written(self, component: str) -> Path | None:
        """Where the stage wrote a component; None for a checkpoint, or what it did not train."""
        if self.checkpoint is not None or component not in self.stage.writes:
            return None
        return self.base / self.stage.writes[component]

    def inputs(self) -> dict[str, Path]:
        """What the stage started from besides published models, and did not train further."""
        trains = {PROJECTOR, *self.stage.trains}  # a projector is trained wherever there is one
        if LLM in trains:
            trains.add(LLM_ADAPTER)  # in the LLM that was written
        elif LLM_ADAPTER in trains:
            trains.remove(LLM_ADAPTER)  # another, on top of the one it started from
        return {
            component: self.base / folder
            for component, folder in self.stage.loads.items()
            if component not in trains
        }

    def facts(self) -> dict[str, Any]:
        """What the exported weights and files follow from, for ``dpa.json``."""
        written = [folder for name in self.stage.writes if (folder := self.written(name))]
        folders = [*written, *self.inputs().values()]
        facts = {
            "method": self.settings.method,
            "stage": self.stage.name,
            LLM: LLM.name(self.settings),
            "tokenizer": self.cfg.tokenizer.to_dict(),
            "prompt_template": self.template,
            "weights": _hashes([self.checkpoint] if self.checkpoint else folders),
            "published": _published(self.cfg),
        }
        if self.sees_pictures:
            facts |= {
                VISUAL_ENCODER: VISUAL_ENCODER.name(self.settings),
                "encoder": self.settings.encoder,
                "vision_feature_layer": self.encoder.layer,
                PROJECTOR: self.settings.projector,
                "max_tiles": self.settings.max_tiles,
                "image_processor": self.cfg.image_processor.to_dict(),
                "pad_image_to_square": self.own.pad_image_to_square,
            }
        return facts


def _hashes(paths: list[Path]) -> dict[str, str]:
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    return {"/".join(file.parts[-3:]): file_sha256(file) for file in files}  # stage/part/file


def _published(cfg: Config) -> dict[str, list[int]]:
    """Size and time of the files in the published models' folders, which are large to hash."""
    loaders = [*(cfg.model[name] for name in PUBLISHED), cfg.tokenizer, cfg.image_processor]
    names = {str(loader.get("pretrained_model_name_or_path")) for loader in loaders}
    files = [file for name in names if Path(name).is_dir() for file in Path(name).iterdir()]
    stats = {str(file): file.stat() for file in sorted(files) if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_source(
    config: Path,
    stage: str = TUNE,
    work_dir: Path | None = None,
    checkpoint: Path | None = None,
    options: dict | None = None,
) -> Source:
    """Find what a config's run has trained.

    Args:
        config: a DPA config.
        stage: its stage.
        work_dir: of the run; ``work_dirs/<config's name>`` where it is None.
        checkpoint: export this in place of what the stage wrote.
        options: as of ``--cfg-options``.

    Raises:
        DPAError: settings that can't be used or are not those of the run, an unknown or
            unfinished stage, or a folder or checkpoint that is missing.
    """
    cfg = config_from_file(config, options)
    settings = Settings.from_config(cfg)
    refuse_idle_options(cfg, settings)
    row = find_stage(settings, stage, "--stage ")
    base = Path(work_dir or f"work_dirs/{config.stem}")
    begun = read_state(_record(base, stage, checkpoint)).get("origin") or {}
    precision = Precision(begun.get("precision", "bf16"))
    cfg = complete(cfg, settings, precision)
    source = Source(cfg, settings, row, base, checkpoint=checkpoint, precision=precision)
    _need_inputs(source)
    for component in PUBLISHED:
        if component in row.builds:  # now, and not after a large file was read
            component.config(cfg, settings)
    return source


def _record(base: Path, stage: str, checkpoint: Path | None) -> Path:
    # A checkpoint lies in it; of one that was put elsewhere, the run's own is believed.
    if checkpoint is not None and (checkpoint.parent / STATE).is_file():
        return checkpoint.parent
    return base / stage


def _need_inputs(source: Source) -> None:
    name, base = source.stage.name, source.base
    if source.checkpoint is None:
        _need_finished(base, name, f"what stage {name} wrote is exported")
        needed = [folder for each in source.stage.writes if (folder := source.written(each))]
    else:
        if not source.checkpoint.exists():
            raise DPAError(f"--checkpoint {source.checkpoint} does not exist.")
        needed = []
    if source.origin:
        _refuse_changed(source, source.origin)
    for component, folder in source.inputs().items():
        _need_finished(base, folder.parent.name, f"stage {name} starts from its {component}")
        needed.append(folder)
    for folder in needed:
        if not folder.is_dir():
            raise DPAError(
                f"{folder}, which stage {folder.parent.name} wrote, is gone. Restore it, or remove "
                f"{folder.parent} and train the stage again."
            )
    _refuse_other_inputs(source, source.origin.get("loads", {}))


def _refuse_other_inputs(source: Source, before: dict[str, str]) -> None:
    """Refuse inputs that were trained anew, or replaced, after the stage had started from them."""
    inputs = source.inputs()
    before = {name: digest for name, digest in before.items() if name.split("/")[0] in inputs}
    loads = {name: folder for name, folder in source.stage.loads.items() if name in inputs}
    now = input_hashes(replace(source.stage, loads=loads), source.base) if before else {}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise DPAError(
                f"{inputs[name.split('/')[0]]} is not what stage {source.stage.name} was trained "
                f"on: {name} has changed since. Put it back, or train {source.stage.name} again."
            )


def _need_finished(base: Path, stage: str, why: str) -> None:
    folder = base / stage
    if read_state(folder).get("status") == "finished":
        return
    if not base.is_dir():
        raise DPAError(
            f"There is no run in {base}. Train first, or say where it is with --work-dir."
        )
    found = newest_checkpoint(folder)
    advice = f", or export the checkpoint it has: --checkpoint {found}" if found else ""
    raise DPAError(f"Stage {stage} in {base} is not finished, and {why}. Train it{advice}.")


def _refuse_changed(source: Source, origin: dict) -> None:
    settings, own, trained = source.settings, source.own, origin.get("settings", {})
    # Models may have moved: their names are not compared, see StageWeights.
    now = {
        "prompt_template": settings.template if source.stage.view == "chat" else "plain",
        "settings": own.model_dump(include={"train_llm", "start_from", "lora"}),
    }
    if "lora" not in trained:
        now["settings"].pop("lora", None)
    trains_encoder = getattr(own, "train_visual_encoder", False)
    if trains_encoder or "train_visual_encoder" in trained:
        now["settings"]["train_visual_encoder"] = trains_encoder
    if source.sees_pictures:
        now["settings"]["pad_image_to_square"] = own.pad_image_to_square
        now |= {
            "encoder": settings.encoder,
            "visual_select_layer": source.cfg.model.get("visual_select_layer"),
            PROJECTOR: settings.projector,
            "max_tiles": settings.max_tiles,
        }
    before = {key: origin.get(key) for key in now}
    before["settings"] = {key: trained.get(key) for key in now["settings"]}
    now = json.loads(json.dumps(now))  # as it was written: no tuples
    changes = [f"  {key}: was {a}, is {b}" for key, a, b in differences(before, now)]
    if changes:
        raise DPAError(
            f"{source.record} was trained with other settings than the config "
            f"has:\n" + "\n".join(changes) + "\nGive them as in training, with --cfg-options."
        )
