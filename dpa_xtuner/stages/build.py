"""From a DPA config to the ordinary XTuner config of one of its stages."""

import copy
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dpa_xtuner.data import DPADataset, check_dataset
from dpa_xtuner.data.store import list_problems
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.model.components import COMPONENTS, PUBLISHED, own_rates
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.initial import lineage
from dpa_xtuner.stages.models import check_models, tiles
from dpa_xtuner.stages.optim import DPAOptimWrapperConstructor
from dpa_xtuner.stages.settings import DataSettings, Settings, StageSettings
from dpa_xtuner.stages.signatures import check_arguments
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


def check_ahead(cfg: Config, settings: Settings, stages: list[Stage]) -> None:
    """Find now what would stop a later stage after days of an earlier one.

    Raises:
        DPAError: arguments that nothing takes, batches that can't be cut, missing data, models
            that are missing or don't fit.
    """
    seed = cfg.get("randomness", {}).get("seed")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise DPAError(
            f"randomness.seed={seed!r} must be a number (from 0 on, below 2^32): a run that was "
            f"stopped draws the same samples again. Give --seed."
        )
    if "strategy" in cfg:
        _refuse_what_deepspeed_drops(cfg)
    check_models(cfg, settings, stages)
    outlines = [_outline(cfg, settings, stage)._cfg_dict for stage in stages]
    check_arguments(outlines, str(cfg.filename))
    world = world_size(cfg.launcher)
    for stage in stages:
        accumulative_counts(getattr(settings, stage.name), world, stage.name)
        key = "instructions" if stage.view == "chat" else "captions"
        names = ("data_path", "image_folder") if stage.sees_pictures else ("data_path",)
        for name in names:
            given = getattr(getattr(settings, key), name)
            for path in [given] if isinstance(given, str) else given:
                if not Path(path).exists():
                    raise DPAError(
                        f"{key}.{name}={path!r}, which stage {stage.name} reads, does not exist. "
                        f"Set it, or DPA_DATA to the folder that holds the data."
                    )


# What a stage sets from its own settings: path, what the base config holds, what to set instead.
_OWNED = (
    ("train_cfg", None, "<stage>.max_epochs or <stage>.max_steps"),
    ("param_scheduler", None, "<stage>.warmup_ratio"),
    ("train_dataloader.batch_size", 1, "<stage>.batch_size"),
    ("train_dataloader.dataset", None, "captions and instructions"),
    ("train_dataloader.sampler", None, "<stage>.global_batch_size"),
    ("train_dataloader.collate_fn", None, "nothing"),
    ("model.precision", None, "precision"),
    ("model.llm.torch_dtype", None, "precision"),
    ("model.visual_encoder.torch_dtype", None, "precision"),
    ("train_dataloader.batch_sampler", None, "<stage>.batch_size"),
    ("train_dataloader.num_batch_per_epoch", None, "<stage>.max_steps"),
    ("train_dataloader.drop_last", False, "nothing"),
    ("auto_scale_lr", None, "<stage>.lr"),
    ("data_preprocessor", None, "nothing"),
    ("optim_wrapper.optimizer.lr", 0.0, "<stage>.lr"),
    ("optim_wrapper.accumulative_counts", None, "<stage>.global_batch_size"),
    ("default_hooks.checkpoint.interval", -1, "<stage>.save_steps"),
    ("default_hooks.checkpoint.by_epoch", False, "nothing"),
    ("default_hooks.logger.log_metric_by_epoch", False, "nothing"),
    ("log_processor.by_epoch", False, "nothing"),
    ("model.projector_depth", None, "projector.depth"),
    ("model.type", None, "nothing"),
    ("model.normalize", None, "<stage>.normalize"),
    ("model.lora", None, "<stage>.lora"),
    ("model.llm_lora", None, "<stage>.lora"),
    ("model.loss", None, "<stage>.loss"),
    ("model.encoder", None, "encoder"),
    ("model.projector", None, "projector"),
    ("model.freeze_llm", None, "<stage>.train_llm"),
    ("model.freeze_visual_encoder", None, "nothing"),
    ("model.merged_adapter", None, "nothing"),
    ("model.pretrained_projector", None, "nothing"),
)


def refuse_owned_keys(cfg: Config, settings: Settings) -> None:
    """Refuse keys of a DPA config that the stages set themselves.

    Args:
        cfg: as the user wrote it.
        settings: read from it.

    Raises:
        DPAError: there are some, each on a line of its own.
    """
    lines = []
    for path, base, instead in _OWNED:
        node = cfg
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict | Config) else None
        if node is not None and node != base:
            way_out = "leave it out" if instead == "nothing" else f"set {instead} instead"
            lines.append(f"  {path}: each stage sets it; {way_out}")
    if cfg.optim_wrapper.get("type") not in ("OptimWrapper", "DeepSpeedOptimWrapper"):
        lines.append("  optim_wrapper.type: each stage sets it; set precision instead")
    if "strategy" in cfg and cfg.get("runner_type") != "FlexibleRunner":
        lines.append("  strategy: give --deepspeed, which sets it")
    own = cfg.optim_wrapper.get("constructor")
    for rate in own_rates(settings.tune, COMPONENTS) if own is not None else ():
        lines.append(f"  optim_wrapper.constructor={own!r} knows no tune.{rate}: leave out either")
    for kind in ("val", "test"):
        given = [f"{kind}_{name}" for name in ("dataloader", "cfg", "evaluator")]
        lacking = [key for key in given if cfg.get(key) is None]
        if 0 < len(lacking) < len(given):
            lines.append(f"  {', '.join(given)} go together, and {', '.join(lacking)} is not set")
    if cfg.get("load_from") and not cfg.get("resume"):
        lines.append("  load_from: the stages hand over by themselves")
    if cfg.default_hooks.checkpoint.get("max_keep_ckpts") in (0, 1):
        lines.append(
            "  default_hooks.checkpoint.max_keep_ckpts: at least 2, since MMEngine removes the "
            "oldest before the newest is on disk"
        )
    if lines:
        listed = "\n".join(lines)
        raise DPAError(f"{cfg.filename} (or --cfg-options) sets what it should not:\n{listed}")


def _refuse_what_deepspeed_drops(cfg: Config) -> None:
    """Refuse ways to clip gradients that DeepSpeed has not; it clips by their norm alone."""
    clip = cfg.optim_wrapper.get("clip_grad")
    if clip is None:
        if "optim_wrapper" in cfg and "clip_grad" in cfg.optim_wrapper:
            cfg.strategy.gradient_clipping = 0.0  # none; XTuner takes 1.0 where nothing is said
        return
    known = signature(torch.nn.utils.clip_grad_norm_).parameters
    usual = {"type": "norm", **{key: parameter.default for key, parameter in known.items()}}
    lines = [
        f"  optim_wrapper.clip_grad.{key}={value!r}"
        for key, value in clip.items()
        if key != "max_norm" and key in usual and value != usual[key]
    ]
    if lines:
        raise DPAError(
            "DeepSpeed clips gradients by max_norm alone and has no\n" + "\n".join(lines) + "\n"
            "Leave that out, or train without --deepspeed."
        )


def stage_config(cfg: Config, settings: Settings, stage: Stage, origin: dict) -> Config:
    """The complete XTuner config of a stage.

    Args:
        cfg: the DPA config as ``xtuner train`` left it, ``strategy`` included, completed by
            :func:`dpa_xtuner.stages.models.complete`.
        settings: read from it.
        stage: the row of the stage table.
        origin: what the stage's products are made from (:func:`origin_of`).

    Returns:
        A new config with no key but MMEngine's own, which explains itself when dumped.
    """
    own: StageSettings = getattr(settings, stage.name)
    config = _outline(cfg, settings, stage)
    built = usable_data(cfg, settings, stage)
    if "held_out" in config.train_dataloader.dataset:
        config.train_dataloader.dataset.held_out = built.encoding["held_out"]
    dataset = config.train_dataloader.dataset.to_dict()
    numbers = schedule(own, len(built), world_size(cfg.launcher), stage.name)
    if global_rank(cfg.launcher) == 0:
        tell_schedule(own, numbers, len(built), stage.name)
    _set_schedule(config, own, numbers, "strategy" in cfg)
    _set_precision(config, "strategy" in cfg)
    config.custom_hooks = config.custom_hooks + _hooks(
        settings, stage, dataset, built.fingerprint, origin, Path(cfg.work_dir)
    )
    if not torch.cuda.is_available():
        config.env_cfg.dist_cfg.backend = "gloo"
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
    return config


def _outline(cfg: Config, settings: Settings, stage: Stage) -> Config:
    """What is known of a stage's config without reading its data."""
    own: StageSettings = getattr(settings, stage.name)
    base, deepspeed = Path(cfg.work_dir), "strategy" in cfg
    config = _without_settings(cfg)
    config.work_dir = str(base / stage.name)
    config.model = model_config(config, settings, stage, base, deepspeed)
    config.train_dataloader.update(dataset=dataset_config(config, settings, stage))
    config.custom_hooks = config.get("custom_hooks") or []
    _set_optimizer(config, own, own_rates(own, stage.trains), deepspeed)
    return config


def usable_data(cfg: Config, settings: Settings, stage: Stage) -> DPADataset:
    """A stage's data set, of which a sample of images was opened.

    At most a tenth of the records is held out.

    Raises:
        DPAError: too much of it can't be used.
    """
    how = dataset_config(_without_settings(cfg), settings, stage)
    if asked := how.get("held_out"):
        records = DATASETS.build(how | {"held_out": 0}).records
        how["held_out"] = min(asked, records // 10)
        if how["held_out"] < asked and global_rank(cfg.launcher) == 0:
            print_log(
                f"captions.held_out={asked}, but there are only {records} records: a tenth, "
                f"{how['held_out']}, is held out",
                "current",
            )
    built = DATASETS.build(how)
    files = ", ".join(_data(settings, stage).files)
    _check_sample(built, files, speak=global_rank(cfg.launcher) == 0)
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
    if deepspeed:
        wrapper.pop("clip_grad", None)  # DeepSpeed clips by strategy.gradient_clipping


def constructor_of(wrapper: dict, rates: dict[str, float]) -> str | None:
    """What builds a stage's optimizer: the config's own constructor, ours, or None (MMEngine's).

    Ours is taken where parameters differ: by a component's own rate, by a weight decay that norms
    and biases are spared, or by ``paramwise_cfg``, which MMEngine's can't apply to tied weights.
    """
    differ = rates or wrapper["optimizer"].get("weight_decay") != 0 or wrapper.get("paramwise_cfg")
    return wrapper.get("constructor") or (DPAOptimWrapperConstructor.__name__ if differ else None)


def _hooks(
    settings: Settings, stage: Stage, dataset: dict, samples: str, origin: dict, base: Path
) -> list[dict]:
    own: StageSettings = getattr(settings, stage.name)
    hooks = [
        dict(type="OptimizerStepHook"), dict(type="IterationSeedHook"), dict(type="ProgressBarHook")
    ]  # fmt: skip
    if getattr(own, "contrast_cache", None) is not None:
        files = {"data": origin["data"]["sha256"], "loads": origin["loads"]}
        hooks.append(
            dict(
                type="ContrastCacheHook",
                folder=own.contrast_cache,
                files=files,
                precision=origin["precision"],
            )
        )
    hooks.append(dict(type="SkippedSamplesHook", limit=_data(settings, stage).skip_limit))
    if dataset.get("held_out"):
        how, data = asdict(stage.held_out), dict(dataset, part="held_out")
        hooks.append(dict(type="HeldOutHook", data=data, precision=origin["precision"], **how))
    return [
        *hooks,
        dict(
            type="HandOverHook",
            stage=stage.name,
            stages=list(stage_table(settings)),
            loads={name: str(base / folder) for name, folder in stage.loads.items()},
            writes={name: str(base / folder) for name, folder in stage.writes.items()},
            guards=[name for name in stage.guards if name not in stage.trains],
            origin=origin,
            samples=samples,
        ),
    ]


def origin_of(cfg: Config, settings: Settings, stage: Stage, precision: Precision) -> dict:
    """What the products of a stage are made from, as far as it is known before it starts.

    Args:
        cfg: from :func:`dpa_xtuner.stages.models.complete`.
        settings: read from it.
        stage: the row of the stage table.
        precision: what the run computes in.

    Raises:
        DPAError: the LLM, the encoder or a given projector can't be found.
    """
    own = getattr(settings, stage.name)
    data = _data(settings, stage)
    # They change no weight, but for batch_size under normalize="micro_batch"; that has to be free
    # all the same, for a run that goes on with other GPUs or less memory.
    unread = {"batch_size", "save_steps", "contrast_cache"}
    for component in COMPONENTS:
        if component not in stage.trains:
            unread.update(component.settings)
    origin = {
        "stage": stage.name,
        "config": str(cfg.filename),
        "data": data.model_dump(exclude_defaults=True, exclude={"skip_limit"})
        | {"sha256": [file_sha256(path) for path in data.files]},
        "prompt_template": settings.template if stage.view == "chat" else "plain",
        "seed": cfg.randomness.seed,
        "precision": precision.name,
        "settings": own.model_dump(exclude=unread),
        "optimizer": cfg.optim_wrapper.optimizer.to_dict(),
        "paramwise_cfg": cfg.optim_wrapper.get("paramwise_cfg"),
        "constructor": constructor_of(cfg.optim_wrapper, own_rates(own, stage.trains)),
    }
    for component in PUBLISHED:
        if component in stage.builds:
            origin[component] = component.facts(cfg, settings)
    if stage.sees_pictures:
        origin |= {
            "encoder": settings.encoder,
            "visual_select_layer": cfg.model.get("visual_select_layer"),
            "projector": settings.projector,
            "max_tiles": settings.max_tiles,
        }
    if (given := getattr(own, "init_projector", None)) is not None:
        origin["initialised_from"] = lineage(Path(given), settings.llm_name_or_path)
    return json.loads(json.dumps(origin))  # as it is read back: no tuples


def _data(settings: Settings, stage: Stage) -> DataSettings:
    return settings.instructions if stage.view == "chat" else settings.captions


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


def dataset_config(config: Config, settings: Settings, stage: Stage) -> dict:
    """The config of a stage's :class:`dpa_xtuner.data.DPADataset`.

    Args:
        config: from :func:`dpa_xtuner.stages.models.complete`.
        settings: the method's.
        stage: the row of the stage table.
    """
    own: StageSettings = getattr(settings, stage.name)
    data = _data(settings, stage)
    dataset = dict(
        type="DPADataset",
        **data.model_dump(exclude_defaults=True),
        tokenizer=config.tokenizer,
        image_processor=config.image_processor if stage.sees_pictures else None,
        view=stage.view,
        max_length=own.max_length,
        pad_image_to_square=own.pad_image_to_square,
    )
    if stage.view == "chat":
        dataset["prompt_template"] = settings.template
    if stage.sees_pictures:
        dataset |= tiles(settings)
    return dataset


def model_config(
    config: Config, settings: Settings, stage: Stage, base: Path, deepspeed: bool
) -> dict:
    """The config of a stage's model.

    Args:
        config: from :func:`dpa_xtuner.stages.models.complete`.
        settings: the method's.
        stage: the row of the stage table.
        base: the work dir, in which the components of earlier stages are.
        deepspeed: whether DeepSpeed keeps the float32 copies of the weights.
    """
    plan = StagePlan(config, settings, stage, base, deepspeed)
    # Whatever else the config says of the model goes to its class, which knows its arguments.
    model = {**config.model, "type": "ProxyLLM", "normalize": plan.own.normalize}
    if stage.sees_pictures:
        model |= {"type": "DPALLaVAModel", "loss": plan.own.loss}
    for component in COMPONENTS:
        component.configure(model, plan)
    return model
