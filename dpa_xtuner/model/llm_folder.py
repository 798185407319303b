"""Writes an LLM as a complete folder, tokenizer included."""

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention


def save_llm(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **how) -> None:
    """Write an LLM as a folder that transformers can load and train further.

    The generation settings are the published ones.

    Args:
        llm: not wrapped by peft; its configuration is not changed.
        tokenizer: the LLM's tokenizer.
        folder: target folder; exists.
        how: arguments of the LLM's ``save_pretrained``.
    """
    generation, use_cache = llm.generation_config, llm.config.use_cache
    # save_pretrained refuses some published settings: Vicuna's set a temperature, but no sampling.
    llm.generation_config = GenerationConfig()
    llm.config.use_cache = True  # training turns it off
    try:
        llm.save_pretrained(folder, **how)
    finally:
        llm.generation_config, llm.config.use_cache = generation, use_cache
    generation.to_json_file(folder / "generation_config.json")
    if caps_attention(llm.config):
        # With this key, transformers does not choose an attention on loading, and takes the eager
        # one. save_pretrained drops the key, so add it to the file.
        file = folder / "config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, saved | {"_attn_implementation_autoset": True})
    tokenizer.save_pretrained(folder)
