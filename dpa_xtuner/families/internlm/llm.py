"""Loads InternLM2 and InternLM3, which are LLaMA under other names, as ``LlamaForCausalLM``.

InternLM3 has LLaMA's weights, but its own configuration. InternLM2 has other names too, and packs
q, k and v into one weight, ``wqkv``: for each head of k and v, the heads of q that share it, then
that k, then that v.
"""

import re
from contextlib import suppress
from typing import ClassVar

from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from dpa_xtuner.errors import DPAError
from dpa_xtuner.versions import knows_flash_attention

_HUB = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
}
_INTERNLM2_TO_LLAMA = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_NAME = re.compile(r"(model\.layers\.\d+\.)?(.+)\.(\w+)")  # layer, module, weight or bias


class LlamaLikeConfig(LlamaConfig):
    """Reads a configuration of another model type as that of a LLaMA.

    ``from_pretrained`` returns a :class:`LlamaConfig`, and reads that of a LLaMA unchanged.
    Subclasses name their ``foreign_type`` and override :meth:`as_llama`.
    """

    foreign_type: ClassVar[str]

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """Translate the keys and values of a published configuration to LLaMA's."""
        raise NotImplementedError

    @classmethod
    def get_config_dict(cls, name: str, **kwargs) -> tuple[dict, dict]:
        """Read a configuration, and translate it.

        Args:
            name: a folder or a hub name.
            kwargs: arguments of transformers' method.
        """
        values, rest = super().get_config_dict(name, **kwargs)
        if values.get("model_type") == cls.foreign_type:
            # Neither the remote code nor the classes of the foreign model belong to a LLaMA.
            foreign = ("auto_map", "attn_implementation", "architectures", "model_type")
            kept = {key: value for key, value in values.items() if key not in foreign}
            values = {**cls.as_llama(kept), "model_type": "llama"}
        return values, rest

    @classmethod
    def from_dict(cls, values: dict, **kwargs) -> LlamaConfig:
        """Make a plain LlamaConfig, so that nothing of the foreign type is saved.

        Args:
            values: the translated configuration.
            kwargs: arguments of transformers' method.
        """
        return LlamaConfig.from_dict(values, **kwargs)


class InternLM2Config(LlamaLikeConfig):
    """A published InternLM2 configuration, read as that of a LLaMA."""

    foreign_type = "internlm2"

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """Rename ``bias``, which means the attention's linear layers; the rest is LLaMA's."""
        bias = values.pop("bias", True)  # the default of InternLM2's own configuration
        return {**values, "attention_bias": bias}


class InternLM3Config(LlamaLikeConfig):
    """A published InternLM3 configuration, read as that of a LLaMA."""

    foreign_type = "internlm3"

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """Rename ``qkv_bias`` and ``bias`` (of all other linear layers) to LLaMA's two keys.

        Raises:
            DPAError: they differ, which LLaMA can't express.
        """
        qkv_bias, bias = values.pop("qkv_bias", False), values.pop("bias", False)
        if qkv_bias != bias:
            raise DPAError(
                f"This InternLM3 has qkv_bias={qkv_bias} and bias={bias}; a LLaMA's attention has "
                f"both or none (the published 8B has none). To run the code of its repository: "
                f"model.llm.type='transformers.AutoModelForCausalLM.from_pretrained' and "
                f"model.llm.trust_remote_code=True."
            )
        return {**values, "attention_bias": bias, "mlp_bias": bias}


class LlamaLike:
    """A loader: its call with a configuration and its ``from_pretrained`` return a LLaMA.

    Subclasses name their ``config_class``.
    """

    config_class: type[LlamaLikeConfig]
    _supports_flash_attn = knows_flash_attention(LlamaForCausalLM)

    def __new__(cls, config: LlamaConfig) -> LlamaForCausalLM:
        """Build a LLaMA with random weights."""
        return LlamaForCausalLM(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, **kwargs
    ) -> LlamaForCausalLM | tuple[LlamaForCausalLM, dict]:
        """Load a published model, or a LLaMA saved from one, as a LLaMA.

        Args:
            pretrained_model_name_or_path: a folder or a hub name.
            kwargs: arguments of ``LlamaForCausalLM.from_pretrained``.

        Returns:
            The model; with ``output_loading_info=True`` also the keys that were missing, unexpected
            or of another shape.

        Raises:
            DPAError: LLaMA can't express its configuration, or the shape of a weight does not fit.
            OSError: neither a folder nor the hub has it.
        """
        name = pretrained_model_name_or_path
        kwargs = {"config": cls.config_class.from_pretrained(name, **hub_options(kwargs)), **kwargs}
        return LlamaForCausalLM.from_pretrained(name, **kwargs)


class InternLM3ForCausalLM(LlamaLike):
    """Loads InternLM3 as a LlamaForCausalLM, without remote code."""

    config_class = InternLM3Config


class InternLM2ForCausalLM(LlamaLike):
    """Loads InternLM2 and InternLM2.5 as a LlamaForCausalLM, without remote code."""

    config_class = InternLM2Config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, **kwargs
    ) -> LlamaForCausalLM | tuple[LlamaForCausalLM, dict]:
        """Load as :meth:`LlamaLike.from_pretrained`, and translate the weights.

        Args:
            pretrained_model_name_or_path: a folder or a hub name.
            kwargs: arguments of ``LlamaForCausalLM.from_pretrained``.
        """
        name, hub = pretrained_model_name_or_path, hub_options(kwargs)
        values, _ = LlamaConfig.get_config_dict(name, **hub)
        if values.get("model_type") != InternLM2Config.foreign_type:  # saved as a LLaMA
            return super().from_pretrained(name, **kwargs)
        config = InternLM2Config.from_pretrained(name, **hub)
        options = {"config": config, **kwargs}
        options = {key: value for key, value in options.items() if key not in hub}
        with suppress(OSError):  # some have none
            options.setdefault("generation_config", GenerationConfig.from_pretrained(name, **hub))
        if not is_deepspeed_zero3_enabled():  # use the weights without copying them
            options.setdefault("low_cpu_mem_usage", True)
        weights = to_llama(read_weights(name, **hub), config)
        loaded = LlamaForCausalLM.from_pretrained(None, state_dict=weights, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = name
        return loaded


def to_llama(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Translate weights of InternLM2 to LLaMA's names, and unpack q, k and v.

    Args:
        weights: published weights; not changed.
        config: configuration of the LLaMA.

    Raises:
        DPAError: a packed weight does not have the shape that ``config`` implies.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    groups = heads // kv_heads
    renamed = {}
    for name, weight in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer in older files; LLaMA computes it
        match = _NAME.fullmatch(name)
        assert match is not None, f"a weight without a module: {name}"
        layer, module, kind = match.groups("")
        if module != "attention.wqkv":
            renamed[f"{layer}{_INTERNLM2_TO_LLAMA.get(module, module)}.{kind}"] = weight
            continue
        rows = kv_heads * (groups + 2) * size
        if len(weight) != rows:
            raise DPAError(
                f"{name} has {len(weight)} rows; {heads} heads, {kv_heads} of k and v, of size "
                f"{size} make {rows}. Do config.json and the weights belong to the same model?"
            )
        # (kv heads, groups + 2, size, hidden size); a bias has no last dimension.
        packed = weight.unflatten(0, (kv_heads, groups + 2, size))
        split = {"q": packed[:, :groups].flatten(0, 1), "k": packed[:, -2], "v": packed[:, -1]}
        for letter, values in split.items():  # (heads, size, ...)
            renamed[f"{layer}self_attn.{letter}_proj.{kind}"] = values.flatten(0, 1)
    return renamed


def hub_options(kwargs: dict) -> dict:
    """Pick the arguments of a ``from_pretrained`` that say where its files come from."""
    return {key: value for key, value in kwargs.items() if key in _HUB}


def read_weights(name: str, **hub) -> dict[str, Tensor]:
    """Read all weights of a model: safetensors or PyTorch files, sharded or not.

    Files are mapped into memory, so that ranks on one machine share them.

    Args:
        name: a folder or hub name.
        hub: arguments of ``transformers.utils.cached_file``.

    Raises:
        DPAError: it has no weights.
    """
    missing_is_none = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        found = cached_file(name, file, **hub, **missing_is_none)
        if found is None:
            continue
        is_index = file in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
        files = get_checkpoint_shard_files(name, found, **hub)[0] if is_index else [found]
        weights: dict[str, Tensor] = {}
        for path in files:
            # transformers 4 would refuse a safetensors file that does not name its framework.
            safe = path.endswith(".safetensors")
            weights |= load_file(path) if safe else load_state_dict(path, map_location="cpu")
        return weights
    raise DPAError(
        f"{name} has no weights: expected {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or their index for "
        f"shards. Is its download complete?"
    )
