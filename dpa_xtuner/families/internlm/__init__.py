"""InternLM2, InternLM2.5 and InternLM3, loaded as LLaMA without remote code."""

from dpa_xtuner.families.base import CHATML, Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("internlm2")
class InternLM2(Family):
    """InternLM2 and 2.5: ChatML without a default system prompt, after one BOS.

    The tokenizer's EOS is ``</s>``; a turn ends with ``<|im_end|>``.
    """

    llm = "dpa_xtuner.families.internlm.llm.InternLM2ForCausalLM.from_pretrained"
    model_types = ("internlm2", "llama")
    template = CHATML
    tokenizer = "dpa_xtuner.families.internlm.tokenizer.InternLMTokenizer.from_pretrained"


@FAMILIES.register_module("internlm3")
class InternLM3(InternLM2):
    """InternLM3, with the template and tokenizer of InternLM2."""

    llm = "dpa_xtuner.families.internlm.llm.InternLM3ForCausalLM.from_pretrained"
    model_types = ("internlm3", "llama")
