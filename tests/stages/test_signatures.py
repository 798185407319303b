"""Keys that nothing takes are found before anything is built."""

import pytest
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from dpa_xtuner.stages.signatures import config_problems

WRAPPER = {
    "type": "OptimWrapper",
    "optimizer": {"type": "AdamW", "lr": 1.0},
    "constructor": "DefaultOptimWrapperConstructor",
    "paramwise_cfg": {"custom_keys": {"projector": {"lr_mult": 0.25}}},
}


def problems(**config) -> dict[str, str]:
    return config_problems({"randomness": {"seed": 0}, **config}, set(), {})


def test_what_mmengines_builder_takes_for_itself_is_known():
    assert problems(optim_wrapper=WRAPPER) == {}
    model = nn.ModuleDict({"projector": nn.Linear(1, 1), "llm": nn.Linear(1, 1)})
    built = build_optim_wrapper(model, WRAPPER)
    rates = {g["lr"] for g in built.param_groups if g["params"][0] is model["projector"].weight}
    assert rates == {0.25}


def test_others_are_named_with_their_place():
    found = problems(optim_wrapper=WRAPPER | {"paramwise": {}}, hooks={})
    assert found == {
        "hooks": "not a known key",
        "optim_wrapper.paramwise": "not a known key; did you mean 'paramwise_cfg'?",
    }


def test_a_constructor_of_ones_own_reads_paramwise_cfg_as_it_likes():
    @OPTIM_WRAPPER_CONSTRUCTORS.register_module()
    class MyConstructor:
        pass

    try:
        mine = {"constructor": "MyConstructor", "paramwise_cfg": {"my_mult": "x"}}
        assert problems(optim_wrapper=WRAPPER | mine) == {}
    finally:
        del OPTIM_WRAPPER_CONSTRUCTORS.module_dict["MyConstructor"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"needed": 1}, {}),
        ({"needed": 1, "other": 2, "priority": "LOW"}, {}),
        ({}, {"custom_hooks.0.needed": "it is missing"}),
        ({"needed": "x"}, {"custom_hooks.0.needed": "expected int (got 'x')"}),
        (
            {"needed": 1, "othr": 2},
            {"custom_hooks.0.othr": "not a known key; did you mean 'other'?"},
        ),
    ],
)
def test_a_hook_of_ones_own_is_held_against_its_signature_and_not_built(keys, expected):
    @HOOKS.register_module()
    class MyHook(Hook):
        def __init__(self, needed: int, other: int = 0):
            pytest.fail("it was built")

    try:
        assert problems(custom_hooks=[{"type": "MyHook", **keys}]) == expected
    finally:
        del HOOKS.module_dict["MyHook"]


def test_keys_that_the_stages_set_are_told_with_the_way_out():
    config = {"train_cfg": {"max_iters": 3}, "train_dataloader": {"batch_size": 4}}
    owned = {"train_cfg": "set a instead", "train_dataloader.batch_size": "set b instead"}
    found = config_problems({"randomness": {"seed": 0}, **config}, set(), owned)
    assert found == {key: f"each stage sets it; {way_out}" for key, way_out in owned.items()}
    config["train_dataloader"]["batch_size"] = 1  # as the base config has to have it for XTuner
    assert config_problems({"randomness": {"seed": 0}, **config}, set(), owned).keys() == {
        "train_cfg"
    }
