"""InternLM2 and InternLM2.5 as LLaMA: other names, and q, k and v in one weight.

``wqkv`` holds, for each head of k and v, the heads of q that share it, then that k, then
that v: as (kv heads, groups + 2, head size, hidden size), q is ``[:, :groups]``, k
``[:, -2]``, v ``[:, -1]``.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.llama_like import LlamaLike, LlamaLikeConfig

_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_BACK = {llama: internlm2 for internlm2, llama in _NAMES.items()}
_PACKED = "attention.wqkv"
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")


class InternLM2Config(LlamaLikeConfig):
    """A published InternLM2 configuration, read as that of a LLaMA."""

    foreign_type = "internlm2"

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """``bias`` is that of the attention's linear layers; all else has LLaMA's names."""
        bias = values.pop("bias", True)  # the default of InternLM2's own configuration
        return {**values, "attention_bias": bias}


def to_llama(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Weights of InternLM2 under LLaMA's names, q, k and v apart.

    Args:
        weights: as published; not changed.
        config: that of the LLaMA.

    Raises:
        DPAError: a packed weight does not have the shape that ``config`` says.
    """
    groups, size = _groups(config), config.head_dim
    renamed = {}
    for name, weight in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that older files hold; LLaMA computes it
        module, kind = name.rsplit(".", 1)
        layer, inner = _in_layer(module)
        if inner != _PACKED:
            renamed[f"{layer}{_NAMES.get(inner, inner)}.{kind}"] = weight
            continue
        rows = config.num_key_value_heads * (groups + 2) * size
        if len(weight) != rows:
            raise DPAError(
                f"{name} has {len(weight)} rows; {config.num_attention_heads} heads, "
                f"{config.num_key_value_heads} of k and v, of size {size} make {rows}. Do "
                f"config.json and the weights belong to the same model?"
            )
        packed = weight.unflatten(0, (-1, groups + 2, size))
        parts = packed[:, :groups], packed[:, -2], packed[:, -1]
        for target, part in zip(_SPLIT, parts, strict=True):
            renamed[f"{layer}{target}.{kind}"] = part.flatten(0, -2 if kind == "weight" else -1)
    return renamed


def to_internlm2(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The inverse of :func:`to_llama`: weights in InternLM2's published format.

    Args:
        weights: the state dict of the LLaMA; not changed.
        config: that of the LLaMA.
    """
    groups, size = _groups(config), config.head_dim
    renamed = {}
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)
        layer, inner = _in_layer(module)
        if inner not in _SPLIT:
            renamed[f"{layer}{_BACK.get(inner, inner)}.{kind}"] = weight
        elif inner == _SPLIT[0]:
            q, k, v = (weights[f"{layer}{part}.{kind}"] for part in _SPLIT)
            q = q.unflatten(0, (-1, groups, size))
            k, v = (part.unflatten(0, (-1, 1, size)) for part in (k, v))
            packed = torch.cat([q, k, v], dim=1)
            renamed[f"{layer}{_PACKED}.{kind}"] = packed.flatten(0, 2)
    return renamed


def save_internlm2(llm: LlamaForCausalLM, folder: str | Path, published: str | Path) -> None:
    """Write a LLaMA that was loaded from InternLM2 in InternLM2's published format.

    The folder is complete once the modelling and tokenizer files of the published folder
    (``*.py``, ``tokenizer*``) are copied beside it.

    Args:
        llm: the model.
        folder: where to.
        published: the folder whose ``config.json`` it was loaded with; all that the training
            did not change, its remote code among it, is kept.
    """
    folder = Path(folder)
    config = json.loads((Path(published) / "config.json").read_text())
    config |= {
        "torch_dtype": str(llm.dtype).removeprefix("torch."),
        "vocab_size": llm.config.vocab_size,
    }
    llm.save_pretrained(folder, state_dict=to_internlm2(llm.state_dict(), llm.config))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class InternLM2ForCausalLM(LlamaLike):
    """Loads InternLM2 and InternLM2.5 as a LlamaForCausalLM, without remote code."""

    config_class = InternLM2Config
    split = staticmethod(to_llama)


def _in_layer(module: str) -> tuple[str, str]:
    found = _LAYER.fullmatch(module)
    return found.groups() if found else ("", module)


def _groups(config: LlamaConfig) -> int:
    return config.num_attention_heads // config.num_key_value_heads
