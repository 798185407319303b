"""Which parameters have learning rates and weight decays of their own."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from support import harness
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_xtuner.engine.hooks import HandOverHook

pytestmark = pytest.mark.slow


class Model(nn.Module):
    """A projector with biases on a LLaMA, whose norms are RMSNorms."""

    def __init__(self, tied: bool = False):
        super().__init__()
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=8)
        self.llm = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
        self.projector = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16))


def groups(model: nn.Module, weight_decay: float | None = 0.1, **paramwise) -> dict[str, tuple]:
    """Learning rate and weight decay of each parameter, by name."""
    optimizer = {"type": "AdamW", "lr": 1e-2}
    optimizer |= {} if weight_decay is None else {"weight_decay": weight_decay}
    cfg = {"type": "OptimWrapper", "optimizer": optimizer, "paramwise_cfg": paramwise}
    built = build_optim_wrapper(
        model, ConfigDict(cfg | {"constructor": "DPAOptimWrapperConstructor"})
    ).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in built.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(built.param_groups) == len(set(found.values()))
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_biases_do_not_decay_and_the_projector_has_its_rate(tied):
    for name, (lr, decay) in groups(Model(tied), projector_lr=1e-3).items():
        assert lr == (1e-3 if name.startswith("projector.") else 1e-2), name
        assert decay == (0.0 if "norm" in name or "bias" in name or ".1." in name else 0.1), name


def test_the_optimizers_own_default_decay_spares_norms_too():
    found = groups(Model(), weight_decay=None)
    assert found["llm.model.norm.weight"][1] == 0.0
    assert found["llm.lm_head.weight"][1] == 0.01  # torch's


def test_what_paramwise_cfg_says_of_decay_goes_first():
    found = groups(
        Model(),
        projector_lr=1e-3,
        bias_decay_mult=0.5,
        norm_decay_mult=2.0,  # of LayerNorm; RMSNorm is none to MMEngine
        custom_keys={
            "projector.0": {"lr_mult": 0.5},
            "model.norm": {"decay_mult": 3.0},
            "input_layernorm": {"lr": 7.0, "weight_decay": 0.25},
        },
    )
    assert found["projector.0.weight"] == (5e-4, 0.1)
    assert found["projector.0.bias"] == (5e-4, 0.0)
    assert found["projector.1.bias"] == (1e-3, 0.2)
    assert found["llm.model.norm.weight"] == (1e-2, pytest.approx(0.3))
    assert found["llm.model.layers.0.input_layernorm.weight"] == (7.0, 0.25)
    assert found["llm.model.layers.0.post_attention_layernorm.weight"] == (1e-2, 0.0)
    assert groups(Model(), flat_decay_mult=0.5)["llm.model.norm.weight"][1] == 0.05


def test_frozen_parameters_are_left_out():
    model = Model()
    model.llm.requires_grad_(False)
    assert set(groups(model)) == {f"projector.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}


def test_partitioned_weights_decay_by_their_real_shape():
    model = Model()
    weight, norm = model.llm.lm_head.weight, model.llm.model.norm.weight
    for parameter in (weight, norm):  # as ZeRO-3 leaves them
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    found = groups(model)
    assert found["llm.lm_head.weight"][1] == 0.1 and found["llm.model.norm.weight"][1] == 0.0


def note_groups(file: Path):
    """For `prepare`: write down the rates and decays of the optimizer's groups at the start."""

    def prepare() -> None:
        before = HandOverHook.before_train

        def before_train(self, runner):
            before(self, runner)
            optimizer = runner.optim_wrapper.optimizer
            rates = [[g["initial_lr"], g["weight_decay"]] for g in optimizer.param_groups]
            file.write_text(json.dumps({"groups": rates, "iter": runner.iter}))

        HandOverHook.before_train = before_train

    return prepare


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
@pytest.mark.parametrize("how", ["setting", "paramwise_cfg"])
def test_the_projectors_rate_reaches_the_optimizer_also_after_a_resume(
    how, deepspeed, reference, tmp_path
):
    whole = reference(harness.Layout(deepspeed=deepspeed, dropout=0.0, train_llm="full"))
    for stage in ("proxy", "align"):
        harness.copy_stage(whole.work_dir, tmp_path / "run", stage)
    options = {
        "setting": ["tune.projector_lr=1e-3", "optim_wrapper.optimizer.weight_decay=0.1"],
        "paramwise_cfg": ["optim_wrapper.paramwise_cfg.custom_keys.projector.lr_mult=0.1"],
    }[how]
    # The projector's weights and biases, and the LLM's weights and norms.
    expected = {
        "setting": [[1e-3, 0.0], [1e-3, 0.1], [1e-2, 0.0], [1e-2, 0.1]],
        "paramwise_cfg": [[1e-3, 0.0], [1e-2, 0.0]],
    }[how]
    file, tune = tmp_path / "groups.json", tmp_path / "run/tune"
    common = {"deepspeed": deepspeed, "prepare": note_groups(file)}
    harness.finish("tune", tmp_path / "run", *options, **common)
    seen = json.loads(file.read_text())
    assert seen["iter"] == 0
    assert Counter(map(tuple, seen["groups"])) == Counter(map(tuple, expected))
    state = json.loads((tune / "stage.json").read_text())
    origin = state["origin"]
    assert origin["settings"].get("projector_lr") == (1e-3 if how == "setting" else None)
    assert origin["constructor"] == "DPAOptimWrapperConstructor"
    keys = {"custom_keys": {"projector": {"lr_mult": 0.1}}}
    assert origin["paramwise_cfg"] == (None if how == "setting" else keys)

    first = harness.weights(tmp_path / "run")
    (tune / "stage.json").write_text(json.dumps(state | {"status": "running"}))
    last = max(tune.glob("iter_*"), key=lambda path: int(path.stem.split("_")[1]))
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    harness.finish("tune", tmp_path / "run", *options, **common)
    again = json.loads(file.read_text())
    assert again["iter"] > 0
    assert Counter(map(tuple, again["groups"])) == Counter(map(tuple, expected))
    assert harness.differing(first, harness.weights(tmp_path / "run")) == []
