"""Qwen2 and Qwen2.5, which differ in their default system prompt."""

from dpa_xtuner.families.base import CHATML, Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("qwen2")
class Qwen2(Family):
    """ChatML with a default system prompt and no BOS; small models tie head and embeddings."""

    llm = "transformers.Qwen2ForCausalLM.from_pretrained"
    model_types = ("qwen2",)
    template = dict(
        CHATML,
        DEFAULT_SYSTEM="You are a helpful assistant.",
        STOP_WORDS=["<|im_end|>", "<|endoftext|>"],
    )


@FAMILIES.register_module("qwen2_5")
class Qwen25(Qwen2):
    """Qwen2 with another default system prompt."""

    template = dict(
        Qwen2.template,
        DEFAULT_SYSTEM="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    )
