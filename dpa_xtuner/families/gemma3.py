"""Gemma-3-it, of the multimodal sizes the text part."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.families.gemma2 import Gemma2
from dpa_xtuner.registry import FAMILIES
from dpa_xtuner.versions import TEXT_PART


@FAMILIES.register_module("gemma3")
class Gemma3(Family):
    """Gemma-2's template, with the system prompt at the front of the first question.

    Most layers see a window of the text. The embeddings are scaled where they are looked up, and
    image features are not. 4B to 27B are published as multimodal models, whose text part has
    another prefix in its names; their own encoder and projector are not loaded.
    """

    llm = "transformers.Gemma3ForCausalLM.from_pretrained"
    model_types = ("gemma3_text",)
    template = dict(
        Gemma2.template,
        SYSTEM_INSTRUCTION=(
            "<start_of_turn>user\n{system}\n\n{input}<end_of_turn>\n<start_of_turn>model\n"
        ),
    )
    loading = TEXT_PART
    since = "4.50"
