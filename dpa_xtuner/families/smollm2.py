"""SmolLM2-Instruct."""

from dpa_xtuner.families.base import CHATML, Family
from dpa_xtuner.registry import FAMILIES


@FAMILIES.register_module("smollm2")
class SmolLM2(Family):
    """ChatML with a default system prompt and no BOS; the head is tied to the embeddings."""

    llm = "transformers.LlamaForCausalLM.from_pretrained"
    model_types = ("llama",)
    template = dict(
        CHATML,
        DEFAULT_SYSTEM="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    )
