"""XTuner's own LLaVA format, and a folder for each part."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.chat_template import chat_template
from dpa_xtuner.export.hf import SHARD, load_tokenizer
from dpa_xtuner.export.refusals import is_quantised, keeps_adapter
from dpa_xtuner.export.room import need_room
from dpa_xtuner.export.source import Source
from dpa_xtuner.export.weights import Adapter, Weights
from dpa_xtuner.export.xtuner_chat import chat_command
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm_folder import save_llm
from dpa_xtuner.stages.artifacts import ORIGIN


def write_xtuner(
    source: Source, weights: Weights, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Write what ``xtuner chat --llava`` opens, as ``xtuner convert pth_to_hf`` does.

    ``projector`` always; ``llm_adapter`` where the published LLM and an adapter make the
    model, else the LLM itself, at the top of the folder; ``visual_encoder`` where it was trained.

    Returns:
        The command that opens it, and how it asks otherwise than training.
    """
    own = not keeps_adapter(source)
    if own:
        _write_llm(source, weights, folder, dtype)
    elif "llm_adapter" in source.inputs():
        _copy(source.inputs()["llm_adapter"], folder / "llm_adapter")
    elif "llm_adapter" in source.stage.trains:
        write_adapter(source, weights, folder / "llm_adapter")
    _write_projector(source, weights, folder / "projector", dtype)
    if weights.has_encoder:
        _write_encoder(source, weights, folder / "visual_encoder", dtype)
    llm = None if own else source.settings.llm_name_or_path
    return chat_command(source, llm, folder, weights.has_encoder)


def write_parts(
    source: Source, weights: Weights, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Write what the stage trained, each part a folder that its own library opens.

    ``llm`` is a whole ``from_pretrained`` folder with its tokenizer, an adapter added to it;
    ``llm_adapter`` that adapter as PEFT has it; ``projector``; and ``visual_encoder`` where
    a checkpoint holds one. A quantised LLM, to which no adapter can be added, is left out.

    Returns:
        The parts, and what the adapter belongs on where that is not the published LLM.
    """
    trains, about = source.stage.trains, {}
    if "llm_adapter" in trains:
        write_adapter(source, weights, folder / "llm_adapter")
        if first := "".join(f" + {path}" for path in source.inputs().values()):
            about["llm_adapter_on"] = source.settings.llm_name_or_path + first
    if {"llm", "llm_adapter"} & set(trains) and not is_quantised(source):
        (folder / "llm").mkdir()
        _write_llm(source, weights, folder / "llm", dtype)
    if "projector" in trains:
        _write_projector(source, weights, folder / "projector", dtype)
    if weights.has_encoder:
        _write_encoder(source, weights, folder / "visual_encoder", dtype)
    return about | {"parts": sorted(path.name for path in folder.iterdir())}


def write_llm(source: Source, weights: Weights, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the LLM that the stage trained, its adapter added to it, as ``parts`` does.

    Returns:
        Its fingerprint, by which a further round of tuning knows it.
    """
    llm = _write_llm(source, weights, folder, dtype)
    return {"trained_llm": fingerprint(llm, source.precision.fingerprint_dtype)}


def write_adapter(source: Source, weights: Weights, folder: Path) -> None:
    """Write the adapter that the stage trained as a PEFT folder, unchanged.

    Raises:
        DPAError: the checkpoint holds none.
    """
    if written := source.folder("llm_adapter"):
        return _copy(written, folder)
    adapter: Adapter | None = weights.adapter()
    if adapter is None:
        raise DPAError(f"{source.checkpoint} holds no adapter: it is not of this stage.")
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.settings.llm_name_or_path,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in adapter.layers}),
        inference_mode=True,
    ).save_pretrained(folder)
    state = {
        f"base_model.model.{name}.lora_{half}.weight": weight.contiguous()
        for name, both in adapter.layers.items()
        for half, weight in zip("AB", both, strict=True)
    }
    return save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


def _copy(written: Path, folder: Path) -> None:
    shutil.copytree(written, folder, ignore=shutil.ignore_patterns(ORIGIN))


def _write_llm(
    source: Source, weights: Weights, folder: Path, dtype: torch.dtype
) -> PreTrainedModel:
    llm, tokenizer = weights.llm(dtype), load_tokenizer(source)
    need_room(folder, llm.state_dict())
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = chat_template(source.settings.template, tokenizer)
    save_llm(llm, tokenizer, folder, max_shard_size=SHARD)
    return llm


def _write_projector(source: Source, weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    state = weights.projector()
    projector = copy.deepcopy(source.run.projector)
    own = {name: weight.shape for name, weight in projector.state_dict().items()}
    given = {name: weight.shape for name, weight in state.items()}
    if own != given:
        raise DPAError(
            f"The projector's weights are {given}, and projector={source.settings.projector} of "
            f"this config has {own}: it was trained with another."
        )
    state = {name: weight.to(dtype).contiguous() for name, weight in state.items()}
    projector.to(dtype).save_pretrained(folder, state_dict=state)


def _write_encoder(source: Source, weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    encoder: nn.Module = weights.visual_encoder(dtype)
    encoder.save_pretrained(folder)
    BUILDER.build(source.cfg.image_processor.to_dict()).save_pretrained(folder)
