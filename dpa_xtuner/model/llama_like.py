"""Loaders of models that are LLaMA under another name: what they give is a LlamaForCausalLM."""

from collections.abc import Callable
from contextlib import suppress

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from dpa_xtuner.errors import DPAError

_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class LlamaLikeConfig(LlamaConfig):
    """Reads a configuration of another model type as that of a LLaMA.

    ``from_pretrained`` gives a :class:`LlamaConfig`; a LLaMA's own is read as it is.
    Subclasses name their ``foreign_type`` and override :meth:`as_llama`.
    """

    foreign_type: str

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """The keys and values of a LLaMA configuration for those of a published one."""
        raise NotImplementedError

    @classmethod
    def get_config_dict(cls, name: str, **kwargs) -> tuple[dict, dict]:
        """As of any configuration, translated."""
        values, rest = super().get_config_dict(name, **kwargs)
        if values.get("model_type") == cls.foreign_type:
            # Neither the remote code nor the classes of the foreign model belong to a LLaMA.
            own = ("auto_map", "attn_implementation", "architectures", "model_type")
            kept = {key: value for key, value in values.items() if key not in own}
            values = {**cls.as_llama(kept), "model_type": "llama"}
        return values, rest

    @classmethod
    def from_dict(cls, values: dict, **kwargs) -> LlamaConfig:
        """A plain LlamaConfig, so that nothing of the foreign type is saved."""
        return LlamaConfig.from_dict(values, **kwargs)


class LlamaLike:
    """A loader: called with a configuration, or as ``from_pretrained``, it gives a LLaMA.

    Subclasses name their ``config_class``, and ``split`` where the weights differ.
    """

    config_class: type[LlamaLikeConfig]
    split: Callable[[dict[str, Tensor], LlamaConfig], dict[str, Tensor]] | None = None
    _supports_flash_attn_2 = LlamaForCausalLM._supports_flash_attn_2

    def __new__(cls, config: LlamaConfig) -> LlamaForCausalLM:
        """A LLaMA of random weights."""
        return LlamaForCausalLM(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, **kwargs
    ) -> LlamaForCausalLM | tuple[LlamaForCausalLM, dict]:
        """Load a published model, or a LLaMA saved from one, as a LLaMA.

        Args:
            pretrained_model_name_or_path: a folder or a hub name.
            kwargs: of ``LlamaForCausalLM.from_pretrained``.

        Returns:
            The model; with ``output_loading_info=True`` also what was missing, unexpected or
            of another shape.

        Raises:
            DPAError: its configuration can't be that of a LLaMA, or a weight's shape does not
                fit it.
            OSError: neither a folder nor the hub has it.
        """
        name = pretrained_model_name_or_path
        hub = hub_options(kwargs)
        values, _ = LlamaConfig.get_config_dict(name, **hub)
        config = cls.config_class.from_pretrained(name, **hub)
        kwargs = {"config": config, **kwargs}
        if cls.split is None or values.get("model_type") != cls.config_class.foreign_type:
            return LlamaForCausalLM.from_pretrained(name, **kwargs)
        weights = cls.split(read_weights(name, **hub), config)
        kwargs = {key: value for key, value in kwargs.items() if key not in hub}
        with suppress(OSError):  # it has none
            kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(name, **hub))
        if not is_deepspeed_zero3_enabled():  # the weights read become the model's, uncopied
            kwargs.setdefault("low_cpu_mem_usage", True)
        loaded = LlamaForCausalLM.from_pretrained(None, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = name
        return loaded


def hub_options(kwargs: dict) -> dict:
    """Those arguments of a ``from_pretrained`` that say where its files come from."""
    return {key: kwargs[key] for key in _HUB if key in kwargs}


def read_weights(name: str, **hub) -> dict[str, Tensor]:
    """All weights of a folder or hub name, of safetensors or PyTorch files, in shards or not.

    Files are mapped into memory, so that ranks on one machine share them.

    Args:
        name: a folder or hub name.
        hub: of ``transformers.utils.cached_file``.

    Raises:
        DPAError: it has no weights.
    """
    missing_is_none = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for single, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        files = []
        if found := cached_file(name, single, **hub, **missing_is_none):
            files = [found]
        elif found := cached_file(name, index, **hub, **missing_is_none):
            files, _ = get_checkpoint_shard_files(name, found, **hub)
        weights: dict[str, Tensor] = {}
        for file in files:
            if single == SAFE_WEIGHTS_NAME:
                weights |= load_file(file)
            else:
                weights |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if weights:
            return weights
    raise DPAError(
        f"{name} has no weights: expected {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or their index for "
        f"shards. Is its download complete?"
    )
