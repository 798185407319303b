"""Llama-3-, 3.1- and 3.2-Instruct, which differ in the text before the system prompt."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("llama3")
class Llama3(Family):
    """One BOS, header tokens around each role, ``<|eot_id|>`` at the end of every turn."""

    llm = "transformers.LlamaForCausalLM.from_pretrained"
    model_types = ("llama",)
    template = dict(
        SYSTEM="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        INSTRUCTION=(
            "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        SUFFIX="<|eot_id|>",
        SUFFIX_AS_EOS=True,
        STOP_WORDS=["<|eot_id|>"],
        STRIP=True,
        AS_ONE_TEXT=True,
    )


@FAMILIES.register_module("llama3_1")
class Llama31(Llama3):
    """Llama 3 with two dates before the system prompt, which is written even if it is empty.

    The second date is the default of the published template.
    """

    template = dict(
        Llama3.template,
        SYSTEM=(
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\n{system}<|eot_id|>"
        ),
        DEFAULT_SYSTEM="",
        STOP_WORDS=["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    )


@FAMILIES.register_module("llama3_2")
class Llama32(Llama31):
    """Llama 3.1, whose second date is that of today in the published template.

    Training needs the same tokens on every day: the template's own default is always written.
    """

    template = dict(Llama31.template, TODAY="2024-07-26")
