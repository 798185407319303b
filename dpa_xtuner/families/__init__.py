"""LLM families: a loader, a chat template, a tokenizer and LoRA targets for each."""

# Importing their modules registers them.
from dpa_xtuner.families import (
    gemma2,
    gemma3,
    internlm,
    llama2,
    llama3,
    mistral,
    qwen2,
    qwen3,
    smollm2,
    smollm3,
    vicuna,
)
from dpa_xtuner.families.base import Family, check_model_type, find_family

__all__ = ["Family", "check_model_type", "find_family"]
