"""On a GPU, no tensor of a step is left on the CPU: tried with a pretended one."""

import pytest
import torch
from support import tiny_llava
from support.pretended_gpu import pretended_gpu

from dpa_xtuner.data import collate


def step(loss, device):
    model = tiny_llava.build(loss=loss, normalize="global").train().to(device)
    data = collate(tiny_llava.MIXED)["data"]
    data = {k: v.to(device) if torch.is_tensor(v) else v for k, v in data.items()}
    found = model(data)["loss"]
    found.backward()
    gradients = [parameter.grad for parameter in model.projector.parameters()]
    assert {tensor.device.type for tensor in (found, *gradients)} == {device}
    return [tensor.detach().cpu() for tensor in (found, *gradients)]


@pytest.mark.parametrize("loss", ["uniform", "cmo", "cal"])
def test_a_step_stays_on_its_device(loss):
    expected = step(loss, "cpu")
    with pretended_gpu():
        found = step(loss, "cuda")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_pretended_gpu_tells_devices_apart():
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[there.long()]
        assert there.new_zeros(2).device.type == "cuda" and there.cpu().device.type == "cpu"
        assert (there + 1).tolist() == [2.0] * 3
