"""Computes the memory of a stage on each GPU: weights, gradients, optimizer states, activations.

It loads no weights. It counts parameters of models on the meta device, in their published sizes,
and computes activations by a formula.
"""

from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

import torch
from mmengine.config import Config
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from dpa_xtuner.loss.head import LOGITS_AT_ONCE
from dpa_xtuner.model.configs import NotFound, model_class
from dpa_xtuner.model.encoders import VisionEncoderSpec, build_encoder
from dpa_xtuner.model.llm import add_lora
from dpa_xtuner.model.projectors import build_projector
from dpa_xtuner.model.published import published_config
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER, VISUAL_ENCODER
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.table import Stage

_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, twice with overlap_comm
_LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters
# Bits of a 4-bit weight with its share of the scales (QLoRA, arXiv 2305.14314, section 3).
_NF4_BITS, _NF4_DOUBLE_BITS = 4.5, 4.127


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        parameters: weights, trained and frozen; without DeepSpeed also the 16-bit copies of
            trained float32 weights that autocast keeps.
        gradients: gradients of the trained weights.
        optimizer: AdamW's two moments, and with DeepSpeed the float32 weights.
        buffers: for reducing gradients, and with ZeRO-3 for gathered weights.
        activations: kept for the backward pass; with activation checkpointing, each layer's
            input and all that one layer keeps.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Their sum; CUDA's own memory and fragmentation come on top."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Counts:
    """Parameters of a stage's model.

    Attributes:
        trained: number of parameters with gradients.
        frozen: number of the other parameters.
        frozen_bytes: bytes of the frozen ones.
    """

    trained: int
    frozen: int
    frozen_bytes: float


def state_memory(counts: Counts, gpus: int, zero: int, element: int = 2) -> Memory:
    """Compute weights, gradients and optimizer states, by the ZeRO paper (arXiv 1910.02054).

    | bytes per trained parameter | weights  | gradients | optimizer          |
    |-----------------------------|----------|-----------|--------------------|
    | without DeepSpeed           | 4 and 2  | 4         | 8                  |
    | ZeRO-1                      | 2        | 2         | 12 / GPUs          |
    | ZeRO-2                      | 2        | 2 / GPUs  | 12 / GPUs          |
    | ZeRO-3                      | 2 / GPUs | 2 / GPUs  | 12 / GPUs          |

    In float32, each 2 with DeepSpeed is a 4, and without it there is no second copy of the
    weights. ZeRO-3 splits the frozen weights as well.

    Args:
        counts: parameters of the stage's model.
        gpus: number of processes.
        zero: DeepSpeed's ZeRO stage; 0 is training without DeepSpeed.
        element: bytes of a number in the run's precision.
    """
    trained, fraction = counts.trained, 1 / gpus
    if zero == 0:
        copies = element % 4  # autocast's copies, which float32 does not need
        buckets = 4 * trained if gpus > 1 else 0  # of DistributedDataParallel
        return Memory(
            (4 + copies) * trained + counts.frozen_bytes, 4 * trained, 8 * trained, buckets
        )
    parameters = element * trained + counts.frozen_bytes
    gradients = element * trained * (fraction if zero > 1 else 1)
    buffers = element * 2 * _BUCKET
    if zero == 3:
        parameters *= fraction
        buffers += element * _LIVE
    return Memory(parameters, gradients, 12 * trained * fraction, buffers)


class StageModel:
    """The sizes of one stage's model, without its weights.

    Args:
        run: the run.
        stage: the row of the stage table.

    Attributes:
        counts: its parameters.

    Raises:
        DPAError: a model is neither in a folder, nor on the hub, nor in ``published.json``.
    """

    def __init__(self, run: Run, stage: Stage):
        cfg, dtype, self.stage = run.cfg, run.precision.dtype, stage
        self.element = dtype.itemsize
        self.settings = run.settings
        self.stage_settings: Any = run.settings.of_stage(stage.name)
        self.checkpointing = cfg.model.get("use_activation_checkpointing", True)
        self.eager = cfg.model.llm.get("attn_implementation") == "eager"
        self.llm_config = published_config("llm_name_or_path", cfg.model.llm)
        self.visual_bytes = 0
        with torch.device("meta"):
            modules = [self._llm(run, dtype)]
            if stage.sees_pictures:
                modules += self._visual(dtype)
        parameters = [p for module in modules for p in module.parameters()]
        frozen = [p for p in parameters if not p.requires_grad]
        self.counts = Counts(
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in frozen),
            sum(p.numel() * self.sizes.get(id(p), p.element_size()) for p in frozen),
        )

    def _llm(self, run: Run, dtype: torch.dtype) -> nn.Module:
        owner, loader = model_class(run.cfg.model.llm), run.cfg.model.llm
        config = self.llm_config
        llm = owner(config) if hasattr(owner, "config_class") else owner.from_config(config)
        llm.to(dtype).requires_grad_(LLM in self.stage.trains)
        head = llm.get_output_embeddings()
        linears = [m for m in llm.modules() if isinstance(m, nn.Linear) and m is not head]
        heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
        self.norms = [  # of a decoder layer: how often each is applied to a token, its channels
            (heads.get(name.rsplit(".", 1)[1], 1), norm.weight.numel())
            for name, norm in llm.get_decoder().layers[0].named_modules(prefix="layer")
            if type(norm).__name__.endswith("Norm")
        ]
        layers = config.num_hidden_layers
        self.linears = len(linears) // layers  # in each decoder layer
        self.inputs = sum(m.in_features for m in linears) // layers
        bits = _quantised_bits(loader.get("quantization_config"))
        self.quantised = bits is not None
        self.sizes = {} if bits is None else {id(m.weight): bits / 8 for m in linears}
        if LLM_ADAPTER in self.stage.trains:
            lora = self.stage_settings.lora.model_dump()
            return add_lora(llm, LoraConfig(target_modules=run.lora_targets, **lora))
        return llm

    def _visual(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Build encoder and projector, and note the bytes of an image."""
        spec, settings = build_encoder(self.settings.encoder), self.settings
        config = _encoder_config(spec, settings.visual_encoder_name_or_path)
        patches, width = spec.tokens(config), spec.hidden_size(config)
        encoder = spec.build(config).to(dtype)
        encoder.requires_grad_(VISUAL_ENCODER in self.stage.trains)
        if VISUAL_ENCODER in self.stage.trains:
            spec.freeze_unread(encoder)
        projector = build_projector(settings.projector, width, self.llm_config.hidden_size)
        # The frozen encoder's hidden states, which exist together for a moment, and the inputs and
        # outputs of the projector's layers.
        states = (getattr(config, "num_hidden_layers", 0) + 1) * width
        linears = [m for m in projector.modules() if isinstance(m, nn.Linear)]
        kept = sum(m.in_features + m.out_features for m in linears)
        self.visual_bytes = self.element * patches * (states + kept)
        return encoder, projector

    def memory(self, gpus: int, zero: int, length: int | None = None) -> Memory:
        """Compute the memory of the stage on each GPU.

        Quantised weights count as infinite under ZeRO-3, which can't split them.

        Args:
            gpus: number of processes.
            zero: DeepSpeed's ZeRO stage; 0 is training without DeepSpeed.
            length: tokens of each sample, image tokens included; None for the largest number,
                the stage's ``max_length``.
        """
        length = length or self.stage_settings.max_length
        layers = self.llm_config.num_hidden_layers
        tokens = self.stage_settings.batch_size * length
        layer, boundary = self._layer_bytes(length, zero)
        kept = tokens * (layers * boundary + layer if self.checkpointing else layers * layer)
        memory = state_memory(self.counts, gpus, zero, self.element)
        return replace(
            memory,
            parameters=inf if zero == 3 and self.quantised else memory.parameters,
            activations=kept + self._head_bytes(tokens) + self._image_bytes(),
        )

    def _layer_bytes(self, length: int, zero: int) -> tuple[float, int]:
        """Compute the bytes that one decoder layer keeps for each token, and those of its input.

        Equation 1 of Korthikanti et al. (arXiv 2205.05198) adds up what each operation of a GPT
        layer keeps: ``s b h (34 + 5 a s / h)`` bytes for ``s b`` tokens, ``h`` channels and ``a``
        heads; with checkpointing only the layer's input, ``2 s b h`` (their table 2). Below is the
        same sum for our LLMs, in bytes. They have no dropout, a gated MLP (``i`` channels) and a
        fused attention (``q`` channels in all heads); a number takes ``e`` bytes:

        ============  ==========================================================  ============
        norms         float32 input and deviation; the normed, if weights train   4 h + 4, e h
        attention     queries, keys and values, repeated for all heads            3 e q
        fused         its output; float32 sum of each head's weights              e q + 4 a
        eager         weights in float32, rounded to 16 bit; scores if capped     6 a s, e a s
        MLP           gate, its SiLU, and what it is multiplied with              3 e i
        linears       their inputs, if they or LoRA train                         e (2 h + q + i)
        LoRA          the output of its first matrix, in each linear layer        e r
        ============  ==========================================================  ============

        Under autocast, each linear layer keeps its own 16-bit copy of its input. Since
        transformers 4.57, fused attention keeps other copies: the sum is within 6 %. With 5 it is
        up to 15 % too high for batches without padding, whose keys and values are not repeated.
        """
        config, e, trains = self.llm_config, self.element, self.stage.trains
        h, i, a = config.hidden_size, config.intermediate_size, config.num_attention_heads
        q = a * (getattr(config, "head_dim", None) or h // a)
        full, adapter = LLM in trains, LLM_ADAPTER in trains
        boundary = (4 if full and not zero else e) * h
        each = 4 + boundary // h * full
        norms = sum(times * (each * channels + 4) for times, channels in self.norms)
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        fused, eager = e * q + 4 * a, (4 + e % 4 + e * capped) * a * length
        attention = 3 * e * q + (eager if self.eager else fused)
        shared = 2 * h + q + i if zero or e == 4 else self.inputs
        linears = e * shared * (full or adapter)
        lora = e * self.stage_settings.lora.r * self.linears if adapter else 0
        return norms + attention + 3 * e * i + linears + lora, boundary

    def _head_bytes(self, tokens: int) -> float:
        """Compute what head and loss keep: see :mod:`dpa_xtuner.loss.head`."""
        vocabulary, width = self.llm_config.vocab_size, self.llm_config.hidden_size
        product, logits, slope = self.element, 4, self.element
        chunk = min(LOGITS_AT_ONCE, tokens * vocabulary) * (product + logits + slope)
        if LLM in self.stage.trains:
            return chunk + 4 * vocabulary * width
        return chunk + self.element * tokens * width

    def _image_bytes(self) -> float:
        most = self.settings.max_tiles
        pictures = most + 1 if most > 1 else 1  # the tiles and the thumbnail
        return self.stage_settings.batch_size * pictures * self.visual_bytes


def stage_models(cfg: Config) -> dict[str, StageModel]:
    """Size the model of each stage of a DPA config, by the stage's name.

    Raises:
        DPAError: settings can't be used; or as :class:`StageModel`.
    """
    precision = Precision("fp32" if cfg.get("precision") == "fp32" else "bf16")
    run = Run.of(cfg, precision)
    return {name: StageModel(run, stage) for name, stage in run.stages.items()}


def _encoder_config(spec: VisionEncoderSpec, name: str) -> PretrainedConfig:
    try:
        return spec.config(name)
    except NotFound:
        return published_config("visual_encoder_name_or_path", spec.loader(name))


def _quantised_bits(cfg: dict | None) -> float | None:
    if not cfg:
        return None
    if cfg.get("load_in_8bit"):
        return 8
    return _NF4_DOUBLE_BITS if cfg.get("bnb_4bit_use_double_quant") else _NF4_BITS
