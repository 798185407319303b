"""From a DPA config to the ordinary XTuner config of one of its stages."""

import copy
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, MODELS

from dpa_xtuner.data import DPADataset, check_dataset
from dpa_xtuner.data.problems import list_problems
from dpa_xtuner.declared import problems
from dpa_xtuner.errors import DPAError, refuse
from dpa_xtuner.model.components import COMPONENTS, own_rates
from dpa_xtuner.stages.optim import DPAOptimWrapperConstructor
from dpa_xtuner.stages.run import Run, check_models
from dpa_xtuner.stages.settings import PictureSettings, Settings, StageSettings
from dpa_xtuner.stages.table import Stage, StagePlan, stage_table

CHECKED_AT_START = 128
"""Samples whose images are opened before a stage starts; tools/check_data.py opens all."""

FEW_STEPS = 20
"""Fewer optimizer steps of a stage than these are warned of."""


@dataclass(frozen=True)
class Schedule:
    """Numbers of a stage.

    Attributes:
        accumulative_counts: MMEngine's iterations (one micro-batch per device each) of an
            optimizer step.
        steps: optimizer steps of the whole stage.
        warmup_steps: those of the warm-up.
        save_steps: those between two checkpoints.
    """

    accumulative_counts: int
    steps: int
    warmup_steps: int
    save_steps: int


def world_size(launcher: str) -> int:
    """Processes of this run, known before they have met."""
    return _from_launcher(launcher, "WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", alone=1)


def global_rank(launcher: str) -> int:
    """This process's rank, known before the processes have met."""
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
    """Micro-batches that make an optimizer step.

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
        settings: of the stage.
        samples: in its training set.
        world: processes.
        stage: its name, for messages.

    Raises:
        DPAError: the global batch can't be cut into whole micro-batches.
    """
    accumulate = accumulative_counts(settings, world, stage)
    steps = math.ceil(samples / settings.global_batch_size) * settings.max_epochs
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    # As transformers' Trainer; but the first step of a warm-up has a rate of 0, so that one
    # step is always left after it.
    warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    return Schedule(accumulate, steps, warmup, settings.save_steps)


def tell_schedule(settings: StageSettings, numbers: Schedule, samples: int, stage: str) -> None:
    """Log the steps of a stage, how its last batch is formed, and whether they are too few.

    Args:
        settings: of the stage.
        numbers: counted by :func:`schedule`.
        samples: in its training set.
        stage: its name.
    """
    batch = settings.global_batch_size
    per_epoch = math.ceil(samples / batch)
    told = f"{samples} samples / global_batch_size {batch} = {_steps(per_epoch)} an epoch"
    if rest := samples % batch:
        told += (
            f"; the last is of {rest} samples, spread over all ranks and micro-batches: no sample "
            f"is seen twice"
        )
    print_log(f"Stage {stage}: {_steps(numbers.steps)} of the optimizer. {told}", "current")
    asked_for = settings.max_steps is not None and settings.max_steps == numbers.steps
    if numbers.steps < FEW_STEPS and not asked_for:
        print_log(
            f"Stage {stage} takes only {_steps(numbers.steps)}, which may train next to nothing: "
            f"{told}. Lower {stage}.global_batch_size or raise {stage}.max_epochs "
            f"(is {settings.max_epochs}).",
            "current",
            logging.WARNING,
        )


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def check_ahead(run: Run, stages: list[Stage]) -> None:
    """Find now what would stop a later stage after days of an earlier one.

    Args:
        run: the run.
        stages: those that are to be run.

    Raises:
        DPAError: arguments that nothing takes, batches that can't be cut, missing data, models
            that are missing or don't fit.
    """
    check_models(run, stages)
    for stage in stages:
        own, data = run.settings.of_stage(stage.name), run.settings.data_of(stage.sample_format)
        model = _outline(run, stage).model.to_dict()
        wrong = problems([MODELS.get(model["type"])], model, ("type",))
        refuse(str(run.cfg.filename), {f"model.{key}": what for key, what in wrong})
        accumulative_counts(own, world_size(run.cfg.launcher), stage.name)
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
    """The complete XTuner config of a stage.

    Args:
        run: the run.
        stage: the row of the stage table.
        provenance: what the stage's weights are made from
            (:func:`dpa_xtuner.stages.provenance.provenance_of`).

    Returns:
        A new config with no key but MMEngine's own, which explains itself when dumped.
    """
    own = run.settings.of_stage(stage.name)
    config = _outline(run, stage)
    built = usable_data(run, stage)
    if "held_out" in config.train_dataloader.dataset:
        config.train_dataloader.dataset.held_out = built.encoding["held_out"]
    dataset = config.train_dataloader.dataset.to_dict()
    numbers = schedule(own, len(built), world_size(run.cfg.launcher), stage.name)
    if global_rank(run.cfg.launcher) == 0:
        tell_schedule(own, numbers, len(built), stage.name)
    _set_schedule(config, own, numbers, run.deepspeed)
    _set_precision(config, run.deepspeed)
    config.custom_hooks = config.custom_hooks + _hooks(
        run.settings, stage, dataset, built.fingerprint, provenance, run.work_dir
    )
    if not torch.cuda.is_available():
        config.env_cfg.dist_cfg.backend = "gloo"
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
    return config


def _outline(run: Run, stage: Stage) -> Config:
    """What is known of a stage's config without reading its data."""
    config = _without_settings(run.cfg)
    config.work_dir = str(run.work_dir / stage.name)
    config.model = model_config(config, run.settings, stage, run.work_dir, run.deepspeed)
    config.train_dataloader.update(dataset=dataset_config(run, stage))
    config.custom_hooks = config.get("custom_hooks") or []
    own = run.settings.of_stage(stage.name)
    _set_optimizer(config, own, own_rates(own, stage.trains), run.deepspeed)
    return config


def usable_data(run: Run, stage: Stage) -> DPADataset:
    """A stage's data set, of which a sample of images was opened.

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
        if how["held_out"] < asked and global_rank(run.cfg.launcher) == 0:
            print_log(
                f"captions.held_out={asked}, but there are only {records} records: a tenth, "
                f"{how['held_out']}, is held out",
                "current",
            )
    built = DATASETS.build(how)
    files = ", ".join(run.settings.data_of(stage.sample_format).files)
    _check_sample(built, files, speak=global_rank(run.cfg.launcher) == 0)
    return built


def _without_settings(cfg: Config) -> Config:
    ours = {*Settings.model_fields, "_scope_", "runner_type"}
    kept = {key: value for key, value in cfg.items() if key not in ours}
    return Config(copy.deepcopy(kept), filename=cfg.filename)


def _set_schedule(config: Config, own: StageSettings, numbers: Schedule, deepspeed: bool) -> None:
    """Batches, learning rate, accumulation, warm-up, length and checkpoints of a stage."""
    config.train_dataloader.update(
        batch_size=own.batch_size,
        sampler=dict(
            type="GroupedSampler",
            length_property="modality_length",
            per_device_batch_size=own.batch_size * numbers.accumulative_counts,
            # As LLaVA: sorted within one global batch, for less padding; under
            # normalize="global" the order in it changes nothing else. Stock sorts fifty at a
            # time, so that lengths come in waves.
            mega_batch_mult=1,
        ),
        collate_fn=dict(type="dpa_collate"),
    )
    if deepspeed:
        config.strategy.update(
            gradient_accumulation_steps=numbers.accumulative_counts,
            train_micro_batch_size_per_gpu=own.batch_size,
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
    config.default_hooks.checkpoint.interval = numbers.save_steps * counts
    if (logger := config.default_hooks.get("logger")) is not None:
        # At the end of a step: before it, the log would repeat the figures of the step before.
        logger.interval = math.ceil(logger.get("interval", 10) / counts) * counts


# Float32 weights that are trained pass under autocast: bfloat16's needs no scaled loss.
_OPTIM_WRAPPERS = {
    "bf16": dict(type="Bf16OptimWrapper"),
    "fp16": dict(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic"),
    "fp32": dict(type="OptimWrapper"),
}


def _set_precision(config: Config, deepspeed: bool) -> None:
    """What the optimizer's wrapper, or DeepSpeed's engine, computes in."""
    precision = config.model.precision
    if not deepspeed:
        config.optim_wrapper.update(_OPTIM_WRAPPERS[precision])
        return
    for name in ("bf16", "fp16"):  # its float16 scales the loss by itself
        config.strategy.config.setdefault(name, {}).update(enabled=precision == name)


def _set_optimizer(
    config: Config, own: StageSettings, rates: dict[str, float], deepspeed: bool
) -> None:
    wrapper = config.optim_wrapper
    wrapper.optimizer.lr = own.lr
    if (constructor := constructor_of(wrapper, rates)) is not None:
        wrapper.constructor = constructor
    if rates:
        wrapper.paramwise_cfg = {**(wrapper.get("paramwise_cfg") or {}), **rates}
    if deepspeed:  # which clips by strategy.gradient_clipping
        if "clip_grad" in wrapper and wrapper.clip_grad is None:
            config.strategy.gradient_clipping = 0.0  # XTuner takes 1.0 where nothing is said
        wrapper.pop("clip_grad", None)


def constructor_of(wrapper: dict, rates: dict[str, float]) -> str | None:
    """What builds a stage's optimizer: the config's own constructor, ours, or None (MMEngine's).

    Ours is taken where parameters differ: by a component's own rate, by a weight decay that norms
    and biases are spared, or by ``paramwise_cfg``, which MMEngine's can't apply to tied weights.
    """
    decays = wrapper["optimizer"].get("weight_decay") != 0
    differ = rates or decays or wrapper.get("paramwise_cfg")
    return wrapper.get("constructor") or (DPAOptimWrapperConstructor.__name__ if differ else None)


def _hooks(
    settings: Settings, stage: Stage, dataset: dict, samples: str, provenance: dict, base: Path
) -> list[dict]:
    own = settings.of_stage(stage.name)
    hooks: list[dict] = [
        dict(type="OptimizerStepHook"), dict(type="IterationSeedHook"), dict(type="ProgressBarHook")
    ]  # fmt: skip
    if (cache := getattr(own, "contrast_cache", None)) is not None:
        files = {"data": provenance["data"]["sha256"], "loads": provenance["loads"]}
        hooks.append(
            dict(
                type="ContrastCacheHook",
                folder=cache,
                files=files,
                precision=provenance["precision"],
            )
        )
    hooks.append(
        dict(type="SkippedSamplesHook", limit=settings.data_of(stage.sample_format).skip_limit)
    )
    if dataset.get("held_out"):
        assert stage.held_out is not None, "what holds captions out measures them"
        how, data = asdict(stage.held_out), dict(dataset, split="held_out")
        hooks.append(dict(type="HeldOutHook", data=data, precision=provenance["precision"], **how))
    return [
        *hooks,
        dict(
            type="HandOverHook",
            stage=stage.name,
            stages=list(stage_table(settings)),
            loads={name: str(base / folder) for name, folder in stage.loads.items()},
            writes={name: str(base / folder) for name, folder in stage.writes.items()},
            guards=[name for name in stage.guards if name not in stage.trains],
            origin=provenance,
            samples=samples,
        ),
    ]


def _check_sample(dataset: DPADataset, files: str, speak: bool) -> None:
    # On all ranks: they draw the same samples, and stop together.
    report = check_dataset(dataset, sample=CHECKED_AT_START)
    if speak and not report.ok:
        print_log(f"Of {files}, these can't be used:\n{report}", "current", logging.WARNING)
    # So few samples say little about a share of 1 %, but much about one several times that.
    if len(report.image_problems) > 5 * dataset.skip_limit * report.checked:
        raise DPAError(
            f"{len(report.image_problems)} of {report.checked} samples drawn from {files} have no "
            f"usable image, several times skip_limit={dataset.skip_limit:g}; see all of them with "
            f"tools/check_data.py:\n{list_problems(report.image_problems)}"
        )


def dataset_config(run: Run, stage: Stage) -> dict:
    """The config of a stage's :class:`dpa_xtuner.data.DPADataset`.

    Args:
        run: the run.
        stage: the row of the stage table.
    """
    own, cfg = run.settings.of_stage(stage.name), run.cfg
    sees = stage.sees_pictures
    dataset = dict(
        type="DPADataset",
        **run.settings.data_of(stage.sample_format).model_dump(exclude_defaults=True),
        tokenizer=cfg.tokenizer.to_dict(),
        image_processor=cfg.image_processor.to_dict() if sees else None,
        sample_format=stage.sample_format,
        max_length=own.max_length,
        pad_image_to_square=own.pad_image_to_square,
        background=own.background,
    )
    if stage.sample_format == "chat":
        dataset["prompt_template"] = run.settings.template
    return dataset | run.tiles if sees else dataset


def model_config(
    config: Config, settings: Settings, stage: Stage, base: Path, deepspeed: bool
) -> dict:
    """The config of a stage's model.

    Args:
        config: filled in by :func:`dpa_xtuner.stages.run.fill_in_loaders`.
        settings: the method's.
        stage: the row of the stage table.
        base: the work dir, in which the components of earlier stages are.
        deepspeed: whether DeepSpeed keeps the float32 copies of the weights.
    """
    plan = StagePlan(config, settings, stage, base, deepspeed)
    # Whatever else the config says of the model goes to its class, which knows its arguments.
    model = {**config.model, "type": "ProxyLLM", "normalize": plan.own.normalize}
    if stage.sees_pictures:
        own = cast("PictureSettings", plan.own)
        model |= {"type": "DPALLaVAModel", "loss": own.loss}
    for component in COMPONENTS:
        component.configure(model, plan)
    return model
