"""An LLM on disk as a whole folder, tokenizer included."""

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention


def save_llm(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **how) -> None:
    """Write an LLM as a folder that plain transformers opens, and that can be tuned further.

    The generation settings are those it was published with.

    Args:
        llm: not wrapped by peft; its configuration is left as it was.
        tokenizer: of the LLM.
        folder: where to; exists.
        how: of the LLM's ``save_pretrained``.
    """
    generation, use_cache = llm.generation_config, llm.config.use_cache
    # save_pretrained refuses some published settings: Vicuna's name a temperature, and no sampling.
    llm.generation_config = GenerationConfig()
    llm.config.use_cache = True  # training turns it off
    try:
        llm.save_pretrained(folder, **how)
    finally:
        llm.generation_config, llm.config.use_cache = generation, use_cache
    generation.to_json_file(folder / "generation_config.json")
    if caps_attention(llm.config):
        # An LLM that is saved with this set chooses no attention when it is loaded, and so gets the
        # eager one. save_pretrained does not keep what is set in memory.
        file = folder / "config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, saved | {"_attn_implementation_autoset": True})
    tokenizer.save_pretrained(folder)
