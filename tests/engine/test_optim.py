"""Float32 weights under bfloat16 autocast, on any device."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from dpa_xtuner.engine.optim import Bf16OptimWrapper, WarmupCosineLR


def test_the_products_are_bfloat16_and_the_weights_float32():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    expected = nn.Linear(8, 4)
    expected.load_state_dict(layer.state_dict())
    inputs = torch.randn(3, 8)
    wrapper = Bf16OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    with wrapper.optim_context(layer):
        output = layer(inputs)
    assert output.dtype is torch.bfloat16
    wrapper.update_params(output.float().sum())

    # d sum / d weight is the sum of the inputs, in bfloat16.
    step = 0.1 * inputs.bfloat16().float().sum(0).bfloat16().float()
    assert layer.weight.dtype is torch.float32
    assert torch.allclose(layer.weight, expected.weight - step, atol=1e-3)


def test_gradients_are_accumulated_over_a_step():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    wrapper = Bf16OptimWrapper(torch.optim.SGD(layer.parameters(), lr=1.0), accumulative_counts=2)
    wrapper.initialize_count_status(layer, 0, 4)
    for inputs, expected in [([1.0, 0.0], [0.0, 0.0]), ([0.0, 3.0], [-0.5, -1.5])]:
        with wrapper.optim_context(layer):
            output = layer(torch.tensor([inputs]))
        wrapper.update_params(output.float().sum())
        assert layer.weight.tolist() == [expected]


@pytest.mark.parametrize("accumulate", [1, 3, 32])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 3, 30])
def test_the_rate_of_each_step_is_that_of_transformers(steps, warmup, accumulate):
    warmup = min(warmup, steps - 1)
    weights = [[nn.Parameter(torch.zeros(1))] for _ in range(2)]
    groups = [{"params": weights[0]}, {"params": weights[1], "lr": 0.25}]
    theirs = torch.optim.SGD([{**g} for g in groups], lr=2.0)
    expected = get_cosine_schedule_with_warmup(theirs, warmup, steps)
    ours = OptimWrapper(torch.optim.SGD(groups, lr=2.0), accumulative_counts=accumulate)
    how = dict(warmup_steps=warmup, accumulative_counts=accumulate, by_epoch=False)
    scheduler = WarmupCosineLR(ours, end=steps * accumulate, **how)
    for step in range(steps):
        if step == steps // 2:  # a resumed run: a new scheduler with the state of the old one
            state = scheduler.state_dict()
            scheduler = WarmupCosineLR(ours, end=steps * accumulate, **how)
            scheduler.load_state_dict(state)
            for group, value in zip(ours.param_groups, state["_last_value"], strict=True):
                group["lr"] = value
        for _ in range(accumulate):
            for own, other in zip(ours.optimizer.param_groups, theirs.param_groups, strict=True):
                assert own["lr"] == pytest.approx(other["lr"], abs=1e-9)
            scheduler.step()
        theirs.step()
        expected.step()
