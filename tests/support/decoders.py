"""Tiny decoders of several families, with weights and biases that count."""

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from support.internlm import InternLM2Config, InternLM2ForCausalLM

V, PIC = 61, "image"
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
GEMMA = SIZES | dict(head_dim=8, final_logit_softcapping=2.0)
NTK = SIZES | dict(max_position_embeddings=8)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "llama-ntk": (
        LlamaForCausalLM,
        LlamaConfig,
        NTK | dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SIZES),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=0),
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA),
    "gemma2-window": (Gemma2ForCausalLM, Gemma2Config, GEMMA | dict(sliding_window=6)),
    "internlm2": (InternLM2ForCausalLM, InternLM2Config, SIZES | dict(bias=False)),
    "internlm2-ntk": (
        InternLM2ForCausalLM,
        InternLM2Config,
        NTK | dict(bias=False, rope_scaling=dict(type="dynamic", factor=2.0)),
    ),
}
LAYERS = ["sliding_attention", "full_attention"]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
NEWER = {
    "qwen3": ("Qwen3", SIZES | dict(head_dim=16)),
    "qwen3_moe": ("Qwen3Moe", SIZES | EXPERTS),
    "gemma3": (
        "Gemma3",
        SIZES | dict(head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma3-window": ("Gemma3", SIZES | dict(head_dim=8, sliding_window=6)),
    "smollm3": ("SmolLM3", SIZES | dict(no_rope_layers=[1, 0])),
}
for name, (kind, sizes) in NEWER.items():  # what the installed transformers has
    if hasattr(transformers, f"{kind}ForCausalLM"):
        llm = getattr(transformers, f"{kind}ForCausalLM")
        MODELS[name] = (llm, llm.config_class, sizes)
if InternLM2ForCausalLM is None:
    del MODELS["internlm2"], MODELS["internlm2-ntk"]


def build(family: str = "llama", attention: str | None = None):
    cls, config, arguments = MODELS[family]
    if attention == "sdpa" and not cls._supports_sdpa:
        pytest.skip("since transformers 5 Gemma-2 takes no SDPA, which leaves out its cap")
    attention = attention or ("sdpa" if cls._supports_sdpa else "eager")
    torch.manual_seed(0)
    llm = cls(config(**arguments, attn_implementation=attention, initializer_range=0.3))
    for module in llm.modules():  # a bias that counts
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    return llm.eval()
