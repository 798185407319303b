"""Rehearse a config: tiny random models of the same architectures, and a few samples.

Everything else is the same as in the real run: hand-over, LoRA, freezing, loss, DeepSpeed,
saving. The tiny models and the samples are in ``inputs``, in the rehearsal's own folder.
"""

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from PIL import Image
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from dpa_xtuner.data import Record, read_records
from dpa_xtuner.data.problems import Problem, list_problems
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json, whole_folder, write_json
from dpa_xtuner.layout import PROVENANCE_FILE
from dpa_xtuner.model.configs import NotFound, model_class
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.projectors import build_projector
from dpa_xtuner.model.published import published_config
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import KIND
from dpa_xtuner.stages.build import global_rank, world_size
from dpa_xtuner.stages.components import LLM, PROJECTOR, VISUAL_ENCODER
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import CaptionSettings, DataSettings

PRECISION = Precision("bf16")
"""The dtype of published weights, in which the tiny models are written."""
SAMPLES = 32
STEPS = 4
_HELD_OUT = 3
_MICRO_BATCHES = 2  # of an optimizer step
_SOURCES = "sources.json"
_WAIT_SECONDS = 600
_TINY_LLM = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
NOTE = f"""This folder is a rehearsal: tiny random models, {SAMPLES} samples, {STEPS} steps a
stage. Nothing in it is worth keeping. The next rehearsal starts by emptying it.
"""


def rehearse(cfg: Config) -> Config:
    """Replace models and data, and shorten the stages.

    In the first stage, rank 0 empties the rehearsal's folder and writes its inputs while the
    other ranks wait. Later stages find the inputs there.

    Args:
        cfg: the DPA config; not changed.

    Returns:
        The config of the rehearsal. Its ``work_dir`` ends in ``-rehearsal``.

    Raises:
        DPAError: settings that can't be used, or an architecture is unknown without the hub.
    """
    run = Run.of(cfg, PRECISION)
    base = Path(f"{cfg.work_dir.rstrip('/')}-rehearsal")
    inputs = base / "inputs"
    if os.environ.get("DPA_REHEARSAL") != str(base):
        if global_rank(cfg.launcher) == 0:
            print_log(f"Rehearsing {cfg.filename} in {base}", "current")
            _empty(base, next(iter(run.stages)))
            with whole_folder(inputs) as partial:
                make_inputs(run, partial)
                write_json(partial / "launch.json", _launch())
        else:
            _wait_for(inputs / "launch.json")
        os.environ.update(DPA_REHEARSAL=str(base), DPA_CACHE=str(base / "cache"))
    cfg = _shortened(cfg, run, inputs)
    cfg.work_dir = str(base)
    return cfg


def _empty(base: Path, first: str) -> None:
    if os.environ.get("DPA_STAGE", first) != first:
        raise DPAError(f"A rehearsal always begins with stage {first}: unset DPA_STAGE.")
    if base.exists() and not (base / "REHEARSAL.txt").is_file():
        raise DPAError(f"{base} is needed for the rehearsal, but has other files. Move it away.")
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    (base / "REHEARSAL.txt").write_text(NOTE)


def _shortened(cfg: Config, run: Run, inputs: Path) -> Config:
    cfg, settings = copy.deepcopy(cfg), run.settings
    batch = 2
    steps = {
        "batch_size": batch,
        "global_batch_size": batch * world_size(cfg.launcher) * _MICRO_BATCHES,
        "max_steps": STEPS,
        "max_epochs": STEPS,
        "save_steps": STEPS // 2,
    }
    cfg.merge_from_dict(
        {
            LLM.setting: str(inputs / LLM),
            VISUAL_ENCODER.setting: str(inputs / VISUAL_ENCODER),
            **{name: _data(data, inputs, name) for name, data in _data_read(run).items()},
            **dict.fromkeys(run.stages, steps),
        }
    )
    if (logger := cfg.default_hooks.get("logger")) is not None:
        logger.interval = min(logger.get("interval", _MICRO_BATCHES), _MICRO_BATCHES)
    if settings.tune.init_projector is not None:
        cfg.tune.init_projector = str(inputs / PROJECTOR)
    llm = cfg.model.get(LLM, {})
    if llm.get("quantization_config") and not torch.cuda.is_available():
        del llm["quantization_config"]
        print_log(
            "bitsandbytes needs a GPU and there is none: rehearsing without "
            "model.llm.quantization_config, so the LLM is not quantised here",
            "current",
        )
    return cfg


def _is_here(file: str, images: str) -> bool:
    return Path(file).exists() and Path(images).is_dir()


def _targets(data: DataSettings, inputs: Path, name: str) -> list[Path]:
    if len(data.files) == 1:
        return [inputs / f"{name}.json"]
    return [inputs / f"{name}_{i}.json" for i in range(len(data.files))]


def _data(data: DataSettings, inputs: Path, name: str) -> dict:
    both = zip(data.files, data.folders, strict=True)
    return {
        "data_path": [str(target) for target in _targets(data, inputs, name)],
        "image_folder": [i if _is_here(f, i) else str(inputs / "images") for f, i in both],
        # With so few samples, one unusable sample says nothing about all data, and a small
        # share or weight would leave no sample at all.
        "skip_limit": 1.0,
        "share": 1.0,
        "weights": None,
        **({"held_out": _HELD_OUT} if isinstance(data, CaptionSettings) else {}),
    }


def _data_read(run: Run) -> dict[str, DataSettings]:
    """Collect the data that the run's stages read, by the setting's name."""
    settings = run.settings
    read = [settings.data_of(stage.sample_format) for stage in run.stages.values()]
    named = {"captions": settings.captions, "instructions": settings.instructions}
    return {name: data for name, data in named.items() if data in read}


def make_inputs(run: Run, folder: Path) -> None:
    """Write a tiny LLM, a tiny encoder and a few samples.

    Args:
        run: names the classes of the models, and the user's data, whose first records are used if
            it exists; in :data:`PRECISION`.
        folder: target folder. Gets ``llm``, ``visual_encoder``, ``captions.json`` and
            ``instructions.json``; also ``images`` if data is generated, and ``projector`` if
            ``tune.init_projector`` is set.
    """
    cfg, settings = run.cfg, run.settings
    tokenizer = _tokenizer(cfg)
    tokenizer.save_pretrained(folder / LLM)
    _tiny_llm(cfg.model.llm, tokenizer).save_pretrained(folder / LLM)
    name = settings.visual_encoder_name_or_path
    write_tiny_encoder(settings.encoder, name, folder / VISUAL_ENCODER)
    if settings.tune.init_projector is not None:
        _tiny_projector(run, folder)
    sources = {}
    for name, data in _data_read(run).items():
        for file, images, target in zip(
            data.files, data.folders, _targets(data, folder, name), strict=True
        ):
            if _is_here(file, images):
                records = _first_records(file)
                sources[target.name] = str(Path(file).resolve())
                print_log(f"{name}: the first {len(records)} records of {file}", "current")
            else:
                records = _generated(folder / "images", with_text_only=name == "instructions")
                print_log(f"{name}: generated, since {file} or its images are not there", "current")
            target.write_text(json.dumps(records))
    write_json(folder / _SOURCES, sources)


def _first_records(file: str) -> list[dict]:
    problems: list[Problem] = []
    records: list[Record] = []
    for found in read_records(file):
        if isinstance(found, Record):
            records.append(found)
        else:
            problems.append(found)
        if len(records) == SAMPLES:
            break
    if not records:
        raise DPAError(f"{file} has no usable record:\n{list_problems(problems)}")
    return [_as_llava(record) for record in records]


@contextmanager
def users_files_named(base: Path) -> Iterator[None]:
    """Rename files in error messages: the user's file for the rehearsal's copy of it.

    Args:
        base: the work dir. If it is not a rehearsal's, messages are not changed.

    Raises:
        DPAError: the error that was raised inside, with the user's file names.
    """
    try:
        yield
    except DPAError as error:
        message, inputs = str(error), base / "inputs"
        sources = read_json(inputs / _SOURCES, "Rehearse again.")
        for copied, source in sources.items():
            message = message.replace(str(inputs / copied), source)
        if message == str(error):
            raise
        note = f"Of each file, the rehearsal reads the first {SAMPLES} records."
        raise DPAError(f"{message}\n{note}") from None


def _tiny_llm(template: dict, tokenizer):
    config = _published_or_default("llm_name_or_path", template)
    groups = config.num_attention_heads // (
        config.num_key_value_heads or config.num_attention_heads
    )
    config.update({key: value for key, value in _TINY_LLM.items() if hasattr(config, key)})
    config.update(
        {
            "num_attention_heads": 4,
            "num_key_value_heads": max(1, 4 // groups),
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    if layers := getattr(config, "layer_types", None):  # since transformers 4.54, one for each
        config.layer_types = layers[: config.num_hidden_layers]
    owner = model_class(template)
    torch.manual_seed(0)
    model = owner(config) if hasattr(owner, "config_class") else owner.from_config(config)
    return model.to(torch.bfloat16)


def write_tiny_encoder(encoder: str | dict, name: str, folder: Path) -> None:
    """Write a tiny encoder of random weights and its image processor.

    Args:
        encoder: its kind, by name or as a dict of its name and arguments.
        name: folder or hub name of the real one. If this machine does not have it, the kind's
            default configuration is used.
        folder: target folder.

    Raises:
        DPAError: the kind is unknown, or has no default configuration.
    """
    spec = build_encoder(encoder)
    try:
        config = spec.config(name, local_only=True)
    except NotFound:
        config = spec.default_config()
        print_log(f"{name} is not on this machine: rehearsing a {type(config).__name__}", "current")
    spec.write_tiny(config, folder)


def _tiny_projector(run: Run, folder: Path) -> None:
    spec, settings = build_encoder(run.settings.encoder), run.settings
    encoder = spec.config(str(folder / VISUAL_ENCODER))
    llm = json.loads((folder / LLM / "config.json").read_text())
    projector = build_projector(settings.projector, spec.hidden_size(encoder), llm["hidden_size"])
    projector.save_pretrained(folder / PROJECTOR)
    # Like the file of a stage, but without the LLM and encoder, which are not compared then.
    provenance = {
        KIND: PROJECTOR,
        "encoder": settings.encoder,
        "visual_select_layer": run.cfg.model.get("visual_select_layer"),
    }
    write_json(folder / PROJECTOR / PROVENANCE_FILE, provenance)


def _published_or_default(setting: str, template: dict) -> PretrainedConfig:
    try:
        return published_config(setting, template, local_only=True)
    except DPAError:
        owner = model_class(template)
        if owner is AutoModelForCausalLM or not hasattr(owner, "config_class"):
            raise DPAError(
                f"{setting}={template['pretrained_model_name_or_path']!r} is not on this machine, "
                f"and type={template['type']!r} does not say which architecture to rehearse. Name "
                f"the class, such as 'transformers.Qwen2ForCausalLM.from_pretrained'."
            ) from None
        print_log(f"{setting} is not on this machine: rehearsing a {owner.__name__}", "current")
        return owner.config_class()


def _tokenizer(cfg: Config):
    reader = model_class(cfg.tokenizer)
    options = {key: value for key, value in cfg.tokenizer.items() if key != "type"}
    try:
        return reader.from_pretrained(local_files_only=True, **options)
    except (OSError, ValueError):
        print_log("The tokenizer is not on this machine: rehearsing with one of bytes", "current")
        return _byte_tokenizer()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>",
    )  # fmt: skip


def _as_llava(record: Record) -> dict:
    turns = [{"from": "system", "value": record.system}] if record.system is not None else []
    for human, gpt in record.turns:
        turns += [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    images = {"image": list(record.images)} if record.images else {}
    return {"id": record.id, **images, "conversations": turns}


def _generated(folder: Path, with_text_only: bool) -> list[dict]:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    records = []
    for i in range(SAMPLES):
        colour = random.integers(0, 256, 3)
        file = f"{i}.png"
        Image.fromarray(np.full((40, 30, 3), colour, dtype=np.uint8)).save(folder / file)
        has_image = not (with_text_only and i % 4 == 0)
        human = "<image>\nDescribe it." if has_image else "Name a colour."
        record = Record(str(i), (file,) if has_image else (), None, ((human, f"Colour {colour}."),))
        records.append(_as_llava(record))
    return records


def _launch() -> dict:
    """Identify this launch: the same for all its ranks, different for each launch."""
    names = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    launch: dict[str, str | int | None] = {name: os.environ.get(name) for name in names}
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one node: one parent for all
        launch["parent"] = os.getppid()
    return launch


def _wait_for(path: Path) -> None:
    for _ in range(_WAIT_SECONDS * 2):
        if path.is_file() and json.loads(path.read_text()) == _launch():
            return
        time.sleep(0.5)
    raise DPAError(f"{path} did not appear within {_WAIT_SECONDS} s; rank 0 must have failed.")
