"""SmolLM3."""

from dpa_xtuner.families.base import CHATML, Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("smollm3")
class SmolLM3(Family):
    """ChatML without thinking: an empty block before each answer, and no end of the system prompt.

    The published template writes the date of today into the system prompt. Training needs the same
    tokens on every day: the day on which SmolLM3 was published is always written.
    """

    llm = "transformers.SmolLM3ForCausalLM.from_pretrained"
    model_types = ("smollm3",)
    template = dict(
        CHATML,
        SYSTEM=(
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
            "Today Date: 08 July 2025\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
            "{system}\n\n"
        ),
        DEFAULT_SYSTEM="You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        INSTRUCTION=f"{CHATML['INSTRUCTION']}<think>\n\n</think>\n",
        TODAY="2025-07-08",
    )
    since = "4.53"
