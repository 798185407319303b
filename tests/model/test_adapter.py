"""LoRA's weights in a folder, as PEFT writes them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.adapter import read_adapter

A, B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"


@pytest.fixture
def write(tmp_path):
    """Writes an adapter of rank 2 for one layer, or what is given."""

    def make(tensors: dict, r: int = 2):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 4}))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_what_is_read_adds_scaled_b_times_a(write):
    a, b = torch.randn(2, 3), torch.randn(5, 2)
    llm = torch.nn.Module()
    llm.up = torch.nn.Linear(3, 5, bias=False)
    expected = llm.up.weight.detach() + 4 / 2 * b @ a
    read_adapter(write({A: a, B: b})).add_to(llm)
    torch.testing.assert_close(llm.up.weight.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("names", "r", "message"),
    [
        ((), 2, "holds no LoRA weights"),
        ((A,), 2, "up.lora_B"),
        ((A, B), 3, "rank 2, and .* says 3"),
    ],
)
def test_half_an_adapter_or_none_is_refused(write, names, r, message):
    tensors = {name: torch.zeros((2, 3) if name == A else (5, 2)) for name in names}
    with pytest.raises(DPAError, match=message):
        read_adapter(write(tensors or {"other": torch.zeros(1)}, r))
