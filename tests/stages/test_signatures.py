"""Arguments that nothing takes are found before anything is built."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.signatures import check_arguments

WRAPPER = {
    "type": "Bf16OptimWrapper",
    "optimizer": {"type": "AdamW", "lr": 1.0},
    "constructor": "DefaultOptimWrapperConstructor",
    "paramwise_cfg": {"custom_keys": {"projector": {"lr_mult": 0.25}}},
}


def test_what_mmengines_builder_takes_for_itself_is_known():
    check_arguments([{"optim_wrapper": WRAPPER}], "c.py")
    model = nn.ModuleDict({"projector": nn.Linear(1, 1), "llm": nn.Linear(1, 1)})
    built = build_optim_wrapper(model, WRAPPER)
    rates = {g["lr"] for g in built.param_groups if g["params"][0] is model["projector"].weight}
    assert rates == {0.25}


@pytest.mark.parametrize("place", ["optim_wrapper", "hooks"])
def test_others_are_named_with_their_place(place):
    wrong = WRAPPER | {"paramwise": {}} if place == "optim_wrapper" else WRAPPER
    expected = {
        "optim_wrapper": "did you mean 'paramwise_cfg'",
        "hooks": "constructor: not an argument",
    }
    with pytest.raises(DPAError, match=f"{place}\\..*{expected[place]}"):
        check_arguments([{place: wrong}], "c.py")
