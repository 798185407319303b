"""QLoRA through the stages. There is no GPU for bitsandbytes: weights are floats that say so."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support import harness
from transformers import LlamaForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.settings import Settings

IN_4_BIT = {"model.llm.quantization_config": {"type": "transformers.BitsAndBytesConfig",
                                              "load_in_4bit": True}}  # fmt: skip
QLORA = IN_4_BIT | {"tune.train_llm": "lora"}


def settings(options: dict) -> Settings:
    cfg = Config.fromfile(harness.TINY_CONFIG)
    cfg.merge_from_dict(options)
    return Settings.from_config(cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tune.train_llm": "full"},
            "tune.train_llm: 'full' would train the LLM: set it to",
        ),
        ({"proxy.train_llm": "full"}, "proxy.train_llm: 'full' would train the LLM"),
        ({"tune.start_from": "proxy"}, "tune.start_from: 'proxy' would be added to the LLM"),
    ],
    ids=str,
)
def test_what_would_change_quantised_weights_is_refused(tiny, options, message):
    with pytest.raises(DPAError, match=r"model\.llm\.quantization_config quantises the") as error:
        settings(QLORA | options)
    assert message in str(error.value) and str(error.value).count("\n  ") == 1


def test_lora_on_quantised_weights_and_a_proxy_that_is_not_trained_are_not(tiny):
    assert settings(QLORA).tune.train_llm == "lora"
    settings(QLORA | {"method": "cmo", "proxy.train_llm": "full"})  # it has no stage proxy


def test_it_is_refused_before_the_first_step(tiny, tmp_path):
    code, output = harness.run(
        None, tmp_path / "run", "model.llm.quantization_config.load_in_4bit=True"
    )
    assert code == 1 and "Traceback" not in output
    assert "tune.train_llm: 'full' would train the LLM" in output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_published_quantised_is_told_likewise(tiny, tmp_path):
    config = json.loads((tiny / "llm/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in (tiny / "llm").iterdir():
        (llm / file.name).symlink_to(file)
    (llm / "config.json").unlink()
    (llm / "config.json").write_text(json.dumps(config))
    code, output = harness.run(None, tmp_path / "run", f"llm_name_or_path={llm}")
    assert code == 1 and f"The config.json of {llm} quantises the LLM" in output


def say_quantised() -> None:
    LlamaForCausalLM.is_quantized = True


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_all_stages_with_the_proxy_beside_the_weights(tiny, tmp_path, deepspeed):
    work_dir = tmp_path / "run"
    for stage in harness.STAGES:
        options = ("tune.train_llm=lora", "proxy.lora.lora_dropout=0.5")
        watched = harness.watch(tmp_path / f"{stage}.pt")

        def prepare(watched=watched) -> None:
            say_quantised()
            watched()

        output = harness.finish(stage, work_dir, *options, prepare=prepare, deepspeed=deepspeed)
        if stage == "align":
            rows = {row.split()[0]: row for row in output.splitlines() if row.startswith("  llm")}
            assert rows["llm_adapter"].split()[1] == "0"
            assert rows["llm_adapter"].endswith(str(work_dir / "proxy/llm_adapter"))
            assert " + " not in rows["llm"]
            trained = _trained(tmp_path / "align.pt")
            assert trained and all(name.startswith("projector.") for name in trained)
    trained = _trained(tmp_path / "tune.pt")
    assert {name.split(".")[0] for name in trained} == {"llm", "projector"}
    assert all(".lora_" in name for name in trained if name.startswith("llm."))
    written = sorted(
        f.parent.relative_to(work_dir).as_posix() for f in work_dir.glob("*/*/dpa.json")
    )
    assert written == ["align/projector", "proxy/llm_adapter", "tune/llm_adapter", "tune/projector"]
    measured = json.loads((work_dir / "align/stage.json").read_text())["measured"]
    assert measured.keys() > {"original", "floor", "align", "leakage"}


def _trained(file: Path) -> set[str]:
    return torch.load(file)["trainable"]
