"""The former place of :class:`InternLM2ForCausalLM`: configs may name it here."""

from dpa_xtuner.families.internlm.llm import InternLM2ForCausalLM as InternLM2ForCausalLM
