"""Mistral-7B-Instruct-v0.3 and Ministral-8B-Instruct-2410."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("mistral")
class Mistral(Family):
    """Mistral 7B v0.3: ``[INST]`` around each question, EOS behind each answer.

    It has no system prompt: the published template writes one into the last question alone, and
    leaves it out of a conversation that ends with an answer.
    """

    llm = "transformers.MistralForCausalLM.from_pretrained"
    model_types = ("mistral",)
    template = dict(
        INSTRUCTION="[INST] {input}[/INST]", PREFIX=" ", STOP_WORDS=["</s>"], AS_ONE_TEXT=True
    )


@FAMILIES.register_module("ministral")
class Ministral(Mistral):
    """Ministral 8B, whose template has no space after ``[INST]``."""

    template = dict(Mistral.template, INSTRUCTION="[INST]{input}[/INST]")
