"""Qwen3."""

from dpa_xtuner.families.base import CHATML, Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("qwen3")
class Qwen3(Family):
    """ChatML without a default system prompt, and an empty thinking block.

    The published template writes the block before the last answer of a conversation, and into a
    prompt with ``enable_thinking=False``. It is part of the prompt here, so it is not supervised.
    """

    llm = "transformers.Qwen3ForCausalLM.from_pretrained"
    model_types = ("qwen3",)
    template = dict(
        CHATML,
        NO_THINKING="<think>\n\n</think>\n\n",
        STOP_WORDS=["<|im_end|>", "<|endoftext|>"],
    )
    since = "4.51"


@FAMILIES.register_module("qwen3_moe")
class Qwen3MoE(Qwen3):
    """Qwen3 as a mixture of experts, such as 30B-A3B.

    LoRA adapts the attention alone. The router's auxiliary loss is off, which is the default of
    transformers. Before version 5 each expert is a module of its own, which gets no gradient in a
    batch that does not use it.
    """

    llm = "transformers.Qwen3MoeForCausalLM.from_pretrained"
    model_types = ("qwen3_moe",)
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    since = "5.0"
