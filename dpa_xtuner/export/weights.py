"""The weights to export: the LLM with its adapters added, the encoder, the projector."""

import copy
from functools import cached_property
from pathlib import Path
from pickle import PickleError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError, install
from dpa_xtuner.export.source import Source
from dpa_xtuner.model.adapter import Adapter, adapter_of, read_adapter, without_adapter
from dpa_xtuner.model.configs import model_class, read_config
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm import fill, load_pretrained
from dpa_xtuner.stages.components import (
    LLM,
    LLM_ADAPTER,
    PROJECTOR,
    VISUAL_ENCODER,
    Component,
    Published,
)


class StageWeights:
    """The weights that a stage left; each component is read on demand.

    Args:
        source: the result of :func:`dpa_xtuner.export.source.read_source`.
        dtype: dtype of the exported weights.
    """

    def __init__(self, source: Source, dtype: torch.dtype):
        self.source, self.dtype = source, dtype

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """The checkpoint's state dict; empty if there is no checkpoint."""
        return {} if self.source.checkpoint is None else read_checkpoint(self.source.checkpoint)

    def _of(self, component: Component) -> dict[str, Tensor]:
        """Pick the checkpoint's weights of the module that holds a component."""
        prefix = f"{component.module}."
        found = {k.removeprefix(prefix): v for k, v in self._state.items() if k.startswith(prefix)}
        return {k.removeprefix("base_model.model."): v for k, v in found.items()}

    @property
    def has_encoder(self) -> bool:
        """Whether the visual encoder was trained, by the stage table or by the checkpoint."""
        return VISUAL_ENCODER in self.source.stage.trains or bool(self._of(VISUAL_ENCODER))

    def projector(self) -> dict[str, Tensor]:
        """Read the projector's state dict.

        Raises:
            DPAError: the checkpoint has none, or it does not fit the config.
        """
        source, run = self.source, self.source.run
        if folder := source.written(PROJECTOR):
            state = load_file(folder / "model.safetensors")
        elif not (state := self._of(PROJECTOR)):
            raise DPAError(f"{source.checkpoint} holds no projector: it is not from this stage.")
        expected = {name: weight.shape for name, weight in run.projector.state_dict().items()}
        given = {name: weight.shape for name, weight in state.items()}
        if expected != given:
            raise DPAError(
                f"The projector's weights are {given}, but projector={run.settings.projector} "
                f"of this config has {expected}: another projector was trained."
            )
        return state

    def adapter(self) -> Adapter | None:
        """Read the adapter that the stage trained; None if it trained none.

        Raises:
            DPAError: the checkpoint lacks it, or a part of it.
        """
        source = self.source
        if folder := source.written(LLM_ADAPTER):
            return read_adapter(folder)
        lora = getattr(source.stage_settings, "lora", None)
        found = adapter_of(self._of(LLM_ADAPTER), lora.r, lora.lora_alpha) if lora else None
        if found:
            empty = self._empty(LLM)
            found.refuse_other(empty)
            found.refuse_partial(empty, source.run.lora_targets)
        elif LLM_ADAPTER in source.stage.trains:
            raise DPAError(f"{source.checkpoint} holds no adapter: it is not from this stage.")
        return found

    def llm(self) -> PreTrainedModel:
        """Load the LLM as the stage left it, its adapters added.

        An adapter that the stage loaded is added in the dtype of the training, the one that it
        trained in the exported one.

        Raises:
            DPAError: weights are missing, or the checkpoint is from another stage or model.
        """
        source, inputs = self.source, self.source.inputs()
        if state := without_adapter(self._of(LLM)):
            llm = self._empty(LLM)
            fill(llm, state, str(source.checkpoint))
        else:
            llm = self._loaded(LLM)
            if LLM_ADAPTER in inputs:
                read_adapter(inputs[LLM_ADAPTER]).add_to(llm)
        llm.to(self.dtype)
        llm.config.use_cache = True  # training turns it off
        if adapter := self.adapter():
            adapter.add_to(llm)
        return llm

    def visual_encoder(self) -> PreTrainedModel:
        """Load the encoder, published or trained.

        Raises:
            DPAError: weights are missing.
        """
        source, trained = self.source, self._of(VISUAL_ENCODER)
        encoder = self._loaded(VISUAL_ENCODER)
        if state := without_adapter(trained):
            source.run.encoder_spec.freeze_unread(encoder)  # checkpoints lack frozen weights
            fill(encoder, state, str(source.checkpoint))
        encoder.to(self.dtype)
        lora = source.run.cfg.model.get("visual_encoder_lora") or {"r": 8, "lora_alpha": 8}
        if adapter := adapter_of(trained, lora.get("r", 8), lora.get("lora_alpha", 8)):
            adapter.add_to(encoder)
        return encoder

    def _loaded(self, component: Published) -> PreTrainedModel:
        """Load a component from the folder that a stage wrote, else the published one."""
        source, run = self.source, self.source.run
        written = source.written(component)
        held = without_adapter(self._of(component))
        if source.checkpoint and component in source.stage.trains and not held:
            lora = f" If it was trained by LoRA: --cfg-options {source.stage.name}.train_llm=lora"
            raise DPAError(
                f"{source.checkpoint} holds no {component.label}, which stage "
                f"{source.stage.name} trains in full.{lora * (component == LLM)}"
            )
        loader, folder = source.run.cfg.model[component], written or source.inputs().get(component)
        name = {"pretrained_model_name_or_path": str(folder)} if folder else {}
        more: dict[str, Any] = {"torch_dtype": self.dtype} if written else {}
        if component in source.stage.trains and not written:
            more["torch_dtype"] = torch.float32  # as it was trained
        if component == LLM:
            # Without use_cache, transformers warns of Gemma-2's generation settings.
            config = read_config(component.setting, loader | name)
            config.use_cache = True
            more |= {"config": config, "low_cpu_mem_usage": True}
        module = load_pretrained(loader | name, **more)
        if not folder:
            source.refuse_other(component, fingerprint(module, run.precision.fingerprint_dtype))
        return module

    def _empty(self, component: Published) -> PreTrainedModel:
        """Build a published model on the meta device."""
        source = self.source
        owner = model_class(source.run.cfg.model[component])
        config = copy.deepcopy(source.run.config_of(component))  # the model may change it
        with torch.device("meta"):
            return owner(config) if hasattr(owner, "config_class") else owner.from_config(config)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a .pth file or, in float32, of a DeepSpeed folder.

    A DeepSpeed folder's frozen weights are left out. Only tensors and plain values are unpickled:
    no code in the file is run.

    Raises:
        DPAError: it is neither.
    """
    try:
        if path.is_dir():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with compat.deepspeed_loads_safely():
                return get_fp32_state_dict_from_zero_checkpoint(
                    str(path.parent), path.name, exclude_frozen_parameters=True
                )
        zipped = is_zipfile(path)  # torch's old format is no zip file, and can't be mapped
        content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except ImportError:
        raise DPAError(
            f"{path} is a DeepSpeed checkpoint, but DeepSpeed is not installed: "
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
        raise DPAError(f"--checkpoint {path} holds no state dict: it is not a run's checkpoint.")
    return state
