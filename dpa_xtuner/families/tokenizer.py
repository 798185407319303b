"""The former place of :class:`InternLMTokenizer`: configs may name it here."""

from dpa_xtuner.families.internlm.tokenizer import InternLMTokenizer as InternLMTokenizer
