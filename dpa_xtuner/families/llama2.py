"""Llama-2-chat."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("llama2")
class Llama2(Family):
    """Every turn begins with BOS and ends with EOS; the first holds the system prompt."""

    llm = "transformers.LlamaForCausalLM.from_pretrained"
    model_types = ("llama",)
    template = dict(
        INSTRUCTION="<s>[INST] {input} [/INST]",
        SYSTEM_INSTRUCTION="<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{input} [/INST]",
        PREFIX=" ",
        SUFFIX=" ",
        STOP_WORDS=["</s>"],
        STRIP=True,
        AS_ONE_TEXT=True,
    )
