"""The former module of :class:`InternLM3ForCausalLM`, which configs may still name."""

from dpa_xtuner.families.internlm.llm import InternLM3ForCausalLM as InternLM3ForCausalLM
