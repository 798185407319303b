"""What is refused and how it is told, what is found fresh, and the command itself."""

import json
import runpy
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support import runs
from transformers import AutoConfig, AutoTokenizer

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config, hf
from dpa_xtuner.files import file_sha256

pytestmark = pytest.mark.slow

TOOL = runs.ROOT / "tools" / "export.py"


@pytest.fixture(scope="module")
def qwen(run):
    return run("qwen2")


def refused(made, fmt="hf", stage="tune", **options) -> str:
    with pytest.raises(DPAError) as caught:
        export_config(made.config, stage, fmt, work_dir=made.work_dir, options=options)
    return str(caught.value)


@pytest.fixture
def changed(qwen, monkeypatch):
    """The message where a run was trained with other settings, before anything is loaded."""
    from dpa_xtuner.export import export as module
    from dpa_xtuner.export import source

    monkeypatch.setattr(source, "refuse_changed", lambda *_: None)
    monkeypatch.setattr(module, "StageWeights", lambda *_: pytest.fail("something was loaded"))
    return lambda fmt="hf", **options: refused(qwen, fmt, **options)


@pytest.mark.parametrize(
    ("options", "reason", "able"),
    [
        ({"projector": dict(type="resampler")}, "projector='resampler' is not an MLP", "parts"),
        ({"projector": dict(type="pixel_shuffle")}, "'pixel_shuffle' is not an MLP", "parts"),
        ({"projector": dict(type="avg_pool")}, "'avg_pool' is not an MLP", "parts"),
        ({"projector.depth": 3}, "projector.depth=3: LLaVA's", "xtuner or --format parts"),
        ({"max_tiles": 6}, "max_tiles=6: an image is cut into tiles", "parts"),
        ({"model.llm.quantization_config": dict(load_in_4bit=True)}, "the LLM is quantised",
         "xtuner or --format parts"),
    ],
)  # fmt: skip
def test_what_llava_cant_express_is_said_before_any_work(changed, options, reason, able):
    message = changed(**options)
    assert reason in message and message.endswith(f"--format {able} can.")


@pytest.mark.parametrize(
    ("kind", "registers", "reason"),
    [
        (dict(type="dinov2", image_size=16), False, "the output of its final norm"),
        (dict(type="dinov2", image_size=16, layer=-2), True, "5 tokens that are not patches"),
        (dict(type="internvit", trust_remote_code=True), False, "not a single encoder"),
    ],
)
def test_encoders_that_llava_has_not(changed, tmp_path, kind, registers, reason):
    from support import encoder_folders

    more = {"registers": True} if registers else {}
    folder = getattr(encoder_folders, kind["type"])(tmp_path / "encoder", **more)
    message = changed(visual_encoder_name_or_path=folder, encoder=kind)
    assert reason in message and message.endswith("--format parts can.")


def test_two_encoders_and_other_formats(changed, qwen, tmp_path):
    from support import encoder_folders

    second = encoder_folders.dinov2(tmp_path / "dinov2")
    pair = dict(type="pair", first=dict(type="clip"),
                second=dict(type="dinov2", image_size=16))  # fmt: skip
    names = f"{qwen.folder / 'encoder'} + {second}"
    for fmt in ("hf", "xtuner"):
        message = changed(fmt, visual_encoder_name_or_path=names, encoder=pair)
        assert "not a single encoder" in message and message.endswith("--format parts can.")
    siglip = encoder_folders.siglip(tmp_path / "siglip")
    message = changed("xtuner", visual_encoder_name_or_path=siglip, encoder=dict(type="siglip"))
    assert (
        "xtuner chat reads only CLIP's" in message
        and "--format hf or --format parts can" in message
    )
    message = changed("xtuner", **{"model.visual_select_layer": -1})
    assert "layer -1: xtuner chat reads only CLIP's second-last layer" in message


def test_the_proxy_has_no_pictures(qwen):
    for fmt in ("hf", "xtuner"):
        message = refused(qwen, fmt, stage="proxy")
        assert "stage proxy has neither visual encoder nor projector" in message


def test_names_and_places_that_are_wrong(qwen, tmp_path):
    message = refused(qwen, stage="tuen")
    assert "--stage 'tuen' is not a stage of method='dpa'; did you mean 'tune'?" in message
    assert "--format 'hff' is not known; did you mean 'hf'?" in refused(qwen, fmt="hff")
    with pytest.raises(DPAError, match=r"There is no run in .*Train first, or give its folder"):
        export_config(qwen.config, work_dir=tmp_path / "nowhere")
    message = refused(qwen, projector=dict(type="resampler"))
    assert "projector.type: was mlp, is resampler" in message
    assert "settings.lora.r: was 4, is 8" in refused(qwen, **{"tune.lora.r": 8})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(DPAError, match="mine exists, but is not an earlier export"):
        export_config(qwen.config, work_dir=qwen.work_dir, out=tmp_path / "mine")
    with pytest.raises(DPAError, match="llm_adapter exists, but is not an earlier export"):
        export_config(qwen.config, work_dir=qwen.work_dir, out=qwen.work_dir / "tune/llm_adapter")


def test_an_unfinished_stage_and_a_part_that_is_gone(qwen, tmp_path):
    work_dir = shutil.copytree(qwen.work_dir, tmp_path / "run")
    shutil.rmtree(work_dir / "tune" / "projector")
    with pytest.raises(DPAError, match="tune/projector, which stage tune wrote, is gone"):
        export_config(qwen.config, work_dir=work_dir)
    (work_dir / "tune" / "stage.json").write_text('{"status": "running"}')
    (work_dir / "tune" / "iter_8.pth").touch()
    with pytest.raises(DPAError, match=r"Stage tune in .* is not finished.*--checkpoint .*iter_8"):
        export_config(qwen.config, work_dir=work_dir)
    (work_dir / "proxy" / "stage.json").unlink()
    with pytest.raises(DPAError, match=r"Stage proxy .* is not finished, but stage align starts"):
        export_config(qwen.config, "align", work_dir=work_dir)


def test_a_full_disk_leaves_nothing_behind(qwen, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda _: usage(10_000))
    with pytest.raises(DPAError, match=r"has 0.0 GB left. Make room"):
        export_config(qwen.config, work_dir=qwen.work_dir, out=tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == [".hf.lock"]


def test_a_fresh_export_is_found_and_a_stale_one_made_again(qwen, tmp_path):
    work_dir = shutil.copytree(qwen.work_dir, tmp_path / "run")

    def made(**how) -> int:
        file_sha256.cache_clear()  # a process reads a file once
        out = export_config(qwen.config, work_dir=work_dir, **how)
        assert out == work_dir / "tune" / "hf"
        return (out / "config.json").stat().st_mtime_ns

    first = made()
    assert made() == first
    assert made(dtype="bfloat16") > first
    first = made()
    file = work_dir / "tune" / "projector" / "model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    second = made()
    assert second > first and made() == second
    third = made(options={"tokenizer.chat_template": ""})
    assert third > second
    (work_dir / "tune" / "hf" / "model.safetensors").unlink()
    assert made(options={"tokenizer.chat_template": ""}) > third
    assert (work_dir / "tune" / "hf" / "model.safetensors").is_file()
    # A record as the first version wrote it is no proof, and no stranger's either.
    record = runs.record(work_dir / "tune" / "hf")
    del record["files"], record["run"]
    (work_dir / "tune" / "hf" / "dpa.json").write_text(json.dumps(record))
    made(options={"tokenizer.chat_template": ""})
    assert runs.record(work_dir / "tune" / "hf")["files"]


def test_what_an_export_does_not_replace(qwen, tmp_path):
    """Another stage, another run, own files beside it, and one that is being written."""
    out = tmp_path / "hf"

    def export(stage="tune", work_dir=qwen.work_dir, dtype="float16") -> str:
        with pytest.raises(DPAError) as caught:
            export_config(qwen.config, stage, out=out, work_dir=work_dir, dtype=dtype)
        return str(caught.value)

    with FileLock(tmp_path / ".hf.lock"):
        assert f"Another export is writing {out}" in export()
    export_config(qwen.config, out=out, work_dir=qwen.work_dir)
    assert "hf is an export of stage tune of" in export("align")
    copied = shutil.copytree(qwen.work_dir, tmp_path / "copied")
    assert f"not of stage tune of {copied}" in export(work_dir=copied)
    (out / "notes.txt").write_text("mine")
    assert "holds files that don't belong to the export and would be lost: notes.txt" in export()
    (out / "notes.txt").unlink()
    export_config(qwen.config, out=out, work_dir=qwen.work_dir, dtype="float16")
    assert runs.record(out)["dtype"] == "float16"


def test_a_link_stays_one(qwen, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "hf")
    for dtype in ("bfloat16", "float16"):
        out = export_config(qwen.config, out=tmp_path / "link", work_dir=qwen.work_dir, dtype=dtype)
        assert out == tmp_path / "disk" / "hf" and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = export_config(qwen.config, out=Path(), work_dir=qwen.work_dir)
    assert out == tmp_path / "here" and (out / "config.json").is_file()


def test_models_and_parts_that_changed_in_place(run, tmp_path):
    made = run("smollm2", start_from="proxy")

    def spoilt(file: Path) -> str:
        whole = file.read_bytes()
        save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, {"format": "pt"})
        file_sha256.cache_clear()
        message = refused(made)
        file.write_bytes(whole)
        return message

    export_config(made.config, work_dir=made.work_dir)
    for side, name in (("llm", "llm"), ("encoder", "visual_encoder")):
        message = spoilt(made.folder / side / "model.safetensors")
        assert f"/{side} holds other weights than" in message
        assert f"or set {name}_name_or_path" in message
    message = spoilt(made.work_dir / "proxy" / "llm_adapter" / "adapter_model.safetensors")
    assert "llm_adapter is not what stage tune was trained on" in message
    file_sha256.cache_clear()
    parts = export_config(made.config, fmt="parts", work_dir=made.work_dir)
    beside = made.work_dir / "proxy" / "llm_adapter"
    assert runs.record(parts)["llm_adapter_on"] == f"{made.folder / 'llm'} + {beside}"


def test_mistakes_are_told_without_a_traceback(qwen, tmp_path, monkeypatch):
    message = refused(qwen, **{"model.llm.attn_implementation": "bogus"})
    assert "bogus" in message and "Check its other keys in the config" in message
    (tmp_path / "broken.py").write_text("a = (\n")
    with pytest.raises(DPAError, match=r"The config .*broken.py can't be read: .*never closed"):
        export_config(tmp_path / "broken.py")
    work_dir = shutil.copytree(qwen.work_dir, tmp_path / "run")
    for state, told in (
        ("[]", r"broken \(no object"),
        ('{"status": "finished"}', "no origin in it"),
    ):
        (work_dir / "tune" / "stage.json").write_text(state)
        with pytest.raises(DPAError, match=told):
            export_config(qwen.config, work_dir=work_dir)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from _configs import find_config

    with pytest.raises(SystemExit, match="is not there: expected a config"):
        find_config(str(tmp_path / "nothing.py"))


def test_the_exported_tokenizer_gives_the_tokens_of_training(run, pieces, tmp_path):
    """Also after a training with the slow tokenizer, which transformers does not load."""
    made = run("vicuna")
    shutil.copy(pieces(True), made.folder / "llm" / "tokenizer.model")
    # As published: a folder that we wrote names a class that has no slow twin.
    file = made.folder / "llm" / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"})
    )
    for options in (None, {"tokenizer.use_fast": False}):
        out = export_config(made.config, work_dir=made.work_dir, out=tmp_path / "hf",
                            options=options)  # fmt: skip
        assert runs.record(out)["template_differs"] == []
    captions = export_config(made.config, "align", work_dir=made.work_dir)
    assert runs.record(captions)["template_differs"] == []


def test_what_is_written(qwen, tmp_path):
    out = export_config(qwen.config, work_dir=qwen.work_dir, out=tmp_path / "hf")
    record = runs.record(out)
    assert (record["format"], record["stage"], record["dtype"]) == ("hf", "tune", "float32")
    assert record["pad_image_to_square"] is True and record["template_differs"] == []
    assert "tune/projector/model.safetensors" in record["weights"]
    published, config = (
        AutoConfig.from_pretrained(qwen.folder / "llm"),
        AutoConfig.from_pretrained(out),
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    # What the processor and the tokenizer make of messages is the same.
    template = json.loads((out / "chat_template.json").read_text())["chat_template"]
    assert tokenizer.chat_template == template != qwen.tokenizer.chat_template
    # Rows that no token used: one of them is the image's.
    assert config.text_config.vocab_size == published.vocab_size
    assert config.image_token_index == len(qwen.tokenizer) == tokenizer.vocab["<image>"]
    assert config.image_seq_length == 16 and config.text_config.use_cache
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [config.image_token_index]
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"])[0] == "<|im_end|>"
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "language_model.lm_head.weight" not in weights  # tied


def test_shards_and_a_row_of_zeros(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD", "40KB")
    made = run("llama3")
    out = export_config(made.config, work_dir=made.work_dir, out=tmp_path / "hf", dtype="float16")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    state = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    for name in ("model.embed_tokens", "lm_head"):
        rows = state[f"language_model.{name}.weight"]
        assert len(rows) == len(made.tokenizer) + 1 and not rows[-1].any() and rows[-2].any()


def test_align_with_the_merged_proxy(run, tmp_path):
    """The frozen LLM of `align` to the bit, in the dtype it was trained in."""
    made = run("llama3", stage="align", precision="bf16")
    out = export_config(made.config, "align", work_dir=made.work_dir)
    state = load_file(out / "model.safetensors")
    for name, weight in made.model.llm.state_dict().items():
        assert torch.equal(state[f"language_model.{name}"][: len(weight)], weight), name
    assert runs.record(out)["template_differs"] == []


def test_the_command(qwen, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOL.parent))

    def run(*more) -> None:
        out = tmp_path / "hf"
        arguments = [qwen.config, "--work-dir", qwen.work_dir, "-o", out, *more]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    run("--dtype", "float32")
    assert runs.record(tmp_path / "hf")["dtype"] == "float32"
    with pytest.raises(SystemExit) as caught:
        run("--stage", "finetune")
    assert caught.value.code == 1
    assert "dpa_xtuner: --stage 'finetune' is not a stage" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["llm", "encoder"])
def test_models_may_move_and_not_change(qwen, tmp_path, side):
    """`llm_name_or_path` is another folder now, with the same weights or others."""
    moved = shutil.copytree(qwen.folder / side, tmp_path / "moved")
    name = "llm" if side == "llm" else "visual_encoder"
    how = dict(work_dir=qwen.work_dir, options={f"{name}_name_or_path": str(moved)})
    export_config(qwen.config, **how, out=tmp_path / "hf")
    weights = load_file(moved / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, moved / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(DPAError, match=f"moved holds other weights.*set {name}_name_or_path"):
        export_config(qwen.config, **how, out=tmp_path / "other")
