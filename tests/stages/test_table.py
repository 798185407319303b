"""What each stage trains, saves in its checkpoints and writes: exact sets of names."""

import pytest
import torch
from safetensors.torch import load_file
from support import harness
from support.harness import Layout

FULL, LORA = Layout(dropout=0.0, train_llm="full"), Layout(dropout=0.05, train_llm="lora")

LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
IN_LAYER = [f"{name}.weight" for name in LINEAR]
IN_LAYER += ["input_layernorm.weight", "post_attention_layernorm.weight"]
LLM = {f"model.layers.{i}.{name}" for i in (0, 1) for name in IN_LAYER}
LLM |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
PROJECTOR = {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"}


def adapter(infix: str) -> set[str]:
    return {
        f"base_model.model.model.layers.{i}.{name}.lora_{side}{infix}.weight"
        for i in (0, 1)
        for name in LINEAR
        for side in "AB"
    }


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


TRAINED = under("llm", adapter(".default"))
PROJECTED = under("projector", PROJECTOR)
ROWS = {
    (FULL, "proxy"): (TRAINED, {"llm_adapter": adapter("")}),
    (FULL, "align"): (PROJECTED, {"projector": PROJECTOR}),
    (FULL, "tune"): (under("llm", LLM) | PROJECTED, {"llm": LLM, "projector": PROJECTOR}),
    (LORA, "tune"): (TRAINED | PROJECTED, {"llm_adapter": adapter(""), "projector": PROJECTOR}),
}
rows = pytest.mark.parametrize(
    ("layout", "stage", "trained", "written"),
    [(*key, *value) for key, value in ROWS.items()],
    ids=[f"{stage}-{layout.train_llm}" for layout, stage in ROWS],
)


@rows
def test_trainable_parameters_are_exactly_these(layout, stage, trained, written, reference):
    assert reference(layout).watched(stage)["trainable"] == trained


@rows
def test_every_trainable_tensor_changes_and_no_other(layout, stage, trained, written, reference):
    seen = reference(layout).watched(stage)
    assert set(harness.differing(seen["before"], seen["after"])) == trained


@rows
def test_a_checkpoint_holds_exactly_what_is_trained(layout, stage, trained, written, reference):
    folder = reference(layout).work_dir / stage
    checkpoint = torch.load(folder / "iter_12.pth")
    assert set(checkpoint["state_dict"]) == trained
    assert {"optimizer", "param_schedulers", "message_hub", "meta"} <= set(checkpoint)


@rows
def test_written_folders_hold_exactly_these_tensors(layout, stage, trained, written, reference):
    work_dir = reference(layout).work_dir
    files = {file.parent.name: file for file in (work_dir / stage).glob("*/*.safetensors")}
    assert {part: set(load_file(file)) for part, file in files.items()} == written
    trained_now = reference(layout).watched(stage)["after"]
    for part, file in files.items():
        module = "projector" if part == "projector" else "llm"
        for name, tensor in load_file(file).items():
            inner = name.replace(".weight", ".default.weight") if ".lora_" in name else name
            assert torch.equal(tensor, trained_now[f"{module}.{inner}"])


def test_zero2_trains_the_same_parameters(reference):
    layout = Layout(deepspeed=True, dropout=0.0, train_llm="full")
    for stage in harness.STAGES:
        seen = reference(layout).watched(stage)
        assert seen["trainable"] == ROWS[FULL, stage][0]
        assert set(harness.differing(seen["before"], seen["after"])) == seen["trainable"]
