"""The former module of :class:`InternLMTokenizer`, which configs may still name."""

from dpa_xtuner.families.internlm.tokenizer import InternLMTokenizer as InternLMTokenizer
