"""What a stage needs on each GPU: weights, gradients, optimizer states, activations.

Nothing is loaded. Parameters are counted on models of the published size without memory (the
meta device); activations are what autograd keeps of the decoder's own forward pass, run on
tensors without content.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from mmengine.config import Config
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss.head import LOGITS_AT_ONCE
from dpa_xtuner.model.components import LLM, LLM_ADAPTER, VISUAL_ENCODER, lora_targets
from dpa_xtuner.model.configs import NotFound, model_class
from dpa_xtuner.model.encoders import Encoder, build_encoder
from dpa_xtuner.model.llm import add_lora, decode
from dpa_xtuner.model.projectors import build_projector, image_tokens
from dpa_xtuner.model.published import published_config
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.run import fill_in_loaders
from dpa_xtuner.stages.settings import Settings
from dpa_xtuner.stages.table import Stage

ZERO_STAGES = (0, 1, 2, 3)
"""0 is training without DeepSpeed."""

_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, twice with overlap_comm
_LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters
# Bits of a 4-bit weight with its share of the scales (QLoRA, arXiv 2305.14314, section 3).
_NF4_BITS, _NF4_DOUBLE_BITS = 4.5, 4.127


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        parameters: weights, trained and frozen; without DeepSpeed also the bfloat16 copies
            of trained float32 weights that autocast keeps.
        gradients: of the trained weights.
        optimizer: AdamW's two moments, and with DeepSpeed the float32 weights.
        buffers: for reducing gradients, and with ZeRO-3 for gathered weights.
        activations: kept for the backward pass, with one layer's that are computed again.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """All of them; CUDA's own memory and fragmentation come on top."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Counts:
    """Parameters of a stage's model, by what becomes of them.

    Attributes:
        trained: number of those with gradients.
        frozen: number of the others.
        frozen_bytes: what the others take.
    """

    trained: int
    frozen: int
    frozen_bytes: float


def state_memory(counts: Counts, gpus: int, zero: int) -> Memory:
    """Weights, gradients and optimizer states, by the ZeRO paper (arXiv 1910.02054).

    | bytes per trained parameter | weights  | gradients | optimizer          |
    |-----------------------------|----------|-----------|--------------------|
    | without DeepSpeed           | 4 and 2  | 4         | 8                  |
    | ZeRO-1                      | 2        | 2         | 12 / GPUs          |
    | ZeRO-2                      | 2        | 2 / GPUs  | 12 / GPUs          |
    | ZeRO-3                      | 2 / GPUs | 2 / GPUs  | 12 / GPUs          |

    ZeRO-3 shares out the frozen weights as well.

    Args:
        counts: of the stage's model.
        gpus: number of processes.
        zero: one of :data:`ZERO_STAGES`.
    """
    trained, share = counts.trained, 1 / gpus
    if zero == 0:
        buckets = 4 * trained if gpus > 1 else 0  # DistributedDataParallel's
        return Memory(6 * trained + counts.frozen_bytes, 4 * trained, 8 * trained, buckets, 0)
    parameters = 2 * trained + counts.frozen_bytes
    gradients = 2 * trained * (share if zero > 1 else 1)
    buckets = 2 * 2 * _BUCKET
    if zero == 3:
        return Memory(parameters * share, gradients, 12 * trained * share, buckets + 2 * _LIVE, 0)
    return Memory(parameters, gradients, 12 * trained * share, buckets, 0)


class StageModel:
    """The sizes of one stage's model, without its weights.

    Args:
        cfg: a DPA config.
        settings: read from it.
        stage: the row of the stage table.

    Attributes:
        counts: its parameters.
        image_tokens: tokens that an image takes in the sequence; 0 where the stage has none.

    Raises:
        DPAError: neither a folder, nor the hub, nor the table of published sizes has a model,
            or the run is in float32.
    """

    def __init__(self, cfg: Config, settings: Settings, stage: Stage):
        if settings.precision == "fp32":
            raise DPAError(
                "precision='fp32': the memory of 16-bit runs is computed, for GPUs. Leave it out."
            )
        cfg = fill_in_loaders(cfg, settings, Precision("bf16"))  # float16 takes as much
        self.loader, self.stage, self.settings = cfg.model.llm, stage, settings
        self.own = getattr(settings, stage.name)
        self.targets = lora_targets(cfg, settings)
        self.checkpointing = cfg.model.get("use_activation_checkpointing", True)
        self.llm_config = published_config("llm_name_or_path", self.loader)
        self.image_tokens = 0
        self.visual_bytes = 0  # of an image: the encoder's hidden states
        llm_parts, frozen, frozen_bytes = self._count_llm()
        trained = llm_parts
        if stage.sees_pictures:
            kind = build_encoder(settings.encoder)
            config = _encoder_config(kind, settings.visual_encoder_name_or_path)
            size = _bytes_of(cfg.model.visual_encoder.get("torch_dtype"))
            with torch.device("meta"):
                encoder = kind.build(config)
                self.projector = build_projector(
                    settings.projector, kind.hidden_size(config), self.llm_config.hidden_size
                )
            encoder.requires_grad_(VISUAL_ENCODER in stage.trains)
            if VISUAL_ENCODER in stage.trains:
                kind.freeze_unread(encoder)
            learns = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
            trained += learns
            frozen += _numel(encoder) - learns
            frozen_bytes += size * (_numel(encoder) - learns)
            trained += _numel(self.projector)
            self.patches = kind.tokens(config), kind.hidden_size(config)
            self.image_tokens = image_tokens(settings.encoder, settings.projector, config)
            layers = getattr(config, "num_hidden_layers", 0) + 1
            self.visual_bytes = size * layers * self.patches[0] * self.patches[1]
        self.counts = Counts(trained, frozen, frozen_bytes)

    def _count_llm(self) -> tuple[int, int, float]:
        """Of the LLM: parameters trained, parameters frozen, and the bytes of these."""
        llm = self._llm(self.llm_config, torch.float32)
        base, head = _numel(llm), llm.get_output_embeddings()
        if LLM in self.stage.trains:
            return base, 0, 0.0
        linear = sum(m.weight.numel() for m in llm.modules()
                     if isinstance(m, nn.Linear) and m is not head)  # fmt: skip
        frozen_bytes = _bytes_of(self.loader.get("torch_dtype")) * base
        bits = _quantised_bits(self.loader.get("quantization_config"))
        if bits is not None:
            frozen_bytes = linear * bits / 8 + frozen_bytes / base * (base - linear)
        adapter = 0
        if LLM_ADAPTER in self.stage.trains:
            adapter = _numel(self._with_lora(llm)) - base
        return adapter, base, frozen_bytes

    def _llm(self, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
        owner = model_class(self.loader)
        with torch.device("meta"), _default_dtype(dtype):
            return owner(config) if hasattr(owner, "config_class") else owner.from_config(config)

    def _with_lora(self, llm: nn.Module) -> nn.Module:
        lora = LoraConfig(target_modules=self.targets, **self.own.lora.model_dump())
        with torch.device("meta"):
            return add_lora(llm, lora)

    def memory(self, gpus: int, zero: int, length: int | None = None) -> tuple[Memory, float]:
        """What the stage needs on each GPU.

        Args:
            gpus: number of processes.
            zero: one of :data:`ZERO_STAGES`.
            length: tokens of each sample, its images' among them; the stage's ``max_length``,
                the most there can be, where it is None.

        Returns:
            The bytes as the config says, and those of the activations if it said the opposite
            of ``use_activation_checkpointing``.
        """
        length = length or self.own.max_length
        recomputed, kept = (self._activations(length, zero, c) for c in (True, False))
        if not self.checkpointing:
            recomputed, kept = kept, recomputed
        return replace(state_memory(self.counts, gpus, zero), activations=recomputed), kept

    def _activations(self, length: int, zero: int, checkpointing: bool) -> float:
        batch, layers = self.own.batch_size, self.llm_config.num_hidden_layers
        one, two = (self._kept(n, length, zero, checkpointing) for n in (1, 2))
        total = one + (layers - 1) * (two - one)
        if checkpointing:  # one layer at a time is computed again, with all that it keeps
            one, two = (self._kept(n, length, zero, False) for n in (1, 2))
            total += two - one
        return total + self._head(batch * length) + self._images(batch, zero)

    def _kept(self, layers: int, length: int, zero: int, checkpointing: bool) -> int:
        """Bytes that autograd keeps of a micro-batch's pass through a decoder of few layers.

        The difference between two micro-batches and one leaves out what does not depend on
        the data: the weights, and the copies of them that autocast makes.
        """
        config = copy.deepcopy(self.llm_config)
        config.num_hidden_layers = layers
        eager = self.loader.get("attn_implementation") == "eager"
        config._attn_implementation = (
            "eager" if eager else "sdpa"
        )  # keeps what flash attention does
        full = LLM in self.stage.trains
        llm = self._llm(config, torch.float32 if full and not zero else torch.bfloat16)
        if LLM_ADAPTER in self.stage.trains:
            llm = self._with_lora(llm)
        else:
            llm.requires_grad_(full)
        if zero:
            llm.to(torch.bfloat16)
        if checkpointing:
            llm.gradient_checkpointing_enable()
        llm.train()
        batch = self.own.batch_size
        with FakeTensorMode(allow_non_fake_inputs=True):
            llm.to_empty(device="cpu")
            dtype = llm.get_input_embeddings().weight.dtype

            def run(samples: int) -> int:
                shape = (samples, length, self.llm_config.hidden_size)
                inputs = torch.empty(shape, dtype=dtype).requires_grad_()
                places = torch.arange(length).expand(samples, -1)
                return _saved(
                    lambda: decode(llm, {"inputs_embeds": inputs, "position_ids": places}), zero
                )

            return run(2 * batch) - run(batch)

    def _head(self, tokens: int) -> float:
        """Head and loss of so many supervised tokens: see :mod:`dpa_xtuner.loss.head`."""
        vocabulary, width = self.llm_config.vocab_size, self.llm_config.hidden_size
        chunk = min(LOGITS_AT_ONCE, tokens * vocabulary) * (2 + 4 + 2)  # product, logits, slope
        trained = LLM in self.stage.trains
        return chunk + (4 * vocabulary * width if trained else 2 * tokens * width)

    def _images(self, batch: int, zero: int) -> float:
        if not self.image_tokens:
            return 0
        most = self.settings.max_tiles
        images = batch * (most + 1 if most > 1 else 1)
        projector = copy.deepcopy(self.projector).train()
        if zero:
            projector.to(torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            projector.to_empty(device="cpu")
            dtype = next(projector.parameters()).dtype

            def run(count: int) -> int:
                features = torch.empty((count, *self.patches), dtype=dtype)
                return _saved(lambda: projector(features), zero)

            return run(2 * images) - run(images) + images * self.visual_bytes


def _saved(forward: Callable[[], Any], zero: int) -> int:
    """Bytes of the storages that autograd keeps of a forward pass."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=not zero)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with autocast, hooks:
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def _encoder_config(kind: Encoder, name: str) -> PretrainedConfig:
    try:
        return kind.config(name)
    except NotFound:
        return published_config("visual_encoder_name_or_path", kind.loader(name))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_of(dtype: str | torch.dtype | None) -> int:
    if dtype is None:
        return 4
    return getattr(torch, str(dtype).removeprefix("torch.")).itemsize


def _quantised_bits(cfg: dict | None) -> float | None:
    if not cfg:
        return None
    if cfg.get("load_in_8bit"):
        return 8
    return _NF4_DOUBLE_BITS if cfg.get("bnb_4bit_use_double_quant") else _NF4_BITS


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
