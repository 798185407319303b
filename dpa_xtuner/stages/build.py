"""From a DPA config to the ordinary XTuner config of one of its stages."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dpa_xtuner.data import DPADataset, check_dataset
from dpa_xtuner.data.store import enforce_skip_limit
from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.configs import architecture, image_tokens, read_config
from dpa_xtuner.stages.settings import Settings, StageSettings
from dpa_xtuner.stages.signatures import refuse_unknown_arguments
from dpa_xtuner.stages.table import Stage

CHECKED_AT_START = 128
"""Samples whose images are opened before a stage starts; tools/check_data.py opens all."""


@dataclass(frozen=True)
class Schedule:
    """Numbers of a stage, in MMEngine iterations (one micro-batch per device each).

    Attributes:
        accumulative_counts: iterations of an optimizer step.
        iters: of the whole stage.
        warmup_iters: 0, or those of at least two steps.
        save_iters: between two checkpoints.
    """

    accumulative_counts: int
    iters: int
    warmup_iters: int
    save_iters: int


def world_size(launcher: str) -> int:
    """Processes of this run, known before they have met."""
    names = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}
    return int(os.environ[names[launcher]]) if launcher in names else 1


def global_rank(launcher: str) -> int:
    """This process's rank, known before the processes have met."""
    names = {"pytorch": "RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}
    return int(os.environ[names[launcher]]) if launcher in names else 0


def schedule(settings: StageSettings, samples: int, world: int, stage: str) -> Schedule:
    """Count a stage's iterations.

    Args:
        settings: of the stage.
        samples: in its training set.
        world: processes.
        stage: its name, for messages.

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
    accumulate = settings.global_batch_size // at_once
    steps = math.ceil(samples / settings.global_batch_size) * settings.max_epochs
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    # MMEngine's LinearLR fails on a warm-up of no iteration, and one of a single
    # iteration leaves the learning rate near 0 for good.
    warmup = round(settings.warmup_ratio * steps)
    return Schedule(
        accumulative_counts=accumulate,
        iters=steps * accumulate,
        warmup_iters=warmup * accumulate if warmup >= 2 else 0,
        save_iters=settings.save_steps * accumulate,
    )


def stage_config(cfg: Config, settings: Settings, stage: Stage, origin: dict) -> Config:
    """The complete XTuner config of a stage.

    Args:
        cfg: the DPA config as ``xtuner train`` left it, ``strategy`` included.
        settings: read from it.
        stage: the row of the stage table.
        origin: what the stage's products are made from (:func:`origin_of`).

    Returns:
        A new config with no key but MMEngine's own, which explains itself when dumped.
    """
    ours = {*Settings.model_fields, "_scope_", "runner_type"}
    kept = {key: value for key, value in cfg.items() if key not in ours}
    config = Config(kept, filename=cfg.filename).copy()
    own: StageSettings = getattr(settings, stage.name)
    tokenizer = config.pop("tokenizer") | {
        "pretrained_model_name_or_path": settings.llm_name_or_path
    }
    image_processor = config.pop("image_processor") | {
        "pretrained_model_name_or_path": settings.visual_encoder_name_or_path
    }
    config.update(tokenizer=tokenizer, image_processor=image_processor)

    dataset = dataset_config(config, settings, stage)
    held_out = dict(dataset, part="held_out") if "held_out" in dataset else None
    built = DATASETS.build(dataset)
    if global_rank(cfg.launcher) == 0:
        _check_sample(built)
    numbers = schedule(own, len(built), world_size(cfg.launcher), stage.name)
    deepspeed = "strategy" in config

    base = Path(cfg.work_dir)
    config.work_dir = str(base / stage.name)
    config.model = _model(config, settings, stage, base, deepspeed)
    config.train_dataloader.update(
        batch_size=own.batch_size,
        dataset=dataset,
        sampler=dict(
            type="GroupedSampler",
            length_property="modality_length",
            per_device_batch_size=own.batch_size * numbers.accumulative_counts,
            # Within one global batch order means nothing but less padding; visual
            # instructions are grouped over many, as LLaVA does.
            mega_batch_mult=None if stage.view == "chat" else 1,
        ),
        collate_fn=dict(type="dpa_collate"),
    )
    config.optim_wrapper.optimizer.lr = own.lr
    if deepspeed:
        config.strategy.update(
            gradient_accumulation_steps=numbers.accumulative_counts,
            train_micro_batch_size_per_gpu=own.batch_size,
        )
    else:
        config.optim_wrapper.accumulative_counts = numbers.accumulative_counts
    config.param_scheduler = _param_scheduler(numbers)
    config.train_cfg = dict(type="DPATrainLoop", max_iters=numbers.iters)
    config.default_hooks.checkpoint.interval = numbers.save_iters
    config.custom_hooks = config.get("custom_hooks", []) + [
        dict(type="IterationSeedHook"),
        dict(type="ProgressBarHook"),
        dict(type="SkippedSamplesHook"),
        dict(type="ProxyLLMHook", stage=stage.name, held_out=held_out, origin=origin,
             loads={part: str(base / folder) for part, folder in stage.loads.items()},
             writes={part: str(base / folder) for part, folder in stage.writes.items()}),
    ]  # fmt: skip
    if not torch.cuda.is_available():
        config.env_cfg.dist_cfg.backend = "gloo"
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
    refuse_unknown_arguments(config._cfg_dict, str(cfg.filename))
    return config


def origin_of(cfg: Config, settings: Settings, stage: Stage) -> dict:
    """What the products of a stage are made from, as far as it is known before it starts.

    Raises:
        DPAError: the LLM or the encoder can't be found.
    """
    own = getattr(settings, stage.name)
    data = settings.instructions if stage.view == "chat" else settings.captions
    origin = {
        "stage": stage.name,
        "config": str(cfg.filename),
        "data": data.model_dump(),
        "prompt_template": settings.prompt_template if stage.view == "chat" else "plain",
        "seed": cfg.randomness.seed,
        "settings": own.model_dump(exclude={"batch_size", "save_steps"}),
        "llm": _facts("llm_name_or_path", settings.llm_name_or_path, cfg.model.llm),
    }
    if "visual_encoder" in stage.builds:
        origin["visual_encoder"] = _facts(
            "visual_encoder_name_or_path",
            settings.visual_encoder_name_or_path,
            cfg.model.visual_encoder,
        )
    return origin


def _check_sample(dataset: DPADataset) -> None:
    report = check_dataset(dataset, sample=CHECKED_AT_START)
    if not report.ok:
        print_log(f"Of the data, these can't be used:\n{report}", "current", logging.WARNING)
    # So few samples say little about a share of 1 %, but much about one several times that.
    enforce_skip_limit(report.image_problems, report.checked, 5 * dataset.skip_limit)


def _facts(setting: str, name: str, template: dict) -> dict:
    config = read_config(setting, {**template, "pretrained_model_name_or_path": name})
    return {"name": name, "architecture": architecture(config)}


def dataset_config(config: Config, settings: Settings, stage: Stage) -> dict:
    """The config of a stage's :class:`dpa_xtuner.data.DPADataset`.

    Args:
        config: one whose ``tokenizer`` and ``image_processor`` name their folders.
        settings: the method's.
        stage: the row of the stage table.
    """
    own: StageSettings = getattr(settings, stage.name)
    data = settings.instructions if stage.view == "chat" else settings.captions
    dataset = dict(
        type="DPADataset",
        **data.model_dump(),
        tokenizer=config.tokenizer,
        image_processor=config.image_processor,
        view=stage.view,
        max_length=own.max_length,
        pad_image_to_square=own.pad_image_to_square,
    )
    if stage.view == "chat":
        dataset["prompt_template"] = settings.prompt_template
    if "visual_encoder" in stage.builds:
        encoder = {
            **config.model.visual_encoder,
            "pretrained_model_name_or_path": settings.visual_encoder_name_or_path,
        }
        dataset["image_tokens"] = image_tokens(read_config("visual_encoder_name_or_path", encoder))
    return dataset


def _model(config: Config, settings: Settings, stage: Stage, base: Path, deepspeed: bool) -> dict:
    own: StageSettings = getattr(settings, stage.name)
    template = config.model
    llm = template.llm | {"pretrained_model_name_or_path": settings.llm_name_or_path}
    if "llm" in stage.trains and not deepspeed:
        # Weights that an optimizer changes are float32 under autocast; DeepSpeed keeps
        # its own float32 copies.
        llm["torch_dtype"] = "torch.float32"
    model = dict(
        llm=llm, loss=own.loss, use_activation_checkpointing=template.use_activation_checkpointing
    )
    lora = None
    if "llm_adapter" in stage.trains:
        lora = dict(
            type="peft.LoraConfig", task_type="CAUSAL_LM", bias="none", **own.lora.model_dump()
        )
    if "visual_encoder" not in stage.builds:
        return dict(type="ProxyLLM", lora=lora, **model)
    encoder = template.visual_encoder | {
        "pretrained_model_name_or_path": settings.visual_encoder_name_or_path
    }
    model.update(
        type="DPALLaVAModel",
        visual_encoder=encoder,
        visual_select_layer=template.visual_select_layer,
        freeze_llm="llm" not in stage.trains,
        freeze_visual_encoder=True,
        llm_lora=lora,
    )
    if "llm_adapter" in stage.loads:
        model["merged_adapter"] = str(base / stage.loads["llm_adapter"])
    if "projector" in stage.loads:
        model["pretrained_projector"] = str(base / stage.loads["projector"])
    return model


def _param_scheduler(numbers: Schedule) -> list[dict]:
    warmup = numbers.warmup_iters
    cosine = dict(
        type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=warmup, end=numbers.iters
    )
    if not warmup:
        return [cosine]
    linear = dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=warmup)
    return [linear, cosine]
