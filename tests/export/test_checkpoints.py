"""Exports from checkpoints against exports of what the finished stage wrote, and against peft."""

import copy
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import harness
from transformers import LlamaForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config
from dpa_xtuner.export.weights import read_checkpoint
from dpa_xtuner.stages.artifacts import newest_checkpoint, read_state

pytestmark = pytest.mark.slow

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def weights(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{k}": v for k, v in load_file(file).items()}
    return {k.removeprefix(f"{folder.name}/"): v for k, v in found.items()}


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):
    """Gives a work dir in which `tune` is trained anew, by LoRA or in full, with ZeRO or not."""

    def make(zero, train_llm, ranks=1):
        work_dir = tmp_path_factory.mktemp(f"zero{zero}") / "run"
        for stage in ("proxy", "align"):
            harness.copy_stage(reference(harness.Layout()).work_dir, work_dir, stage)
        arguments = ("--deepspeed", f"zero{zero}") if zero else ()
        options = [f"tune.train_llm={train_llm}", "tune.max_steps=2"]
        harness.finish("tune", work_dir, *options, arguments=arguments, ranks=ranks)
        return work_dir, {"tune.train_llm": train_llm}

    return make


@pytest.mark.parametrize(
    ("zero", "train_llm", "ranks"),
    [(0, "full", 1), (0, "lora", 1), (1, "full", 1), (2, "full", 2), (3, "full", 1)],
)
def test_a_checkpoint_gives_what_the_finished_stage_gives(trained, zero, train_llm, ranks):
    work_dir, options = trained(zero, train_llm, ranks)
    how = dict(work_dir=work_dir, options=options, dtype="bfloat16")
    written = weights(export_config(harness.TINY_CONFIG, **how))
    checkpoint = Path(newest_checkpoint(work_dir / "tune"))
    assert checkpoint.is_dir() == bool(zero)
    again = export_config(harness.TINY_CONFIG, **how, checkpoint=checkpoint, out=work_dir / "again")
    assert harness.differing(weights(again), written) == []


@pytest.mark.parametrize("zero", [2, 3])
def test_an_adapter_from_a_deepspeed_folder(trained, zero):
    """The checkpoint holds it in float32, the finished stage in bfloat16."""
    work_dir, options = trained(zero, "lora")
    parts = export_config(
        harness.TINY_CONFIG, fmt="parts", work_dir=work_dir, options=options,
        checkpoint=work_dir / "tune/iter_4.pth", dtype="float32",
    )  # fmt: skip
    written = weights(work_dir / "tune" / "llm_adapter")
    found = weights(parts / "llm_adapter")
    assert found.keys() == written.keys() and len(found) > 10
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), written[name].bfloat16()), name
    published = read_state(work_dir / "tune")["origin"]["llm"]["name"]
    llm = LlamaForCausalLM.from_pretrained(published, torch_dtype=torch.bfloat16).float()
    llm = peft.PeftModel.from_pretrained(llm, parts / "llm_adapter")
    expected = llm.merge_and_unload().state_dict()
    merged = weights(parts / "llm")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def vicuna(run):
    return run("vicuna", train_llm="lora")


def save(state, path):
    torch.save({"state_dict": state, "meta": {}}, path)
    return path


def test_lora_is_added_as_peft_adds_it(vicuna, tmp_path):
    """The model's own state dict; what peft makes of the same model in float32."""
    checkpoint = save(vicuna.model.state_dict(), tmp_path / "iter_1.pth")
    out = export_config(vicuna.config, work_dir=vicuna.work_dir, checkpoint=checkpoint,
                        out=tmp_path / "hf", dtype="float32")  # fmt: skip
    expected = copy.deepcopy(vicuna.model.llm).merge_and_unload().state_dict()
    found = weights(out)
    for name, tensor in expected.items():
        exported = found[f"language_model.{name}"][: len(tensor)]
        torch.testing.assert_close(exported, tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["in full", "by LoRA"])
def test_a_trained_visual_encoder_is_exported_as_trained(vicuna, tmp_path, lora):
    encoder = copy.deepcopy(vicuna.model.visual_encoder)
    torch.manual_seed(3)
    if lora:
        encoder = peft.get_peft_model(encoder, LORA)
    for name, weight in encoder.named_parameters():
        if "lora_" in name or not lora:
            weight.data += torch.randn_like(weight) * 0.1
    kept = {k: v for k, v in encoder.state_dict().items() if not lora or "lora_" in k}
    state = vicuna.model.state_dict() | {f"visual_encoder.{k}": v for k, v in kept.items()}
    options = {"model.visual_encoder_lora": dict(type="peft.LoraConfig", r=4, lora_alpha=8)}
    checkpoint = save(state, tmp_path / "iter_1.pth")
    how = dict(work_dir=vicuna.work_dir, checkpoint=checkpoint, dtype="float32",
               options=options if lora else None)  # fmt: skip
    expected = (encoder.merge_and_unload() if lora else encoder).state_dict()
    found = weights(export_config(vicuna.config, **how, out=tmp_path / "hf"))
    parts = weights(export_config(vicuna.config, **how, out=tmp_path / "parts", fmt="parts"))
    own = export_config(vicuna.config, **how, out=tmp_path / "xtuner", fmt="xtuner")
    # Files hold transformers 4's names; from 5 on, "vision_model." is no part of a model's.
    prefix = "" if any("vision_model." in name for name in expected) else "vision_model."
    for name, tensor in expected.items():
        name = prefix + name
        for exported in (found[f"vision_tower.{name}"], parts[f"visual_encoder/{name}"],
                         weights(own)[f"visual_encoder/{name}"]):  # fmt: skip
            torch.testing.assert_close(exported, tensor, atol=1e-6, rtol=1e-6)
    assert (own / "visual_encoder/preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "projector" not in k}, "holds no projector"),
        (lambda s: {k: v for k, v in s.items() if "lora_" not in k}, "holds no adapter"),
        (lambda s: s | {"llm.model.norm.weight": torch.ones(32)}, "does not fit a LlamaForCausal"),
        (lambda s: {k: v[:2] if "lora_A" in k else v for k, v in s.items()}, "rank 2, but"),
        (lambda s: {k: v[:, :3] if "q_proj.lora_A" in k else v for k, v in s.items()},
         r"q_proj: A \(4, 3\), B \(32, 4\), weight \(32, 32\)"),
        (lambda s: {k: v for k, v in s.items() if "1.self_attn.q_proj.lora_B" not in k},
         "missing: model.layers.1.self_attn.q_proj.lora_B. Without"),
        (lambda s: {k: v for k, v in s.items() if "lora_" not in k or "layers.1" not in k},
         "missing: model.layers.1.self_attn.q_proj.lora_A and B, .* and 2 more"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_stage_or_model_is_refused(vicuna, tmp_path, change, message):
    checkpoint = save(change(vicuna.model.state_dict()), tmp_path / "iter_1.pth")
    with pytest.raises(DPAError, match=message):
        export_config(vicuna.config, work_dir=vicuna.work_dir, checkpoint=checkpoint,
                      out=tmp_path / "hf")  # fmt: skip
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_is_checked_as_the_finished_stage_is(vicuna, tmp_path):
    file = save(vicuna.model.state_dict(), vicuna.work_dir / "tune" / "iter_1.pth")
    for checkpoint in (file, shutil.copy(file, tmp_path)):
        with pytest.raises(DPAError, match=r"lora_alpha: was 8.0, is 16.0"):
            export_config(vicuna.config, work_dir=vicuna.work_dir, checkpoint=Path(checkpoint),
                          options={"tune.lora.lora_alpha": 16})  # fmt: skip
    with pytest.raises(DPAError, match=r"iter_1\.pth is of stage tune, not of align"):
        export_config(vicuna.config, "align", work_dir=vicuna.work_dir, checkpoint=file)


class Code:
    """Pickled, a call of a function."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(vicuna, tmp_path):
    torch.save({"x": Code(tmp_path / "ran")}, tmp_path / "iter_1.pth")
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    for part in ("model", "optim"):  # DeepSpeed's versions open one or the other first
        file = folder / f"zero_pp_rank_0_mp_rank_00_{part}_states.pt"
        torch.save({"x": Code(tmp_path / "ran")}, file)
    for name in ("iter_1.pth", "iter_2.pth"):
        with pytest.raises(DPAError, match="Weights only load failed"):
            export_config(vicuna.config, work_dir=vicuna.work_dir, checkpoint=tmp_path / name,
                          out=tmp_path / "hf")  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_torchs_old_format(vicuna, tmp_path):
    state = {"state_dict": vicuna.model.state_dict()}
    torch.save(state, tmp_path / "iter_1.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "iter_1.pth").keys() == state["state_dict"].keys()


def test_a_file_that_is_no_checkpoint_is_answered(vicuna, tmp_path):
    how = dict(work_dir=vicuna.work_dir, out=tmp_path / "hf")
    with pytest.raises(DPAError, match=r"--checkpoint .*nothing does not exist"):
        export_config(vicuna.config, **how, checkpoint=tmp_path / "nothing")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(DPAError, match=r"text.pth is neither a .pth file nor a DeepSpeed folder"):
        export_config(vicuna.config, **how, checkpoint=tmp_path / "text.pth")
    with pytest.raises(DPAError, match=r"neither a .pth file nor a DeepSpeed folder"):
        export_config(vicuna.config, **how, checkpoint=tmp_path)
    for content in ([1, 2], {"state_dict": [3]}, {"state_dict": {"llm": 3}}, torch.ones(2)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(DPAError, match=r"other.pth holds no state dict"):
            export_config(vicuna.config, **how, checkpoint=tmp_path / "other.pth")
