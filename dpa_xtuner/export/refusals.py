"""What a format can't express, known before any weight is loaded."""

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
from dpa_xtuner.model.encoders import Encoder
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM, embedding_scale

FORMATS = ("hf", "xtuner", "parts", LLM)
"""hf: transformers' LLaVA; xtuner: XTuner's own; parts: what the stage trained, a folder each; llm:
of that the LLM, to be tuned further."""

_QUANTISED = "the LLM is quantised, and an adapter added to such weights gives another model"


def refuse_inexpressible(source: Source, fmt: str) -> None:
    """Refuse a format that would give another model than was trained.

    Raises:
        DPAError: all reasons, a line each, and the formats that can.
    """
    if reasons := inexpressible(source, fmt):
        # llm leaves the projector out: it stands for no other format.
        able = [other for other in FORMATS if other != LLM and not inexpressible(source, other)]
        listed = "\n".join(f"  {reason}" for reason in reasons)
        raise DPAError(
            f"This model can't be exported with --format {fmt}:\n{listed}\n"
            f"--format {' or --format '.join(able)} can."
        )


def inexpressible(source: Source, fmt: str) -> list[str]:
    """Why a format can't hold the model; nothing where it can."""
    if fmt == "parts":
        return []
    if fmt == LLM:
        return _llm(source)
    if not source.sees_pictures:
        return [f"stage {source.stage.name} has neither visual encoder nor projector"]
    reasons = [*_encoder(source, fmt), *_projector(source, fmt)]
    if source.settings.max_tiles > 1:
        reasons.append(f"max_tiles={source.settings.max_tiles}: an image is cut into tiles")
    if is_quantised(source) and (fmt == "hf" or not keeps_adapter(source)):
        reasons.append(_QUANTISED)
    if type(source.run.llm_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reasons.append(f"the LLM's class is not one of transformers': {source.cfg.model.llm.type}")
    return reasons + _version(source, fmt)


def is_quantised(source: Source) -> bool:
    """Whether the LLM was quantised when it was trained."""
    published = getattr(source.run.llm_config, "quantization_config", None)
    return bool(source.cfg.model.llm.get("quantization_config") or published)


def keeps_adapter(source: Source) -> bool:
    """Whether the published LLM and one adapter beside it are what was trained.

    The LLaMA names of an adapter are not those of InternLM's published weights, and published
    weights of Gemma-2 are loaded without their cap on attention.
    """
    begun_or_trained = [*source.inputs(), *source.stage.trains]
    adapters, whole = begun_or_trained.count(LLM_ADAPTER), LLM in begun_or_trained
    loader = str(source.cfg.model.llm.type)
    ours = not loader.startswith("transformers.") or caps_attention(source.run.llm_config)
    return not whole and adapters <= 1 and not ours


def extra_tokens(source: Source) -> int:
    """Tokens of the encoder that are no patches, such as a class token: counted without weights."""
    config, kind = source.run.encoder_config, source.run.encoder_spec
    size = kind.image_size(config)
    with torch.device("meta"):
        hidden = kind.hidden(kind.build(config), torch.zeros(1, 3, size, size))
    return hidden.shape[1] - kind.tokens(config)


def _llm(source: Source) -> list[str]:
    if not {LLM, LLM_ADAPTER} & set(source.stage.trains):
        return [f"stage {source.stage.name} trains no LLM"]
    return [_QUANTISED] if is_quantised(source) else []


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
    kind, config = source.run.encoder_spec, source.run.encoder_config
    name = f"encoder={source.settings.encoder['type']!r}"
    known = getattr(config, "model_type", None) in CONFIG_MAPPING and type(config) in MODEL_MAPPING
    if not known or type(kind).features is not Encoder.features:
        return [f"{name} is not a single encoder of transformers'"]
    if fmt == "xtuner" and (config.model_type != "clip_vision_model" or kind.layer != -2):
        return [f"{name}, layer {kind.layer}: xtuner chat reads CLIP's second-last layer alone"]
    if kind.layer is None:
        return [f"{name} gives what follows its final norm; LLaVA reads a layer (set layer=-2)"]
    if (extra := extra_tokens(source)) > 1:
        return [f"{name} has {extra} tokens that are no patches; LLaVA leaves out one or none"]
    return []


def _projector(source: Source, fmt: str) -> list[str]:
    projector = source.run.projector
    if not isinstance(projector, ProjectorModel):
        return [f"projector={source.settings.projector['type']!r} is not an MLP patch by patch"]
    if fmt == "hf" and projector.config.depth != 2:
        return [f"projector.depth={projector.config.depth}: LLaVA's has two linear layers"]
    return []
