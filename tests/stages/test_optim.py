"""Float32 weights under bfloat16 autocast, on any device."""

import torch
from torch import nn

from dpa_xtuner.stages import Bf16OptimWrapper


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
