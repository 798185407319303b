"""InternLM3."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.families.chatml import CHATML
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("internlm3")
class InternLM3(Family):
    """ChatML without a default system prompt, behind one BOS; loaded as a LLaMA."""

    llm = "dpa_xtuner.model.internlm3.InternLM3ForCausalLM.from_pretrained"
    model_types = ("internlm3", "llama")
    template = CHATML
    tokenizer = "dpa_xtuner.families.tokenizer.InternLMTokenizer.from_pretrained"
