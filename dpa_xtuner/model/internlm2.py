"""The former module of :class:`InternLM2ForCausalLM`, which configs may still name."""

from dpa_xtuner.families.internlm.llm import InternLM2ForCausalLM as InternLM2ForCausalLM
