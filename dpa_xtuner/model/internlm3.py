"""InternLM3 as LLaMA: the same weights under the same names, in a configuration of its own."""

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.llama_like import LlamaLike, LlamaLikeConfig


class InternLM3Config(LlamaLikeConfig):
    """A published InternLM3 configuration, read as that of a LLaMA."""

    foreign_type = "internlm3"

    @classmethod
    def as_llama(cls, values: dict) -> dict:
        """``qkv_bias`` and ``bias`` (of all other linear layers) are LLaMA's two.

        Raises:
            DPAError: they differ, which no LLaMA has.
        """
        qkv_bias, bias = values.pop("qkv_bias", False), values.pop("bias", False)
        if qkv_bias != bias:
            raise DPAError(
                f"This InternLM3 has qkv_bias={qkv_bias} and bias={bias}; a LLaMA's attention has "
                f"both or none (the published 8B has none). To run the code of its repository: "
                f"model.llm.type='transformers.AutoModelForCausalLM.from_pretrained' and "
                f"model.llm.trust_remote_code=True."
            )
        return {**values, "attention_bias": bias, "mlp_bias": bias}


class InternLM3ForCausalLM(LlamaLike):
    """Loads InternLM3 as a LlamaForCausalLM, without remote code."""

    config_class = InternLM3Config
