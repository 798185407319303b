"""What a stage writes can be read by its users, and what the next one starts from is right."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import harness
from support.harness import STAGES, Layout
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from xtuner.model.modules import ProjectorModel  # noqa: F401, registers the class

pytestmark = pytest.mark.slow

FULL, LORA = Layout(dropout=0.0, train_llm="full"), Layout(dropout=0.05, train_llm="lora")
IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture(scope="session")
def from_proxy(reference, tmp_path_factory):
    """A work dir whose tune stage started from the proxy."""
    work_dir = tmp_path_factory.mktemp("from_proxy") / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(reference(FULL).work_dir, work_dir, stage)
    file = work_dir / "watched-tune.pt"
    output = harness.finish("tune", work_dir, "tune.start_from=proxy", prepare=harness.watch(file))
    return work_dir, output


def published(tiny, dtype=torch.bfloat16) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny / "llm", torch_dtype=dtype)


def llm_of(watched: dict) -> dict[str, torch.Tensor]:
    return {k.removeprefix("llm."): v for k, v in watched.items() if k.startswith("llm.")}


def merged_by_peft(tiny, adapter, dtype=torch.bfloat16) -> LlamaForCausalLM:
    return PeftModel.from_pretrained(published(tiny, dtype), str(adapter)).merge_and_unload()


@pytest.mark.parametrize("stage", ["proxy", "tune"])
def test_the_adapter_gives_the_trained_models_logits_in_plain_peft(stage, reference, tiny):
    whole = reference(LORA)
    trained = published(tiny)
    loaded = PeftModel.from_pretrained(trained, str(whole.work_dir / stage / "llm_adapter"))
    after = llm_of(whole.watched(stage)["after"])
    assert harness.differing(after, dict(nn.Module.state_dict(loaded))) == []

    original = published(tiny, torch.float32)(IDS).logits
    adapted = loaded.float()(IDS).logits
    assert torch.allclose(adapted, _by_hand(tiny, after), atol=1e-5)
    assert not torch.allclose(adapted, original, atol=1e-2)


def _by_hand(tiny, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base weights plus scale * B A; alpha 8, rank 4."""
    llm = published(tiny, torch.float32)
    for name, module in llm.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.default.weight" in state:
            a, b = (state[f"{key}.lora_{side}.default.weight"].float() for side in "AB")
            module.weight.data += 8 / 4 * b @ a
    return llm(IDS).logits


def test_the_tuned_llm_gives_the_trained_models_logits_in_plain_transformers(reference):
    whole = reference(FULL)
    loaded = AutoModelForCausalLM.from_pretrained(whole.work_dir / "tune/llm")
    after = llm_of(whole.watched("tune")["after"])
    assert harness.differing(after, loaded.state_dict()) == []


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_the_projector_loads_as_xtuner_loads_one(stage, reference):
    whole = reference(FULL)
    loaded = AutoModel.from_pretrained(whole.work_dir / stage / "projector", trust_remote_code=True)
    after = whole.watched(stage)["after"]
    own = {k.removeprefix("projector."): v for k, v in after.items() if "projector." in k}
    assert harness.differing(own, loaded.state_dict()) == []


def test_align_runs_on_the_merged_proxy(reference, tiny):
    whole = reference(FULL)
    merged = merged_by_peft(tiny, whole.work_dir / "proxy/llm_adapter")
    start = llm_of(whole.watched("align")["before"])
    assert harness.differing(start, merged.state_dict()) == []


def test_tune_begins_from_the_original_llm(reference, tiny):
    start = llm_of(reference(FULL).watched("tune")["before"])
    assert harness.differing(start, published(tiny, torch.float32).state_dict()) == []


def test_tune_can_begin_from_the_proxy(from_proxy, tiny):
    work_dir, output = from_proxy
    start = llm_of(torch.load(work_dir / "watched-tune.pt")["before"])
    merged = merged_by_peft(tiny, work_dir / "proxy/llm_adapter", torch.float32)
    assert harness.differing(start, merged.state_dict()) == []
    assert "begins from the proxy's weights" in output


def test_an_llm_that_begins_as_the_proxy_is_trained_in_full(from_proxy, reference):
    """peft freezes the LLM that it adds an adapter to."""
    seen = torch.load(from_proxy[0] / "watched-tune.pt")
    trained = reference(FULL).watched("tune")["trainable"]
    assert seen["trainable"] == trained
    assert set(harness.differing(seen["before"], seen["after"])) == trained


@pytest.mark.parametrize("layout", [FULL, LORA], ids=str)
def test_tune_begins_with_the_projector_of_align(layout, reference):
    whole = reference(layout)
    written = load_file(whole.work_dir / "align/projector/model.safetensors")
    start = whole.watched("tune")["before"]
    assert all(torch.equal(start[f"projector.{k}"], v) for k, v in written.items())


def test_the_record_says_what_a_part_was_made_from(reference, tiny):
    work_dir = reference(FULL).work_dir
    records = {
        file.parent.relative_to(work_dir).as_posix(): json.loads(file.read_text())
        for file in work_dir.glob("*/*/dpa.json")
    }
    assert set(records) == {"proxy/llm_adapter", "align/projector", "tune/llm", "tune/projector"}
    for place, record in records.items():
        stage, part = place.split("/")
        (file,) = (work_dir / place).glob("*.safetensors")
        assert record["component"] == part and record["stage"] == stage
        assert record["config"] == str(harness.TINY_CONFIG)
        assert record["seed"] == 42 and record["step"] == 6
        assert record["settings"]["lr"] == 1e-2 and record["settings"]["max_steps"] == 6
        name = "instructions" if stage == "tune" else "captions"
        assert record["data"]["data_path"] == str(tiny / f"{name}.json")
        assert record["llm"]["name"] == str(tiny / "llm")
        assert record["llm"]["architecture"]["hidden_size"] == 64
        assert len(record["llm"]["fingerprint"]) == 64
        shapes = {key: tuple(shape) for key, shape in record["shapes"].items()}
        trained = {k: tuple(v.shape) for k, v in load_file(file).items()}
        assert {k.replace(".default", ""): v for k, v in shapes.items()} == trained
    of_align = records["align/projector"]["llm"]["fingerprint"]
    assert {record["llm"]["fingerprint"] for record in records.values()} == {of_align}


# What the loss saw.

OWN_SCHEME = """\
from dataclasses import dataclass
from dpa_xtuner.loss import Contrast
from dpa_xtuner.registry import SCHEMES

@SCHEMES.register_module("own")
@dataclass(frozen=True)
class Own(Contrast):
    d_min: float = 2.0
    d_max: float = 3.0

    def difference(self, scores, without):
        return without.cross_entropy - scores.cross_entropy
"""


def logged(work_dir: Path, stage: str) -> list[dict]:
    """What MMEngine's local backend wrote of the training, a row each time."""
    (file,) = (work_dir / stage).glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("stage", ["proxy", "align"])
def test_held_out_figures_stand_at_the_steps_of_the_checkpoints(stage, reference):
    (file,) = (reference(FULL).work_dir / stage).glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    name = {"proxy": "held_out/floor", "align": "held_out/align"}[stage]
    steps = [row["step"] for row in rows if name in row]
    assert steps[-3:] == [2, 4, 6]  # save_steps=2 of max_steps=6


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_shows_what_the_loss_saw(stage, reference):
    rows = logged(reference(FULL).work_dir, stage)
    assert rows
    for row in rows:
        assert row["cross_entropy"] > 0 and row["supervised_tokens"] > 1
        if stage == "proxy":
            assert row["loss"] == pytest.approx(row["cross_entropy"], rel=1e-4)
            assert row["mean_weight"] == 1 and "mean_p_difference" not in row
        else:
            assert 0.0499 <= row["mean_weight"] <= 0.5 and abs(row["mean_p_difference"]) < 1
            assert 0 <= row["share_at_d_max"] <= 1 - row["share_at_d_min"] <= 1


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_a_users_own_scheme_trains_from_their_own_file(deepspeed, reference, tmp_path):
    assert len(OWN_SCHEME.splitlines()) < 15
    (tmp_path / "own_scheme.py").write_text(OWN_SCHEME)
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = [{str(harness.TINY_CONFIG)!r}]\n"
        "custom_imports = dict(imports=['dpa_xtuner', 'own_scheme'])\n"
        "align = dict(normalize='global', loss=dict(_delete_=True, type='own', window=5))\n"
    )
    rows = {}
    for name, options in [("own", []), ("vanilla", ["align.loss=uniform"])]:
        harness.copy_stage(reference(FULL).work_dir, tmp_path / name, "proxy")
        options += ["default_hooks.logger.interval=1", "align.max_steps=2"]
        how = dict(prepare=lambda: sys.path.insert(0, str(tmp_path)), deepspeed=deepspeed)
        harness.finish("align", tmp_path / name, *options, config=config, **how)
        rows[name] = logged(tmp_path / name, "align")
    assert len(rows["own"]) == 2  # a line a step
    assert all(2 <= row["mean_weight"] <= 3 for row in rows["own"])
    # Before the first step both see the same, and say so in the same unit.
    first, vanilla = rows["own"][0], rows["vanilla"][0]
    assert first["cross_entropy"] == pytest.approx(vanilla["loss"], rel=1e-5)
    assert first["supervised_tokens"] == vanilla["supervised_tokens"]
