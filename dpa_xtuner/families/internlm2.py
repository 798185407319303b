"""InternLM2 and InternLM2.5."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.families.chatml import CHATML
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("internlm2")
class InternLM2(Family):
    """ChatML without a default system prompt, behind one BOS; loaded as a LLaMA.

    The tokenizer's EOS is ``</s>``; a turn ends with ``<|im_end|>``.
    """

    llm = "dpa_xtuner.model.internlm2.InternLM2ForCausalLM.from_pretrained"
    model_types = ("internlm2", "llama")
    template = CHATML
    tokenizer = "dpa_xtuner.families.tokenizer.InternLMTokenizer.from_pretrained"
