"""Writes XTuner's own LLaVA format, or a folder for each component."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dpa_xtuner.export.chat_template import chat_template
from dpa_xtuner.export.hf import SHARD, load_tokenizer, need_room
from dpa_xtuner.export.refusals import has_quantised_llm, keeps_adapter
from dpa_xtuner.export.weights import StageWeights
from dpa_xtuner.export.xtuner_chat import chat_command
from dpa_xtuner.layout import PROVENANCE_FILE
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm_folder import save_llm
from dpa_xtuner.stages.artifacts import trained_key
from dpa_xtuner.stages.components import (
    LLM,
    LLM_ADAPTER,
    PROJECTOR,
    VISUAL_ENCODER,
)


def write_xtuner(weights: StageWeights, folder: Path) -> dict[str, Any]:
    """Write the folder that ``xtuner chat --llava`` opens, as ``xtuner convert pth_to_hf`` does.

    It always holds the projector. It holds the adapter if the model is the published LLM plus one
    adapter, else the LLM itself, at the top of the folder. It holds the visual encoder if that was
    trained.

    Args:
        weights: the weights to write.
        folder: target folder; exists.

    Returns:
        The command that opens it, and how its prompts differ from training.
    """
    source = weights.source
    writes_llm = not keeps_adapter(source)
    if writes_llm:
        _write_llm(weights, folder)
    elif LLM_ADAPTER in source.inputs():
        _copy(source.inputs()[LLM_ADAPTER], folder / LLM_ADAPTER)
    elif LLM_ADAPTER in source.stage.trains:
        _write_adapter(weights, folder / LLM_ADAPTER)
    _write_projector(weights, folder / PROJECTOR)
    if weights.has_encoder:
        _write_encoder(weights, folder / VISUAL_ENCODER)
    llm = None if writes_llm else LLM.name(source.run.settings)
    return chat_command(source, llm, folder, weights.has_encoder)


def write_parts(weights: StageWeights, folder: Path) -> dict[str, Any]:
    """Write each component that the stage trained into a folder that its own library opens.

    The LLM is a complete ``from_pretrained`` folder with its tokenizer; an adapter is added to it,
    and also written in PEFT's format. A quantised LLM, to which no adapter can be added, is left
    out.

    Args:
        weights: the weights to write.
        folder: target folder; exists.

    Returns:
        The components, and the base of the adapter if that is not the published LLM.
    """
    source = weights.source
    wanted, about = set(source.stage.trains), {}
    if weights.has_encoder:
        wanted.add(VISUAL_ENCODER)
    if LLM_ADAPTER in wanted:
        if not has_quantised_llm(source):
            wanted.add(LLM)
        if first := "".join(f" + {path}" for path in source.inputs().values()):
            about["llm_adapter_on"] = LLM.name(source.run.settings) + first
    for component in wanted:
        _WRITERS[component](weights, folder / component)
    return about | {"parts": sorted(wanted)}


def write_llm(weights: StageWeights, folder: Path) -> dict[str, Any]:
    """Write the LLM that the stage trained, with its adapter added, as ``parts`` does.

    Args:
        weights: the weights to write.
        folder: target folder.

    Returns:
        Its fingerprint, by which a further round of tuning recognises it.
    """
    llm = _write_llm(weights, folder)
    return {trained_key(LLM): fingerprint(llm, weights.source.run.precision.fingerprint_dtype)}


def _write_llm(weights: StageWeights, folder: Path) -> PreTrainedModel:
    llm, tokenizer = weights.llm(), load_tokenizer(weights.source)
    folder.mkdir(exist_ok=True)
    need_room(folder, llm.state_dict())
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = chat_template(weights.source.run.settings.template, tokenizer)
    save_llm(llm, tokenizer, folder, max_shard_size=SHARD)
    return llm


def _write_adapter(weights: StageWeights, folder: Path) -> None:
    source = weights.source
    if written := source.written(LLM_ADAPTER):
        _copy(written, folder)  # unchanged
    else:
        adapter = weights.adapter()
        assert adapter is not None, "weights.adapter() refuses a stage without one"
        adapter.save(folder, LLM.name(source.run.settings))


def _write_projector(weights: StageWeights, folder: Path) -> None:
    dtype, state = weights.dtype, weights.projector()
    state = {name: weight.to(dtype).contiguous() for name, weight in state.items()}
    projector = copy.deepcopy(weights.source.run.projector).to(dtype)
    projector.save_pretrained(folder, state_dict=state)


def _write_encoder(weights: StageWeights, folder: Path) -> None:
    folder.mkdir()
    run = weights.source.run
    run.encoder_spec.save(
        weights.visual_encoder(), folder, processor=VISUAL_ENCODER.companion(run.cfg)
    )


def _copy(written: Path, folder: Path) -> None:
    shutil.copytree(written, folder, ignore=shutil.ignore_patterns(PROVENANCE_FILE))


_WRITERS: dict[str, Callable] = {
    LLM: _write_llm,
    LLM_ADAPTER: _write_adapter,
    VISUAL_ENCODER: _write_encoder,
    PROJECTOR: _write_projector,
}
