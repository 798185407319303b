"""Turns a DPA config into the ordinary XTuner config of one of its stages."""

import copy
import logging
import math
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, MODELS

from dpa_xtuner.data import DPADataset, check_dataset
from dpa_xtuner.data.problems import list_problems
from dpa_xtuner.declared import problems
from dpa_xtuner.errors import DPAError, refuse
from dpa_xtuner.stages.components import (
    COMPONENTS,
    LLM,
    LLM_ADAPTER,
    VISUAL_ENCODER,
)
from dpa_xtuner.stages.run import Run, check_models
from dpa_xtuner.stages.settings import PictureSettings, Settings, StageSettings
from dpa_xtuner.stages.table import Stage

_PROJECT = "dpa_xtuner"

CHECKED_AT_START = 128
"""Samples whose images are opened before a stage starts; tools/check_data.py opens all."""

FEW_STEPS = 20
"""A stage with fewer optimizer steps logs a warning."""


@dataclass(frozen=True)
class Schedule:
    """The schedule of a stage, counted in steps.

    Attributes:
        accumulative_counts: MMEngine's iterations (one micro-batch per device) in an optimizer
            step.
        steps: optimizer steps of the whole stage.
        warmup_steps: optimizer steps of the warm-up.
    """

    accumulative_counts: int
    steps: int
    warmup_steps: int


def world_size(launcher: str) -> int:
    """Count the processes of this run, before they have met."""
    return _from_launcher(launcher, "WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", alone=1)


def global_rank(launcher: str) -> int:
    """Return the rank of this process, before the processes have met."""
    return _from_launcher(launcher, "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", alone=0)


def _from_launcher(launcher: str, pytorch: str, slurm: str, mpi: str, alone: int) -> int:
    if launcher == "none":
        return alone
    name = {"pytorch": pytorch, "slurm": slurm, "mpi": mpi}[launcher]
    if name not in os.environ:
        raise DPAError(
            f"--launcher {launcher} needs {name}, which is not set: use its own command."
        )
    return int(os.environ[name])


def accumulative_counts(settings: StageSettings, world: int, stage: str) -> int:
    """Count the micro-batches of an optimizer step.

    Args:
        settings: settings of the stage.
        world: number of processes.
        stage: name of the stage, for messages.

    Raises:
        DPAError: the global batch can't be cut into whole micro-batches.
    """
    at_once = settings.batch_size * world
    if settings.global_batch_size % at_once:
        raise DPAError(
            f"{stage}.global_batch_size={settings.global_batch_size} is not a multiple of "
            f"{stage}.batch_size={settings.batch_size} x {world} processes. Choose a batch_size "
            f"that divides {settings.global_batch_size / world:g}."
        )
    return settings.global_batch_size // at_once


def schedule(settings: StageSettings, samples: int, world: int, stage: str) -> Schedule:
    """Count a stage's steps.

    Args:
        settings: settings of the stage.
        samples: samples in its training set.
        world: number of processes.
        stage: name of the stage, for messages.

    Raises:
        DPAError: the global batch can't be cut into whole micro-batches.
    """
    accumulate = accumulative_counts(settings, world, stage)
    steps = math.ceil(samples / settings.global_batch_size) * settings.max_epochs
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    # As transformers' Trainer. The first step of a warm-up has a rate of 0, so always leave one
    # step after the warm-up.
    warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    return Schedule(accumulate, steps, warmup)


def log_schedule(settings: StageSettings, numbers: Schedule, samples: int, stage: str) -> None:
    """Log the steps of a stage, the size of its last batch, and a warning if the steps are few.

    Args:
        settings: settings of the stage.
        numbers: counted by :func:`schedule`.
        samples: samples in its training set.
        stage: name of the stage.
    """
    batch = settings.global_batch_size
    per_epoch = math.ceil(samples / batch)
    count = f"{samples} samples / global_batch_size {batch} = {_steps(per_epoch)} an epoch"
    if rest := samples % batch:
        count += (
            f"; the last one has {rest} samples, spread over all ranks and micro-batches, so that "
            f"no sample is seen twice"
        )
    print_log(f"Stage {stage}: {_steps(numbers.steps)} of the optimizer. {count}", "current")
    asked_for = settings.max_steps is not None and settings.max_steps == numbers.steps
    if numbers.steps < FEW_STEPS and not asked_for:
        print_log(
            f"Stage {stage} takes only {_steps(numbers.steps)}, which may train next to nothing. "
            f"Lower {stage}.global_batch_size or raise {stage}.max_epochs "
            f"(is {settings.max_epochs}).",
            "current",
            logging.WARNING,
        )


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def check_ahead(run: Run, stages: list[Stage]) -> None:
    """Find errors now that would stop a later stage after days of an earlier one.

    Args:
        run: the run.
        stages: the stages to run.

    Raises:
        DPAError: unknown arguments, batches that can't be cut, missing data, a package missing for
            ``log_to``, or models that are missing or don't fit.
    """
    if (package := run.settings.log_to) is not None and not find_spec(package):
        raise DPAError(f"log_to={package!r} needs a package: pip install {package}")
    check_models(run, stages)
    for stage in stages:
        stage_settings = run.settings.of_stage(stage.name)
        data = run.settings.data_of(stage.sample_format)
        model = model_config(run, stage)
        wrong = problems([MODELS.get(model["type"])], model, ("type",))
        refuse(str(run.cfg.filename), {f"model.{key}": what for key, what in wrong})
        accumulative_counts(stage_settings, world_size(run.cfg.launcher), stage.name)
        named = {"data_path": data.files}
        if stage.sees_pictures:
            named["image_folder"] = data.folders
        key = "instructions" if data is run.settings.instructions else "captions"
        for name, path in ((name, path) for name, paths in named.items() for path in paths):
            if not Path(path).exists():
                raise DPAError(
                    f"{key}.{name}={path!r}, which stage {stage.name} reads, does not exist. "
                    f"Set it, or DPA_DATA to the folder that holds the data."
                )


def stage_config(run: Run, stage: Stage, provenance: dict) -> Config:
    """Build the complete XTuner config of a stage.

    Args:
        run: the run.
        stage: the row of the stage table.
        provenance: what the stage's weights are made from
            (:func:`dpa_xtuner.stages.provenance.provenance_of`).

    Returns:
        A new config that has MMEngine's keys only.
    """
    stage_settings = run.settings.of_stage(stage.name)
    dataset, built = dataset_config(run, stage), usable_data(run, stage)
    if "held_out" in dataset:
        dataset["held_out"] = built.cache_key["held_out"]
    config = _without_settings(run.cfg)
    config.work_dir = str(run.work_dir / stage.name)
    config.model = model_config(run, stage)
    config.train_dataloader.update(dataset=dataset)
    _set_optimizer(config, run, stage)
    numbers = schedule(stage_settings, len(built), world_size(run.cfg.launcher), stage.name)
    log_schedule(stage_settings, numbers, len(built), stage.name)
    _set_schedule(config, stage_settings, numbers, run.deepspeed)
    if stage_settings.normalize == "global" and world_size(run.cfg.launcher) > 1:
        _balance_ranks(config, stage_settings.batch_size, VISUAL_ENCODER not in stage.trains)
    _set_precision(config, run.deepspeed)
    _set_log(config, run, stage)
    hooks = _hooks(run, stage, dataset, built.fingerprint, provenance)
    config.custom_hooks = [*(config.get("custom_hooks") or []), *hooks]
    if not torch.cuda.is_available():
        config.env_cfg.dist_cfg.backend = "gloo"
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
        config.train_dataloader.pin_memory = False  # for copies to a GPU
    return config


def usable_data(run: Run, stage: Stage) -> DPADataset:
    """Build a stage's data set, and open the images of some samples.

    At most a tenth of the records is held out.

    Raises:
        DPAError: too much of it can't be used.
    """
    how = dataset_config(run, stage) | {"tokenizer": run.tokenizer}
    if how["image_processor"] is not None:
        how["image_processor"] = run.image_processor
    if asked := how.get("held_out"):
        records = DATASETS.build(how | {"held_out": 0}).records
        how["held_out"] = min(asked, records // 10)
        if how["held_out"] < asked:
            print_log(
                f"captions.held_out={asked}, but there are only {records} records: holding out a "
                f"tenth, {how['held_out']}",
                "current",
            )
    built = DATASETS.build(how)
    files = ", ".join(run.settings.data_of(stage.sample_format).files)
    _check_sample(built, files)
    if how.get("held_out"):
        _check_held_out(DATASETS.build(how | {"split": "held_out"}), files)
    return built


def _without_settings(cfg: Config) -> Config:
    ours = {*Settings.model_fields, "_scope_", "runner_type"}
    kept = {key: value for key, value in cfg.items() if key not in ours}
    return Config(copy.deepcopy(kept), filename=cfg.filename)


def _set_schedule(
    config: Config, settings: StageSettings, numbers: Schedule, deepspeed: bool
) -> None:
    """Set batches, accumulation, warm-up, length and checkpoints of a stage."""
    config.train_dataloader.update(
        batch_size=settings.batch_size,
        sampler=dict(
            type="GroupedSampler",
            length_property="modality_length",
            per_device_batch_size=settings.batch_size * numbers.accumulative_counts,
            # As LLaVA: sort within one global batch, for less padding; under normalize="global"
            # that order changes nothing else. Stock XTuner sorts fifty batches at a time, so that
            # lengths come in waves.
            mega_batch_mult=1,
        ),
        collate_fn=dict(type="dpa_collate"),
    )
    if deepspeed:
        config.strategy.update(
            gradient_accumulation_steps=numbers.accumulative_counts,
            train_micro_batch_size_per_gpu=settings.batch_size,
        )
    else:
        config.optim_wrapper.accumulative_counts = numbers.accumulative_counts
    counts = numbers.accumulative_counts
    config.param_scheduler = [
        dict(
            type="WarmupCosineLR",
            by_epoch=False,
            end=numbers.steps * counts,
            warmup_steps=numbers.warmup_steps,
            accumulative_counts=counts,
        )
    ]
    config.train_cfg = dict(type="DPATrainLoop", max_iters=numbers.steps * counts)
    config.default_hooks.checkpoint.interval = settings.save_steps * counts
    if (logger := config.default_hooks.get("logger")) is not None:
        # Log at the end of a step: within one, the log would repeat the figures of the last step.
        logger.interval = math.ceil(logger.get("interval", 10) / counts) * counts


def zero_stage(config: Config) -> int | None:
    """Return the stage of ZeRO that trains, None without DeepSpeed."""
    return config.strategy.config["zero_optimization"]["stage"] if "strategy" in config else None


def _balance_ranks(config: Config, batch_size: int, unequal: bool) -> None:
    """Have the sampler give all ranks about as many tokens.

    Args:
        config: of the stage; changed in place.
        batch_size: samples of a micro-batch, on average.
        unequal: whether micro-batches of short samples may hold more. A trained encoder keeps its
            activations of all pictures, so there none holds more pictures than ``batch_size``.
    """
    most = 4 * batch_size if unequal else batch_size
    config.train_dataloader.batch_size = most  # places, of which the sampler leaves some empty
    config.train_dataloader.sampler.update(
        micro_batch_size=batch_size, most=most, wait_each=(zero_stage(config) or 0) >= 2
    )


# Trained float32 weights run under autocast. Autocast to bfloat16 needs no scaled loss.
_OPTIM_WRAPPERS = {
    "bf16": dict(type="Bf16OptimWrapper"),
    "fp16": dict(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic"),
    "fp32": dict(type="OptimWrapper"),
}


def _set_precision(config: Config, deepspeed: bool) -> None:
    """Set the dtype of the optimizer's wrapper or of DeepSpeed's engine."""
    precision = config.model.precision
    if not deepspeed:
        config.optim_wrapper.update(_OPTIM_WRAPPERS[precision])
        return
    for name in ("bf16", "fp16"):  # DeepSpeed's float16 scales the loss itself
        config.strategy.config.setdefault(name, {}).update(enabled=precision == name)


def _set_log(config: Config, run: Run, stage: Stage) -> None:
    """Add what ``log_to`` names to MMEngine's visualizer, which writes a run's figures."""
    if run.settings.log_to is None:
        return
    name = f"{run.work_dir.name}/{stage.name}"
    backend = {
        "tensorboard": dict(type="TensorboardVisBackend"),
        "wandb": dict(type="WandbVisBackend", init_kwargs=dict(project=_PROJECT, name=name)),
        "swanlab": dict(
            type="swanlab.integration.mmengine.SwanlabVisBackend",
            init_kwargs=dict(project=_PROJECT, experiment_name=name),
        ),
    }[run.settings.log_to]
    visualizer = config.get("visualizer") or dict(type="Visualizer")
    config.visualizer = {
        **visualizer, "vis_backends": [*(visualizer.get("vis_backends") or []), backend],
    }  # fmt: skip


def _set_optimizer(config: Config, run: Run, stage: Stage) -> None:
    wrapper, rates = config.optim_wrapper, _component_rates(run, stage)
    wrapper.optimizer.lr = run.settings.of_stage(stage.name).lr
    if (constructor := constructor_of(run, stage)) is not None:
        wrapper.constructor = constructor
    if rates:
        wrapper.paramwise_cfg = {**(wrapper.get("paramwise_cfg") or {}), **rates}
    if run.deepspeed:  # DeepSpeed clips by strategy.gradient_clipping
        if "clip_grad" in wrapper and wrapper.clip_grad is None:
            config.strategy.gradient_clipping = 0.0  # XTuner's default is 1.0
        wrapper.pop("clip_grad", None)


def _component_rates(run: Run, stage: Stage) -> dict[str, float]:
    """Collect the learning rates of single components, by the setting's name."""
    stage_settings = run.settings.of_stage(stage.name)
    names = [c.rate for c in COMPONENTS if c.rate is not None and c in stage.trains]
    given = {name: getattr(stage_settings, name, None) for name in names}
    return {name: rate for name, rate in given.items() if rate is not None}


def constructor_of(run: Run, stage: Stage) -> str | None:
    """Choose what builds a stage's optimizer: the config's constructor, ours, or None (MMEngine's).

    Ours is chosen if options differ between parameters: a component has its own learning rate,
    weight decay is on (norms and biases don't decay), or ``paramwise_cfg`` is set (MMEngine's
    constructor can't apply it to tied weights).
    """
    wrapper = run.cfg.optim_wrapper
    decays = wrapper.optimizer.get("weight_decay") != 0
    differ = _component_rates(run, stage) or decays or wrapper.get("paramwise_cfg")
    return wrapper.get("constructor") or ("DPAOptimWrapperConstructor" if differ else None)


def _hooks(run: Run, stage: Stage, dataset: dict, samples: str, provenance: dict) -> list[dict]:
    settings, base = run.settings, run.work_dir
    limit = settings.data_of(stage.sample_format).skip_limit
    hooks: list[dict] = [
        dict(type="OptimizerStepHook"), dict(type="IterationSeedHook"), dict(type="ProgressBarHook")
    ]  # fmt: skip
    if (cache := getattr(settings.of_stage(stage.name), "contrast_cache", None)) is not None:
        files = {"data": provenance["data"]["sha256"], "loads": provenance["loads"]}
        hooks.append(dict(type="ContrastCacheHook", folder=cache, files=files))
    hooks.append(dict(type="SkippedSamplesHook", limit=limit))
    if dataset.get("held_out"):
        assert stage.held_out is not None, "a stage that holds captions out measures them"
        measured = dict(
            data=dict(dataset, split="held_out"),
            batch_size=settings.of_stage(stage.name).batch_size,
        )
        hooks.append(dict(type="HeldOutHook", **measured, **asdict(stage.held_out)))
    hand_over = dict(
        type="HandOverHook",
        stage=stage.name,
        stages=list(run.stages),
        loads={name: str(base / folder) for name, folder in stage.loads.items()},
        writes={name: str(base / folder) for name, folder in stage.writes.items()},
        guards=[name for name in stage.guards if name not in stage.trains],
        provenance=provenance,
        samples=samples,
    )
    hooks.append(hand_over)
    if dataset.get("held_out") and stage.sees_pictures:
        on_proxy = stage.loads.keys() & {LLM, LLM_ADAPTER}
        original = run.cfg.model.llm.to_dict() if on_proxy else None
        hooks.append(dict(type="LeakageHook", **measured, original=original))
    return hooks


def _check_held_out(dataset: DPADataset, files: str) -> None:
    report = check_dataset(dataset, sample=CHECKED_AT_START)
    found = report.image_problems
    if not found:
        return
    told = f"{len(found)} of {report.checked} captions that {files} holds out have no usable image"
    if len(found) == report.checked:
        raise DPAError(
            f"{told}, so nothing could be measured on them. Put the images there, or set "
            f"captions.held_out=0:\n{list_problems(found)}"
        )
    print_log(f"{told}: they are not measured\n{list_problems(found)}", "current", logging.WARNING)


def _check_sample(dataset: DPADataset, files: str) -> None:
    # On all ranks: they draw the same samples, so they stop together.
    report = check_dataset(dataset, sample=CHECKED_AT_START)
    if not report.ok:
        print_log(f"Some records of {files} can't be used:\n{report}", "current", logging.WARNING)
    # So few samples say little about a fraction of 1 %, but much about several times that.
    if len(report.image_problems) > 5 * dataset.skip_limit * report.checked:
        raise DPAError(
            f"{len(report.image_problems)} of {report.checked} samples drawn from {files} have no "
            f"usable image, several times skip_limit={dataset.skip_limit:g}; see all of them with "
            f"tools/check_data.py:\n{list_problems(report.image_problems)}"
        )


def dataset_config(run: Run, stage: Stage) -> dict:
    """Build the config of a stage's :class:`dpa_xtuner.data.DPADataset`.

    Args:
        run: the run.
        stage: the row of the stage table.
    """
    stage_settings, cfg = run.settings.of_stage(stage.name), run.cfg
    sees = stage.sees_pictures
    dataset = dict(
        type="DPADataset",
        **run.settings.data_of(stage.sample_format).model_dump(exclude_defaults=True),
        tokenizer=cfg.tokenizer.to_dict(),
        image_processor=cfg.image_processor.to_dict() if sees else None,
        sample_format=stage.sample_format,
        max_length=stage_settings.max_length,
        pad_image_to_square=stage_settings.pad_image_to_square,
        background=stage_settings.background,
    )
    if stage.sample_format == "chat":
        dataset["prompt_template"] = run.settings.template
    return dataset | run.tiles if sees else dataset


def model_config(run: Run, stage: Stage) -> dict:
    """Build the config of a stage's model.

    Args:
        run: the run.
        stage: the row of the stage table.
    """
    stage_settings = run.settings.of_stage(stage.name)
    # The config's other keys of the model go to its class, which knows its arguments.
    model = {**run.cfg.model.to_dict(), "type": "ProxyLLM", "normalize": stage_settings.normalize}
    if isinstance(stage_settings, PictureSettings):
        model |= {"type": "DPALLaVAModel", "loss": stage_settings.loss}
    for component in COMPONENTS:
        component.configure(model, run, stage)
    return model
