"""What is not computed in the last layer changes nothing of what is read."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from support.decoders import MODELS, build
from torch import Tensor, nn

from dpa_xtuner.model.last_layer import only_read
from dpa_xtuner.model.llm import add_lora, base_model, decode

B, T, H = 3, 11, 32
LENGTHS = (11, 7, 9)


def inputs(padded: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor(LENGTHS if padded else (T,) * B)
    return {
        "inputs_embeds": torch.randn(B, T, H, requires_grad=True),
        "attention_mask": torch.arange(T) < lengths[:, None],
        "position_ids": torch.arange(T).expand(B, T),
    }


def places() -> Tensor:
    read = torch.zeros(B, T, dtype=torch.bool)
    read[0, [2, 3, 9]] = True
    read[2, 5] = True
    return read


def both(llm: nn.Module, padded: bool, read: Tensor) -> list[dict[str, Tensor]]:
    """What is read, and the gradients behind it, of the whole layer and of a part of it."""
    found = []
    for partly in (False, True):
        given = inputs(padded)
        llm.zero_grad()
        if partly:
            with only_read(base_model(llm).get_decoder(), read):
                hidden = decode(llm, given)[read]
        else:
            hidden = decode(llm, given)[read]
        # Not its square: the norm before the head gives that one no gradient but rounding.
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in llm.named_parameters() if p.grad is not None}
        found.append({"hidden": hidden, "inputs": given["inputs_embeds"].grad, **gradients})
    return found


def assert_alike(whole: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    assert whole.keys() == part.keys()
    for name in whole:
        scale = float(whole[name].abs().max())
        torch.testing.assert_close(part[name], whole[name], rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_what_is_read_and_all_gradients_stay(family, attention, padded):
    assert_alike(*both(build(family, attention), padded, places()))


def test_with_activation_checkpointing_and_lora():
    llm = add_lora(build(), LoraConfig(r=4, target_modules=None))
    nn.init.normal_(
        llm.get_submodule("base_model.model.model.layers.1.mlp.up_proj.lora_B.default").weight
    )
    llm.train()
    llm.gradient_checkpointing_enable()
    llm.enable_input_require_grads()
    whole, part = both(llm, True, places())
    assert any("layers.1.mlp.up_proj.lora_A" in name for name in whole)
    assert_alike(whole, part)


def test_nothing_to_read():
    hidden = both(build(), True, torch.zeros(B, T, dtype=torch.bool))[1]
    assert hidden["hidden"].shape == (0, H) and not hidden["inputs"].any()


def test_the_mlp_sees_what_is_read_alone_and_all_is_as_before():
    llm, seen = build(), {}
    last = llm.get_decoder().layers[-1]
    for name in ("mlp.gate_proj",):
        last.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: given[0].shape})
        )
    before = deepcopy(llm.state_dict())
    both(llm, True, places())
    assert seen["mlp.gate_proj"] == (4, H)
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())
    assert not any("forward" in module.__dict__ for module in llm.modules())
