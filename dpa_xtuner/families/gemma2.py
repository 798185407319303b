"""Gemma-2-it."""

from dpa_xtuner.families.base import Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("gemma2")
class Gemma2(Family):
    """One BOS, ``<end_of_turn>`` after every turn, no system prompt.

    The head is tied to the embeddings and its logits are soft-capped, which
    :func:`dpa_xtuner.model.llm.head_log_probs` handles. The attention scores are capped too:
    without FlashAttention-2 we use eager attention, since SDPA can't cap them.
    """

    llm = "transformers.Gemma2ForCausalLM.from_pretrained"
    model_types = ("gemma2",)
    template = dict(
        INSTRUCTION="<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
        SUFFIX="<end_of_turn>",
        SUFFIX_AS_EOS=True,
        SEP="\n",
        STOP_WORDS=["<end_of_turn>", "<eos>"],
        STRIP=True,
        AS_ONE_TEXT=True,
    )
