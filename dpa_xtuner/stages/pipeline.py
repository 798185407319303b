"""Finds the next stage, and the checkpoint it resumes from."""

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.artifacts import is_finished, newest_checkpoint, read_state
from dpa_xtuner.stages.build import (
    check_ahead,
    stage_config,
    usable_data,
    world_size,
    zero_stage,
)
from dpa_xtuner.stages.provenance import provenance_of, refuse_changed
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.table import Stage, find_stage

_ANEW = "Use another --work-dir, or remove that folder to train the stage again."
DATA_CHECKED = "DPA_DATA_CHECKED"
"""Environment variable for the next stage's process: the work dir whose data was all checked."""


def next_stage(cfg: Config) -> Config | None:
    """Build the config of the first unfinished stage, set to resume where it stopped.

    The environment variable ``DPA_STAGE`` restricts this to one stage.

    Args:
        cfg: a DPA config as ``xtuner train`` hands it to the runner.

    Returns:
        None if all wanted stages are finished.

    Raises:
        DPAError: settings can't be used, a stage needs another one first, or the config no longer
            describes a stage that has begun.
    """
    run = Run.of(cfg)
    # The process of the previous stage has become this one.
    continues = os.environ.get(DATA_CHECKED) == str(run.work_dir)
    if not continues:
        print_log(f"Precision {run.precision.name}: {run.precision.reason}", "current")
    stages = _wanted(run)
    check_ahead(run, stages)
    for number, stage in enumerate(stages, 1):
        folder, provenance = run.work_dir / stage.name, provenance_of(run, stage)
        state = read_state(folder)
        finished = state.get("status") == "finished"
        checkpoint = None if finished else _checkpoint(run, stage)
        if finished or checkpoint:
            refuse_changed(folder, state.get("origin", {}), provenance, _ANEW)
        if finished:
            if not continues:
                print_log(f"Stage {stage.name} is finished", "current")
            continue
        config = stage_config(run, stage, provenance)
        _resume(config, checkpoint, state)
        for later in [] if continues else stages[number:]:
            if not is_finished(run.work_dir / later.name):
                usable_data(run, later)  # the later stage finds it on disk
        return config
    return None


def resume_key(config: Config) -> dict:
    """Collect what a checkpoint's iteration count and optimizer state depend on."""
    loader = config.train_dataloader
    average = loader.sampler.get("micro_batch_size")
    key = {
        "processes": world_size(config.launcher),
        "batch_size": average or loader.batch_size,
        "zero": zero_stage(config),
    }
    # Runs of before dealt in other ways: they had no such key, or True.
    return key if average is None else key | {"balanced": 2}


def samples_of(config: Config) -> str:
    """Return the fingerprint of the samples that a stage's config trains on."""
    return next(h["samples"] for h in config.custom_hooks if h["type"] == "HandOverHook")


def _wanted(run: Run) -> list[Stage]:
    only = os.environ.get("DPA_STAGE")
    if only is None:
        return list(run.stages.values())
    return [find_stage(run.settings, only, "DPA_STAGE=")]


def _checkpoint(run: Run, stage: Stage) -> str | None:
    """Find the checkpoint that a stage resumes from: that of ``--resume``, or the newest."""
    folder, cfg = run.work_dir / stage.name, run.cfg
    asked = cfg.get("load_from") if cfg.get("resume") else None
    if asked is not None and Path(asked).resolve().parent != folder.resolve():
        raise DPAError(
            f"--resume {asked} is not a checkpoint of stage {stage.name}, which comes next; "
            f"its checkpoints are in {folder}."
        )
    return asked or newest_checkpoint(folder)


def _resume(config: Config, checkpoint: str | None, state: dict) -> None:
    """Set a stage's config to resume from a checkpoint; refuse a checkpoint of another run.

    Args:
        config: config of the stage; changed in place.
        checkpoint: the checkpoint; None to begin the stage.
        state: content of the stage's state file.
    """
    config.resume, config.load_from = checkpoint is not None, checkpoint
    if checkpoint is None:
        return
    folder, now = Path(config.work_dir), resume_key(config)
    if (before := state.get("run", {})) != now:
        raise DPAError(
            f"{checkpoint} was written by a run with {before}, this one has {now}: its optimizer "
            f"state and sample order don't fit. Start it as before, or remove {folder}."
        )
    if state.get("samples") != samples_of(config):
        raise DPAError(
            f"Stage {folder.name} has the data files and settings that {checkpoint} was trained "
            f"on, but they now give other samples: the tokenizer has changed, or a text in a file "
            f"with pictures inside, or images can be read that could not be read when the data was "
            f"tokenised (with max_tiles above 1, an image's size decides its tokens). Remove "
            f"{folder} to train the stage again; to continue, restore the old files and set "
            f"DPA_CACHE to an empty folder."
        )
    print_log(f"Stage {folder.name} resumes from {checkpoint}", "current")
