"""InternLM2's own code, and weights of a LLaMA as it publishes them."""

import re

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

try:
    from xtuner._lite.modelings.internlm2 import InternLM2Config, InternLM2ForCausalLM
except ImportError:  # XTuner 0.2.0's copy imports what transformers 4.57 has no more
    InternLM2Config = InternLM2ForCausalLM = None

needs_its_code = pytest.mark.skipif(
    InternLM2ForCausalLM is None, reason="XTuner's code of InternLM2 runs on transformers 4.48"
)

NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def to_internlm2(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """For each head of k and v: the heads of q that share it, that k, that v."""
    size, found = config.head_dim, {}
    for name, weight in weights.items():
        layer, module, kind = re.fullmatch(r"(model\.layers\.\d+\.)?(.+)\.(\w+)", name).groups("")
        if module == "self_attn.q_proj":
            q, k, v = (
                weights[f"{layer}self_attn.{part}_proj.{kind}"].split(size) for part in "qkv"
            )
            groups = len(q) // len(k)
            heads = [[*q[i * groups : (i + 1) * groups], k[i], v[i]] for i in range(len(k))]
            found[f"{layer}attention.wqkv.{kind}"] = torch.cat([h for each in heads for h in each])
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"{layer}{NAMES.get(module, module)}.{kind}"] = weight
    return found
