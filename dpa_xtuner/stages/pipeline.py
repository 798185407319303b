"""Which stage comes next."""

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from dpa_xtuner.errors import DPAError
from dpa_xtuner.layout import STAGE_NAMES
from dpa_xtuner.precision import Precision, choose_precision
from dpa_xtuner.stages.artifacts import is_finished, newest_checkpoint, read_state, refuse_foreign
from dpa_xtuner.stages.build import (
    check_ahead,
    global_rank,
    stage_config,
    usable_data,
    world_size,
)
from dpa_xtuner.stages.components import PUBLISHED
from dpa_xtuner.stages.initial import check_initial, record_of_loaded
from dpa_xtuner.stages.provenance import provenance_of, refuse_changed
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import Settings, read_settings
from dpa_xtuner.stages.table import Stage, find_stage

_ANEW = "Use another --work-dir, or remove that folder to train the stage again."
DATA_CHECKED = "DPADATA_CHECKED"
"""Names, for the next stage's process, the work dir whose stages' data was all looked at."""


def next_stage(cfg: Config) -> Config | None:
    """The config of the first unfinished stage, set to resume where it stopped.

    Reads ``DPA_STAGE`` (that stage alone) from the environment.

    Args:
        cfg: a DPA config as ``xtuner train`` hands it to the runner.

    Returns:
        None when everything that was asked for is finished.

    Raises:
        DPAError: settings that can't be used, a stage that needs another first, or a
            finished or started stage that the config no longer describes.
    """
    settings = read_settings(cfg)
    run = Run.of(cfg, settings, run_precision(Path(cfg.work_dir), settings))
    _log(run, f"Precision {run.precision.name}: {run.precision.reason}")
    stages = _wanted(run)
    check_ahead(run, stages)
    if settings.tune.init_projector is not None:
        check_initial(run)
    for number, stage in enumerate(stages, 1):
        folder = run.work_dir / stage.name
        _need_inputs(stage, run.work_dir)
        provenance = provenance_of(run, stage)
        _refuse_foreign_inputs(run, stage, provenance)
        if not is_finished(folder):
            config = stage_config(run, stage, provenance)
            _resume(config, run, stage, provenance)
            _check_later_data(run, stages[number:])
            return config
        refuse_changed(folder, read_state(folder)["origin"], provenance, _ANEW)
        _log(run, f"Stage {stage.name} is finished")
    return None


def _log(run: Run, text: str) -> None:
    if global_rank(run.cfg.launcher) == 0:
        print_log(text, "current")


def _refuse_foreign_inputs(run: Run, stage: Stage, provenance: dict) -> None:
    own = {side: provenance[side] for side in PUBLISHED if side in provenance}
    for folder in stage.loads.values():
        record = record_of_loaded(run.work_dir / folder, run.settings.llm_name_or_path)
        refuse_foreign(run.work_dir / folder, record, own, "architecture")


def run_precision(base: Path, settings: Settings) -> Precision:
    """What all stages of a run compute in: what the first began with, or what fits the device.

    Weights are told apart by their digits, which another type would round otherwise, so that
    stages of one run must not differ.

    Args:
        base: the work dir.
        settings: the method's.

    Raises:
        DPAError: the run began with another precision than the settings name, or the device
            can't compute in it.
    """
    device = get_device()
    for name in STAGE_NAMES:
        begun = read_state(base / name).get("origin", {}).get("precision")
        if begun is None:
            continue
        if settings.precision not in ("auto", begun):
            raise DPAError(
                f"precision={settings.precision!r}, but {base / name} began in {begun!r}, and a "
                f"run keeps its precision. Set precision={begun!r}, or use another --work-dir."
            )
        return choose_precision(begun, device, f"stage {name} began in it")
    return choose_precision(settings.precision, device)


def _check_later_data(run: Run, stages: list[Stage]) -> None:
    """Make the data sets of later stages now, which they then find on disk."""
    if os.environ.get(DATA_CHECKED) == str(run.work_dir):  # by the stage that went on with this
        return
    for stage in stages:
        if not is_finished(run.work_dir / stage.name):
            usable_data(run, stage)


def run_facts(config: Config) -> dict:
    """What a checkpoint's iteration count and optimizer state depend on."""
    zero = config.strategy.config["zero_optimization"]["stage"] if "strategy" in config else None
    return {
        "processes": world_size(config.launcher),
        "batch_size": config.train_dataloader.batch_size,
        "zero": zero,
    }


def samples_of(config: Config) -> str:
    """The fingerprint of the samples that a stage's config trains on."""
    return next(h["samples"] for h in config.custom_hooks if h["type"] == "HandOverHook")


def _wanted(run: Run) -> list[Stage]:
    only = os.environ.get("DPA_STAGE")
    if only is None:
        return list(run.stages.values())
    return [find_stage(run.settings, only, "DPA_STAGE=")]


def _need_inputs(stage: Stage, work_dir: Path) -> None:
    for component, folder in stage.loads.items():
        if Path(folder).is_absolute():  # given by the config: check_initial has seen it
            continue
        writer = folder.split("/")[0]
        finished = is_finished(work_dir / writer)
        if not finished or not (work_dir / folder).is_dir():
            what = "does not exist" if finished else "is not finished"
            raise DPAError(
                f"Stage {stage.name} starts from the {component} of stage {writer}, but "
                f"{work_dir / folder} {what}. Run DPA_STAGE={writer} first, or all stages without "
                f"DPA_STAGE."
            )


def _resume(config: Config, run: Run, stage: Stage, provenance: dict) -> None:
    """Set a stage's config to go on from its newest checkpoint, if there is one that fits."""
    folder, cfg = Path(config.work_dir), run.cfg
    asked = cfg.get("load_from") if cfg.get("resume") else None
    if asked is not None and Path(asked).resolve().parent != folder.resolve():
        raise DPAError(
            f"--resume {asked} is not a checkpoint of stage {stage.name}, which comes next; "
            f"its checkpoints are in {folder}."
        )
    checkpoint = asked or newest_checkpoint(folder)
    config.resume, config.load_from = checkpoint is not None, checkpoint
    if checkpoint is None:
        return
    state, facts = read_state(folder), run_facts(config)
    refuse_changed(folder, state.get("origin", {}), provenance, _ANEW)
    if (before := state.get("run", {})) != facts:
        raise DPAError(
            f"{checkpoint} was written by a run with {before}, this one has {facts}: its optimizer "
            f"state and sample order don't fit. Start it as before, or remove {folder}."
        )
    if state.get("samples") != samples_of(config):
        raise DPAError(
            f"The data files and settings of stage {stage.name} are those that {checkpoint} was "
            f"trained on, and yet they give other samples: the tokenizer has changed, or images "
            f"that could not be read when the data was tokenised can be read by now (with "
            f"max_tiles above 1, an image's size decides its tokens). Remove {folder} to train the "
            f"stage again; to go on, put back what was there and give an empty DPA_CACHE."
        )
    print_log(f"Stage {stage.name} goes on from {checkpoint}", "current")
