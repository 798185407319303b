"""Writes an LLM as a complete folder, tokenizer included."""

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention

SAVED_AS_JSON = {"save_jinja_files": False}
"""For ``save_pretrained``: chat templates where transformers 4.48 looks for them."""


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
    tokenizer.save_pretrained(folder, **SAVED_AS_JSON)
    write_portably(folder)
    if caps_attention(llm.config):
        # An LLM that is saved with this set chooses no attention when it is loaded, and so gets the
        # eager one: on transformers 4.48. 5 takes no other; 4.57 has to be told, as it has to for
        # a published Gemma-2. save_pretrained does not keep what is set in memory.
        file = folder / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, values | {"_attn_implementation_autoset": True})


def write_portably(folder: Path, chat_template: str | None = None) -> None:
    """Have transformers 4.48, 4.57 and 5 open a folder that any of them has saved alike.

    What a newer one writes under another name is there by the older name as well.

    Args:
        folder: of a model with its tokenizer.
        chat_template: of its processor, where it has one.
    """
    file = folder / "config.json"
    write_json(file, _with_older_names(json.loads(file.read_text(encoding="utf-8"))))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    if (folder / "tokenizer.json").is_file():
        # transformers 5 makes a LLaMA's or Qwen's own class anew from the vocabulary, with other
        # ids or no BOS, and writes a name of this class that 4.57 does not know.
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):  # 4.57 takes a dict of others
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_json(file, tokenizer)
    if chat_template is not None:
        write_json(folder / "chat_template.json", {"chat_template": chat_template})
        # transformers 5 puts the image processor in here, which 4.57 takes for an argument given
        # twice. preprocessor_config.json has it too.
        file = folder / "processor_config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("image_processor", None)
        write_json(file, values)


def _with_older_names(config: dict) -> dict:
    """Add the names of transformers 4.48 to those of 5 in a configuration and those inside it."""
    config = {
        name: _with_older_names(value) if name.endswith("_config") and value else value
        for name, value in config.items()
    }
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    return config
