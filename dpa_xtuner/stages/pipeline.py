"""Which stage comes next."""

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from dpa_xtuner.errors import DPAError
from dpa_xtuner.layout import STAGE_NAMES
from dpa_xtuner.precision import Precision, choose_precision
from dpa_xtuner.stages.artifacts import is_finished, newest_checkpoint, read_state
from dpa_xtuner.stages.build import (
    check_ahead,
    global_rank,
    stage_config,
    usable_data,
    world_size,
)
from dpa_xtuner.stages.inputs import check_inputs
from dpa_xtuner.stages.provenance import provenance_of, refuse_changed
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import Settings, read_settings
from dpa_xtuner.stages.table import Stage, find_stage

_ANEW = "Use another --work-dir, or remove that folder to train the stage again."
DATA_CHECKED = "DPA_DATA_CHECKED"
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
    for number, stage in enumerate(stages, 1):
        check_inputs(run, stage)
        folder, provenance = run.work_dir / stage.name, provenance_of(run, stage)
        state = read_state(folder)
        finished = state.get("status") == "finished"
        checkpoint = None if finished else _checkpoint(run, stage)
        if finished or checkpoint:
            refuse_changed(folder, state.get("origin", {}), provenance, _ANEW)
        if finished:
            _log(run, f"Stage {stage.name} is finished")
            continue
        config = stage_config(run, stage, provenance)
        _resume(config, checkpoint, state)
        _check_later_data(run, stages[number:])
        return config
    return None


def _log(run: Run, text: str) -> None:
    if global_rank(run.cfg.launcher) == 0:
        print_log(text, "current")


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


def _checkpoint(run: Run, stage: Stage) -> str | None:
    """The checkpoint that a stage resumes from: the one that ``--resume`` names, or the newest."""
    folder, cfg = run.work_dir / stage.name, run.cfg
    asked = cfg.get("load_from") if cfg.get("resume") else None
    if asked is not None and Path(asked).resolve().parent != folder.resolve():
        raise DPAError(
            f"--resume {asked} is not a checkpoint of stage {stage.name}, which comes next; "
            f"its checkpoints are in {folder}."
        )
    return asked or newest_checkpoint(folder)


def _resume(config: Config, checkpoint: str | None, state: dict) -> None:
    """Set a stage's config to go on from a checkpoint, if there is one; refuse one of another run.

    Args:
        config: the stage's; changed in place.
        checkpoint: what to go on from.
        state: what the stage's state file says.
    """
    config.resume, config.load_from = checkpoint is not None, checkpoint
    if checkpoint is None:
        return
    folder, facts = Path(config.work_dir), run_facts(config)
    if (before := state.get("run", {})) != facts:
        raise DPAError(
            f"{checkpoint} was written by a run with {before}, this one has {facts}: its optimizer "
            f"state and sample order don't fit. Start it as before, or remove {folder}."
        )
    if state.get("samples") != samples_of(config):
        raise DPAError(
            f"The data files and settings of stage {folder.name} are those that {checkpoint} was "
            f"trained on, and yet they give other samples: the tokenizer has changed, or images "
            f"that could not be read when the data was tokenised can be read by now (with "
            f"max_tiles above 1, an image's size decides its tokens). Remove {folder} to train the "
            f"stage again; to go on, put back what was there and give an empty DPA_CACHE."
        )
    print_log(f"Stage {folder.name} goes on from {checkpoint}", "current")
