"""The former place of :class:`InternLM3ForCausalLM`: configs may name it here."""

from dpa_xtuner.families.internlm.llm import InternLM3ForCausalLM as InternLM3ForCausalLM
