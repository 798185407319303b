"""Finds what a format can't express, before any weight is loaded."""

import copy

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
)
from xtuner.model.modules import ProjectorModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.source import Source
from dpa_xtuner.model.configs import caps_attention, caps_logits
from dpa_xtuner.model.encoders import VisionEncoderSpec
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM, embedding_scale

FORMATS = ("hf", "xtuner", "parts", LLM)
"""hf: transformers' LLaVA; xtuner: XTuner's own format; parts: each trained component in a folder;
llm: the trained LLM alone, for further tuning."""

_QUANTISED = "the LLM is quantised: adding an adapter to such weights gives another model"


def refuse_inexpressible(source: Source, fmt: str) -> None:
    """Refuse a format that can't hold the trained model.

    Raises:
        DPAError: lists all reasons, one a line, and the formats that can hold it.
    """
    if reasons := inexpressible(source, fmt):
        # Don't advise llm, which leaves the projector out.
        able = [other for other in FORMATS if other != LLM and not inexpressible(source, other)]
        listed = "\n".join(f"  {reason}" for reason in reasons)
        raise DPAError(
            f"This model can't be exported with --format {fmt}:\n{listed}\n"
            f"--format {' or --format '.join(able)} can."
        )


def inexpressible(source: Source, fmt: str) -> list[str]:
    """List the reasons why a format can't hold the model; empty if it can."""
    if fmt == "parts":
        return []
    if fmt == LLM:
        return _llm(source)
    if not source.stage.sees_pictures:
        return [f"stage {source.stage.name} has neither visual encoder nor projector"]
    run, reasons = source.run, [*_encoder(source, fmt), *_projector(source, fmt)]
    if run.settings.max_tiles > 1:
        reasons.append(f"max_tiles={run.settings.max_tiles}: an image is cut into tiles")
    if has_quantised_llm(source) and (fmt == "hf" or not keeps_adapter(source)):
        reasons.append(_QUANTISED)
    if type(run.llm_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reasons.append(f"the LLM's class is not part of transformers: {run.cfg.model.llm.type}")
    return reasons + _version(source, fmt)


def has_quantised_llm(source: Source) -> bool:
    """Tell whether the LLM was quantised in training."""
    published = getattr(source.run.llm_config, "quantization_config", None)
    return bool(source.run.cfg.model.llm.get("quantization_config") or published)


def keeps_adapter(source: Source) -> bool:
    """Tell whether the published LLM plus at most one adapter gives the trained model.

    It does not for InternLM, whose published weights have other names than the adapter's LLaMA
    layers, nor for Gemma-2, which xtuner loads without its cap on attention.
    """
    begun_or_trained = [*source.inputs(), *source.stage.trains]
    adapters, whole = begun_or_trained.count(LLM_ADAPTER), LLM in begun_or_trained
    loader = str(source.run.cfg.model.llm.type)
    ours = not loader.startswith("transformers.") or caps_attention(source.run.llm_config)
    return not whole and adapters <= 1 and not ours


def extra_tokens(source: Source) -> int:
    """Count the encoder's tokens that are not patches, such as a class token, without weights."""
    config, spec = source.run.encoder_config, source.run.encoder_spec
    size = spec.image_size(config)
    with torch.device("meta"):
        hidden = spec.hidden(spec.build(config), torch.zeros(1, 3, size, size))  # (1, T, C)
    return hidden.shape[1] - spec.tokens(config)


def _llm(source: Source) -> list[str]:
    if not {LLM, LLM_ADAPTER} & set(source.stage.trains):
        return [f"stage {source.stage.name} trains no LLM"]
    return [_QUANTISED] if has_quantised_llm(source) else []


def _version(source: Source, fmt: str) -> list[str]:
    config, here = source.run.llm_config, f"transformers {transformers.__version__}"
    if fmt == "hf" and not LLAVA_HOLDS_AN_LLM and caps_logits(config):
        return [f"the LLM caps its logits, and LLaVA does not in {here} (it did before 4.52)"]
    if fmt != "xtuner" or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if embedding_scale(llm) != 1:
        return [
            f"the LLM scales its embeddings where {here} looks them up, and xtuner chat puts image "
            f"features in behind that (before transformers 5 it scaled those too)"
        ]
    if caps_attention(config) and not LLAVA_HOLDS_AN_LLM and llm._supports_sdpa:
        return [f"the LLM caps its attention scores, and xtuner chat with {here} leaves that out"]
    return []


def _encoder(source: Source, fmt: str) -> list[str]:
    spec, config = source.run.encoder_spec, source.run.encoder_config
    name = f"encoder={source.run.settings.encoder['type']!r}"
    known = getattr(config, "model_type", None) in CONFIG_MAPPING and type(config) in MODEL_MAPPING
    if not known or type(spec).features is not VisionEncoderSpec.features:
        return [f"{name} is not a single encoder of transformers"]
    if fmt == "xtuner" and (config.model_type != "clip_vision_model" or spec.layer != -2):
        return [f"{name}, layer {spec.layer}: xtuner chat reads only CLIP's second-last layer"]
    if spec.layer is None:
        return [f"{name} gives the output of its final norm; LLaVA reads a layer (set layer=-2)"]
    if (extra := extra_tokens(source)) > 1:
        return [f"{name} has {extra} tokens that are not patches; LLaVA skips at most one"]
    return []


def _projector(source: Source, fmt: str) -> list[str]:
    projector, name = source.run.projector, source.run.settings.projector["type"]
    if not isinstance(projector, ProjectorModel):
        return [f"projector={name!r} is not an MLP on single patches"]
    if fmt == "hf" and projector.config.depth != 2:
        return [f"projector.depth={projector.config.depth}: LLaVA's projector has two layers"]
    return []
