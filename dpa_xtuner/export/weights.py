"""Loads what is exported: the LLM with its adapters added, the encoder, the projector."""

import copy
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from pickle import PickleError
from typing import NamedTuple
from zipfile import is_zipfile

import torch
from mmengine.config import ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model.utils import traverse_dict

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError, install
from dpa_xtuner.export.source import Source
from dpa_xtuner.model.configs import model_class, options_refused, read_config
from dpa_xtuner.model.fingerprint import fingerprint

_LORA = re.compile(r"(.+)\.lora_([AB])\.(?:default\.)?weight")


class Adapter(NamedTuple):
    """LoRA weights: ``layers`` maps a layer's name to its A (r, in) and B (out, r)."""

    layers: dict[str, tuple[Tensor, Tensor]]
    r: int
    lora_alpha: float

    def add_to(self, module: nn.Module) -> None:
        """Add B A alpha / r to the layers' weights, in float32, rounded once.

        Raises:
            DPAError: the module has no such layers, or of other sizes.
        """
        self.refuse_other(module)
        for name, (a, b) in self.layers.items():
            weight = module.get_parameter(f"{name}.weight")
            delta = (b.float() @ a.float()) * (self.lora_alpha / self.r)
            weight.data = (weight.data.float() + delta).to(weight.dtype)

    def refuse_other(self, module: nn.Module) -> None:
        """Refuse a module whose layers are not those that the adapter is for.

        Raises:
            DPAError: it lacks layers, or they are of other sizes.
        """
        sizes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
        wrong = []
        for name, (a, b) in self.layers.items():
            own = sizes.get(f"{name}.weight")
            if own != (len(b), a.shape[1]) or len(a) != b.shape[1]:
                wrong.append(f"  {name}: A {tuple(a.shape)}, B {tuple(b.shape)}, weight {own}")
        if wrong:
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise DPAError(
                f"The adapter does not fit a {type(module).__name__}: it was trained on another "
                f"model, or is damaged.\n" + "\n".join(wrong[:5]) + more
            )


class Weights:
    """The weights of a source, each part read when it is asked for.

    Args:
        source: from :func:`dpa_xtuner.export.source.read_source`.
    """

    def __init__(self, source: Source):
        self.source = source

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """The checkpoint's state dict, empty where there is none."""
        return {} if self.source.checkpoint is None else read_checkpoint(self.source.checkpoint)

    def _below(self, prefix: str) -> dict[str, Tensor]:
        found = {k: v for k, v in self._state.items() if k.startswith(prefix)}
        return {k.removeprefix(prefix).removeprefix("base_model.model."): v
                for k, v in found.items()}  # fmt: skip

    def projector(self) -> dict[str, Tensor]:
        """Its state dict.

        Raises:
            DPAError: the checkpoint has none.
        """
        if folder := self.source.folder("projector"):
            return load_file(folder / "model.safetensors")
        if state := self._below("projector."):
            return state
        raise DPAError(f"{self.source.checkpoint} holds no projector: it is not of this stage.")

    def adapter(self) -> Adapter | None:
        """The adapter that the stage trained."""
        if folder := self.source.folder("llm_adapter"):
            return read_adapter(folder)
        lora = getattr(self.source.stage_settings, "lora", None)
        adapter = _adapter(self._below("llm."), lora.r, lora.lora_alpha) if lora else None
        if adapter:
            self._refuse_partial(adapter)
        return adapter

    def _refuse_partial(self, adapter: Adapter) -> None:
        """Refuse a checkpoint's adapter that is not for all layers that the stage adapts."""
        source = self.source
        llm = _on_meta(source.cfg.model.llm, source.run.llm_config)
        adapter.refuse_other(llm)
        targets, head = source.run.lora_targets, llm.get_output_embeddings()
        wanted = [
            name for name, module in llm.named_modules()
            if isinstance(module, nn.Linear) and module is not head
            and (targets is None or name.rsplit(".", 1)[-1] in targets)
        ]  # fmt: skip
        _refuse_missing(f"{name}.lora_A and B" for name in wanted if name not in adapter.layers)

    def llm(self, dtype: torch.dtype) -> PreTrainedModel:
        """The LLM as the stage left it, its adapters added.

        What the stage started from is added up in the dtype it was trained in, what it
        trained in ``dtype``.

        Raises:
            DPAError: weights are missing, or the checkpoint is of another stage or model.
        """
        source = self.source
        loader, inputs = dict(source.cfg.model.llm), source.inputs()
        whole = source.folder("llm") or inputs.get("llm")
        if whole:
            loader |= {"pretrained_model_name_or_path": str(whole)}
        state = _without_lora(self._below("llm."))
        if state:
            llm = _filled(_on_meta(loader, source.run.llm_config), state, source.checkpoint)
        elif source.checkpoint and "llm" in source.stage.trains:
            raise DPAError(
                f"{source.checkpoint} holds no LLM, which stage {source.stage.name} trains in "
                f"full. If it was trained by LoRA: --cfg-options {source.stage.name}.train_llm=lora"
            )
        else:
            config = read_config("llm_name_or_path", loader)
            config.use_cache = True  # without it, Gemma-2's generation settings are complained of
            llm = load_pretrained(loader, dtype if source.folder("llm") else None, config=config)
            if not whole:
                self._refuse_other("llm", llm, source.settings.llm_name_or_path)
            if "llm_adapter" in inputs:
                read_adapter(inputs["llm_adapter"]).add_to(llm)
        llm.to(dtype)
        llm.config.use_cache = True  # training turns it off
        adapter = self.adapter()
        if adapter:
            adapter.add_to(llm)
        elif "llm_adapter" in source.stage.trains:
            raise DPAError(f"{source.checkpoint} holds no adapter: it is not of this stage.")
        return llm

    def _refuse_other(self, side: str, module: nn.Module, name: str) -> None:
        """Refuse a model whose weights are not those that the stage was trained with."""
        trained = self.source.origin.get(side, {})
        now = fingerprint(module, self.source.precision.fingerprint_dtype)
        if trained.get("fingerprint", "") not in ("", now):
            raise DPAError(
                f"{name} holds other weights than {trained['name']} did when {self.source.record} "
                f"was trained with it. Put them back, or set {side}_name_or_path to that model."
            )

    @property
    def has_encoder(self) -> bool:
        """Whether the visual encoder was trained."""
        return bool(self._below("visual_encoder."))

    def visual_encoder(self, dtype: torch.dtype) -> nn.Module:
        """The encoder, as published or, where the checkpoint holds it, as trained.

        Raises:
            DPAError: weights are missing.
        """
        source = self.source
        loader, trained = dict(source.cfg.model.visual_encoder), self._below("visual_encoder.")
        if state := _without_lora(trained):
            encoder = _on_meta(loader, source.run.encoder_config)
            encoder = _filled(encoder, state, source.checkpoint)
        else:
            encoder = load_pretrained(loader)
            name = source.settings.visual_encoder_name_or_path
            self._refuse_other("visual_encoder", encoder, name)
        encoder.to(dtype)
        lora = source.cfg.model.get("visual_encoder_lora") or {"r": 8, "lora_alpha": 8}
        if adapter := _adapter(trained, lora.get("r", 8), lora.get("lora_alpha", 8)):
            adapter.add_to(encoder)
        return encoder


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file, or of a DeepSpeed folder (float32), frozen parts left out.

    Neither is unpickled beyond tensors and plain values: no code in it is run.

    Raises:
        DPAError: it is none.
    """
    try:
        if path.is_dir():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with compat.deepspeed_loads_safely():
                return get_fp32_state_dict_from_zero_checkpoint(
                    str(path.parent), path.name, exclude_frozen_parameters=True
                )
        zipped = is_zipfile(path)  # torch's old format is none, and can't be mapped
        content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except ImportError:
        raise DPAError(
            f"{path} is a DeepSpeed checkpoint, and DeepSpeed is not installed: "
            f"{install('deepspeed')}"
        ) from None
    except (RuntimeError, ValueError, LookupError, OSError, EOFError, PickleError) as error:
        reason = (str(error).strip().splitlines() or ["it ends too early"])[0]
        raise DPAError(
            f"--checkpoint {path} is neither a .pth file nor a DeepSpeed folder of a run "
            f"(iter_N.pth in the stage's folder): {reason}"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DPAError(f"--checkpoint {path} holds no state dict: it is no checkpoint of a run.")
    return state


def read_adapter(folder: Path) -> Adapter:
    """A PEFT LoRA adapter folder."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    return _adapter(state, config["r"], config["lora_alpha"])


def _adapter(state: dict[str, Tensor], r: int, lora_alpha: float) -> Adapter | None:
    found = {m.groups(): t for name, t in state.items() if (m := _LORA.fullmatch(name))}
    names = sorted({name for name, _ in found})
    if not names:
        return None
    _refuse_missing(f"{n}.lora_{half}" for n in names for half in "AB" if (n, half) not in found)
    layers = {name: (found[name, "A"], found[name, "B"]) for name in names}
    rank = len(next(iter(layers.values()))[0])
    if rank != r:
        raise DPAError(f"The adapter has rank {rank}, and the config says {r}: set it as trained.")
    return Adapter(layers, r, lora_alpha)


def _refuse_missing(names: Iterable[str]) -> None:
    if missing := list(names):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DPAError(
            f"Part of the adapter is missing: {', '.join(missing[:5])}{more}. Without it the "
            f"model would not be the one that was trained."
        )


def _without_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}


def load_pretrained(loader: dict, dtype: torch.dtype | None = None, **more) -> PreTrainedModel:
    """Load a published model for its weights.

    Args:
        loader: its config, a ``type`` and arguments.
        dtype: that of the weights; the config's own where it is None.
        more: other arguments.

    Raises:
        DPAError: weights are missing, or its class does not take an argument.
    """
    options = ConfigDict(loader).to_dict() | more
    owner = model_class({"type": options.pop("type")})
    with options_refused("model"):
        traverse_dict(options)  # "torch.bfloat16" to the dtype
        if dtype is not None:
            options["torch_dtype"] = dtype
        model, info = owner.from_pretrained(
            **options, low_cpu_mem_usage=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise DPAError(
            f"{options['pretrained_model_name_or_path']} lacks {len(missing)} weights of a "
            f"{type(model).__name__}: {', '.join(missing[:5])}."
        )
    return model


def _on_meta(loader: dict, config) -> PreTrainedModel:
    owner, config = model_class(loader), copy.deepcopy(config)  # the model may change it
    with torch.device("meta"):
        return owner(config) if hasattr(owner, "config_class") else owner.from_config(config)


def _filled(module: PreTrainedModel, state: dict[str, Tensor], path: Path) -> PreTrainedModel:
    """Give a module without memory its weights, strictly; uncopied."""
    own = module.state_dict().keys()
    tied = set(module._tied_weights_keys or ()) if module.config.tie_word_embeddings else set()
    wrong = sorted((own - tied - state.keys()) | (state.keys() - own))
    if wrong:
        raise DPAError(
            f"{path} does not fit a {type(module).__name__}: {len(wrong)} weights are missing or "
            f"unknown ({', '.join(wrong[:5])}). Is it a checkpoint of this config?"
        )
    module.load_state_dict(state, strict=False, assign=True)
    module.tie_weights()
    return module
