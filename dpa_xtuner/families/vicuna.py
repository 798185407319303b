"""Vicuna 1.1 to 1.5, whose template is FastChat's ``vicuna_v1.1``."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("vicuna")
class Vicuna(Family):
    """Roles as plain text, one BOS, an EOS after every answer and nothing else between turns."""

    llm = "transformers.LlamaForCausalLM.from_pretrained"
    model_types = ("llama",)
    template = dict(
        SYSTEM="{system} ",
        DEFAULT_SYSTEM=(
            "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        INSTRUCTION="USER: {input} ASSISTANT:",
        PREFIX=" ",
        STOP_WORDS=["</s>"],
        AS_ONE_TEXT=True,
    )
