"""What is exported: a finished stage of a run, or a checkpoint of one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.layout import STATE_FILE, TUNE
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import is_finished, newest_checkpoint, read_state
from dpa_xtuner.stages.components import (
    LLM,
    LLM_ADAPTER,
    PROJECTOR,
    PUBLISHED,
    VISUAL_ENCODER,
    Published,
)
from dpa_xtuner.stages.inputs import input_hashes
from dpa_xtuner.stages.provenance import model_of, refuse_changed
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import StageSettings, config_from_file, differences
from dpa_xtuner.stages.table import Stage, find_stage

# Captions are learned as image, text, newline: a template without words.
_CAPTION = {"INSTRUCTION": "{input}", "SUFFIX": "\n", "SUFFIX_AS_EOS": True}


@dataclass(frozen=True)
class Source:
    """The source of an export: a stage of a run, before its weights are loaded.

    Attributes:
        run: the run; its precision is that of its first stage, or bfloat16 if no state file has it.
        stage: the row of the stage table.
        checkpoint: a .pth file or DeepSpeed folder in place of what the finished stage wrote.
        state_folder: the folder whose ``stage.json`` describes the training.
    """

    run: Run
    stage: Stage
    checkpoint: Path | None
    state_folder: Path

    @property
    def stage_settings(self) -> StageSettings:
        """The settings of the stage."""
        return self.run.settings.of_stage(self.stage.name)

    @property
    def template(self) -> dict[str, Any]:
        """The chat template that the stage trained with."""
        if self.stage.sample_format == "chat":
            return self.run.settings.template
        return dict(_CAPTION)

    @property
    def stage_provenance(self) -> dict[str, Any]:
        """What the stage was trained from; empty for a checkpoint without a ``stage.json``.

        Raises:
            DPAError: the file does not say it, or belongs to another stage.
        """
        state = read_state(self.state_folder)
        found = state.get("origin", {} if self.checkpoint else None)
        if not isinstance(found, dict):
            raise DPAError(
                f"{self.state_folder / STATE_FILE} does not say what the stage was trained from "
                f"(no origin in it). Restore it, or remove {self.state_folder} to train the stage "
                f"again."
            )
        if found.get("stage", self.stage.name) != self.stage.name:
            raise DPAError(
                f"{self.checkpoint or self.state_folder} is of stage {found['stage']}, not of "
                f"{self.stage.name}: give --stage {found['stage']}."
            )
        return found

    def refuse_other(self, component: Published, fingerprint: str) -> None:
        """Refuse a published model whose weights have changed since the stage was trained.

        Args:
            component: the LLM or the visual encoder.
            fingerprint: that of its weights now.

        Raises:
            DPAError: they have changed.
        """
        trained = self.stage_provenance.get(component, {})
        if trained.get("fingerprint", "") not in ("", fingerprint):
            raise DPAError(
                f"{component.name(self.run.settings)} holds other weights than {trained['name']} "
                f"did when {self.state_folder} was trained with it. Restore them, or set "
                f"{component.setting} to that model."
            )

    def written(self, component: str) -> Path | None:
        """Return the folder of a component that the stage wrote; None if it did not.

        It is None too for a checkpoint.
        """
        if self.checkpoint is not None or component not in self.stage.writes:
            return None
        return self.run.work_dir / self.stage.writes[component]

    def inputs(self) -> dict[str, Path]:
        """Find the components that the stage loaded from earlier stages and did not train."""
        trains = {PROJECTOR, *self.stage.trains}  # every stage with a projector trains it
        if LLM in trains:
            trains.add(LLM_ADAPTER)  # merged into the LLM that was written
        elif LLM_ADAPTER in trains:
            trains.remove(LLM_ADAPTER)  # it trains a second adapter, on top of the loaded one
        return {
            component: self.run.work_dir / folder
            for component, folder in self.stage.loads.items()
            if component not in trains
        }

    def export_provenance(self) -> dict[str, Any]:
        """Collect what the exported files are made from, for ``dpa.json``."""
        written = [folder for name in self.stage.writes if (folder := self.written(name))]
        folders = [*written, *self.inputs().values()]
        cfg, settings = self.run.cfg, self.run.settings
        found = {
            "method": settings.method,
            "stage": self.stage.name,
            LLM: LLM.name(settings),
            "tokenizer": cfg.tokenizer.to_dict(),
            "prompt_template": self.template,
            "weights": _hashes([self.checkpoint] if self.checkpoint else folders),
            "published": _published(cfg),
        }
        if self.stage.sees_pictures:
            found |= {
                VISUAL_ENCODER: VISUAL_ENCODER.name(settings),
                "encoder": settings.encoder,
                "vision_feature_layer": self.run.encoder_spec.layer,
                PROJECTOR: settings.projector,
                "max_tiles": settings.max_tiles,
                "image_processor": cfg.image_processor.to_dict(),
                "pad_image_to_square": self.stage_settings.pad_image_to_square,
                "background": self.stage_settings.background,
            }
        return found


def _hashes(paths: list[Path]) -> dict[str, str]:
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    # By stage/component/file.
    return {"/".join(file.parts[-3:]): file_sha256(file) for file in files}


def _published(cfg: Config) -> dict[str, list[int]]:
    """Note sizes and times of the published models' files, which are too large to hash."""
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
        stage: name of the stage.
        work_dir: work dir of the run; None for ``work_dirs/<config's name>``.
        checkpoint: export this in place of what the stage wrote.
        options: settings as in ``--cfg-options``.

    Raises:
        DPAError: settings can't be used or differ from those of the run, the stage is unknown or
            unfinished, or a folder or checkpoint is missing.
    """
    base = Path(work_dir or f"work_dirs/{config.stem}")
    folder = base / stage
    if checkpoint is not None and (checkpoint.parent / STATE_FILE).is_file():
        folder = checkpoint.parent  # the run's, if the checkpoint was not moved
    begun = read_state(folder).get("origin") or {}
    precision = Precision(begun.get("precision", "bf16"))
    cfg = config_from_file(config, options)
    cfg.work_dir = str(base)  # as training sets it
    cfg.setdefault("launcher", "none")
    run = Run.of(cfg, precision)
    row = find_stage(run.settings, stage, "--stage ")
    source = Source(run, row, checkpoint, folder)
    _need_inputs(source)
    for component in PUBLISHED:
        if component in row.builds:  # fail now, before large files are read
            run.config_of(component)
    return source


def _need_inputs(source: Source) -> None:
    name, base = source.stage.name, source.run.work_dir
    if source.checkpoint is None:
        _need_finished(base, name, "what it writes is needed")
    elif not source.checkpoint.exists():
        raise DPAError(f"--checkpoint {source.checkpoint} does not exist.")
    needed = [folder for each in source.stage.writes if (folder := source.written(each))]
    if source.stage_provenance:
        now = model_of(source.run, source.stage)
        known = source.stage_settings.names_changing("model")
        written = source.stage_provenance
        trained = {key: value for key, value in written.get("settings", {}).items() if key in known}
        before = {key: written.get(key) for key in now} | {"settings": trained}
        way_out = "Give them as in training, by --cfg-options."
        refuse_changed(source.state_folder, before, now, way_out)
    for component, folder in source.inputs().items():
        _need_finished(base, folder.parent.name, f"stage {name} starts from its {component}")
        needed.append(folder)
    for folder in needed:
        if not folder.is_dir():
            raise DPAError(
                f"{folder}, which stage {folder.parent.name} wrote, is gone. Restore it, or remove "
                f"{folder.parent} and train the stage again."
            )
    _refuse_other_inputs(source, source.stage_provenance.get("loads", {}))


def _refuse_other_inputs(source: Source, before: dict[str, str]) -> None:
    """Refuse inputs that were trained again or replaced after the stage had loaded them."""
    inputs = source.inputs()
    if before and {name.split("/")[0] for name in before} != source.stage.loads.keys():
        raise DPAError(
            f"{source.state_folder} was trained on what other stages wrote than those of "
            f"method={source.run.settings.method!r}. Give the method of its training, by "
            f"--cfg-options."
        )
    before = {name: digest for name, digest in before.items() if name.split("/")[0] in inputs}
    for name, *_ in differences(before, input_hashes(inputs)) if before else ():
        raise DPAError(
            f"{inputs[name.split('/')[0]]} is not what stage {source.stage.name} was trained on: "
            f"{name} has changed since. Restore it, or train {source.stage.name} again."
        )


def _need_finished(base: Path, stage: str, why: str) -> None:
    folder = base / stage
    if is_finished(folder):
        return
    if not base.is_dir():
        raise DPAError(
            f"There is no run in {base}. Train first, or give its folder (to export.py and "
            f"show_relevance.py by --work-dir)."
        )
    found = newest_checkpoint(folder)
    advice = f", or give the checkpoint it has: --checkpoint {found}" if found else ""
    raise DPAError(f"Stage {stage} in {base} is not finished, but {why}. Train it{advice}.")
