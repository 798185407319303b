"""XTuner's format in `xtuner chat` itself, and the parts in the libraries they are for."""

import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from support import harness, runs
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.model.modules import ProjectorModel
from xtuner.tools import chat

from dpa_xtuner.export import export, export_config
from dpa_xtuner.export.chat_template import end_of_turn
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM

QWEN_CHAT = {"prompt_template": "qwen_chat", "tokenizer.chat_template": ""}


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """Not square: XTuner's chat pads, as the training does."""
    return runs.write_image(tmp_path_factory.mktemp("image") / "wide.png", 30, 20)


def said_by_chat(command: str, image: Path, log: Path) -> str:
    """What `xtuner chat` answers to one question, asked on its standard input."""
    argv = shlex.split(command.replace("IMAGE", str(image)))[1:]
    argv += ["--torch-dtype", "fp32", "--temperature", "0", "--max-new-tokens", "8"]

    def ask() -> None:
        sys.argv = [*argv, "--no-streamer"]
        lines = iter(["What is it?", "", "EXIT", ""])
        chat.input = lambda *_: next(lines)
        chat.main()

    harness.forked(ask, log)
    return log.read_text().split("EXIT: exit chat")[1].split(">>> ")[1].split("\ndouble enter")[0]


@pytest.mark.parametrize(
    ("family", "how", "written"),
    [
        ("internlm2", dict(train_llm="lora"), ["config.json", "model.safetensors", "projector"]),
        ("internlm2", dict(train_llm="full"), ["config.json", "model.safetensors", "projector"]),
        ("smollm2", dict(options=QWEN_CHAT), ["llm_adapter", "projector"]),
        ("llama3_1", {}, ["llm_adapter", "projector"]),
        ("gemma2", {}, ["config.json", "projector"]),
        ("smollm2", dict(options=QWEN_CHAT, start_from="proxy"), ["config.json", "projector"]),
    ],
)
def test_xtuner_chat_says_what_the_trained_model_says(run, image, tmp_path, family, how, written):
    if family == "gemma2" and not LLAVA_HOLDS_AN_LLM:
        pytest.skip("refused on this version of transformers")
    made = run(family, **how)
    export_config(made.config, fmt="xtuner", work_dir=made.work_dir, options=how.get("options"),
                  dtype="float32")  # fmt: skip
    out = made.work_dir / "tune/xtuner"
    assert set(written) <= {path.name for path in out.iterdir()}
    assert (out / "llm_adapter").exists() == ("llm_adapter" in written)
    command = runs.record(out)["command"].replace("FOLDER", str(out))
    assert "--prompt-template" in command and runs.record(out)["template_differs"] == []
    tokens = made.prompt(runs.RECORDS[0])
    ends = end_of_turn(made.settings.template, made.tokenizer)
    expected = made.tokenizer.decode(made.greedy(tokens, image, 8, ends, 10**6))
    assert expected.strip() in said_by_chat(command, image, tmp_path / "chat.log")


def test_what_xtuner_chat_does_otherwise_is_said(run, monkeypatch):
    told = []
    monkeypatch.setattr(export, "print_log", lambda line, _: told.append(line))
    made = run("vicuna", options={"tune.pad_image_to_square": False})
    out = export_config(made.config, fmt="xtuner", work_dir=made.work_dir,
                        options={"tune.pad_image_to_square": False})  # fmt: skip
    asked = shlex.split(runs.record(out)["command"])
    # XTuner's template says Vicuna's default prompt itself, and a newline behind it.
    assert asked[asked.index("--system") + 1] == ""
    assert runs.record(out)["template_differs"] == ["1 turn(s) with an image"]
    assert "not padded to a square in training, but xtuner chat pads every image" in told[1]
    assert "With xtuner chat, these prompts" in told[2]
    assert "tokens of training: 1 turn(s) with an image" in told[2]
    assert told[3] == f"Open it: {runs.record(out)['command'].replace('FOLDER', str(out))}"


@pytest.mark.parametrize("family", ["internlm2", "gemma2"])
def test_the_proxy_alone(run, family):
    """As an LLM of transformers' own class, and as an adapter for the published one."""
    made = run(family, stage="proxy")
    out = export_config(made.config, stage="proxy", fmt="parts", work_dir=made.work_dir,
                        dtype="float32")  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["dpa.json", "llm", "llm_adapter"]
    tokens = torch.arange(20)[None] * 7
    with torch.no_grad():
        expected = made.model.llm.eval()(tokens).logits
        # 4.57 has to be told, see save_llm.
        told = {"attn_implementation": "eager"} if transformers.__version__[:4] == "4.57" else {}
        whole = AutoModelForCausalLM.from_pretrained(out / "llm", **told)
        assert whole.config.use_cache
        torch.testing.assert_close(whole(tokens).logits, expected, atol=1e-5, rtol=1e-5)
        beside = made.model.llm.get_base_model()
        with made.model.llm.disable_adapter():
            assert (beside(tokens).logits - expected).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(out / "llm")
    assert tokenizer("What is it?").input_ids == made.tokenizer("What is it?").input_ids
    assert tokenizer.chat_template == made.tokenizer.chat_template


def test_projector_and_adapter_load_in_their_own_libraries(run):
    made = run("qwen2", options={"projector": dict(type="mlp", depth=3)})
    out = export_config(made.config, fmt="parts", work_dir=made.work_dir, dtype="float32",
                        options={"projector": dict(type="mlp", depth=3)})  # fmt: skip
    patches = torch.randn(1, 5, 8)
    projector = ProjectorModel.from_pretrained(out / "projector")
    assert torch.equal(projector(patches), made.model.projector(patches))
    published = AutoModelForCausalLM.from_pretrained(made.folder / "llm")
    adapted = PeftModel.from_pretrained(published, out / "llm_adapter").eval()
    tokens = torch.arange(20)[None] * 7
    with torch.no_grad():
        expected = made.model.llm.eval()(tokens).logits
        torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projector", ["resampler", "pixel_shuffle"])
def test_parts_hold_any_projector(run, projector):
    options = {"projector": dict(type=projector)}
    made = run("smollm2", stage="align", options=options)
    out = export_config(made.config, stage="align", fmt="parts", work_dir=made.work_dir,
                        options=options, dtype="float32")  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["dpa.json", "projector"]
    from dpa_xtuner.model.projectors import load_projector

    again = load_projector(str(out / "projector"), 8, 32)
    patches = torch.randn(1, 16, 8)
    assert torch.equal(again(patches), made.model.projector(patches))
