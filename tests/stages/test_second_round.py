"""A finished model is tuned on: by its LLM and its projector, which have to belong together."""

import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from safetensors.torch import load_file, save_file
from support import harness
from support.harness import Layout
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpa_xtuner.data import collate
from dpa_xtuner.engine.hooks import HandOverHook
from dpa_xtuner.export import export_config
from dpa_xtuner.files import file_sha256
from dpa_xtuner.planning import sweep
from dpa_xtuner.planning.check import check_config
from dpa_xtuner.planning.memory import stage_models
from dpa_xtuner.stages.settings import config_from_file

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
FULL = Layout(dropout=0.0, train_llm="full")
LORA = ["tune.train_llm=lora", "precision=fp32"]


@dataclass
class Round:
    """A finished stage tune, the LLM and projector of which the next round begins with."""

    work_dir: Path
    llm: Path
    more: list[str]

    @property
    def projector(self) -> Path:
        return self.work_dir / "tune/projector"

    def options(self, **changed) -> list[str]:
        """Those of the next round."""
        given = {"llm_name_or_path": self.llm, "tune.init_projector": self.projector} | changed
        return [f"{key}={value}" for key, value in given.items()] + self.more

    def watched(self) -> dict:
        return torch.load(self.work_dir / "watched-tune.pt")


def watched(work_dir: Path):
    return harness.watch(work_dir / "watched-tune.pt")


def finished(work_dir: Path, more: list[str], **options) -> Round:
    """A run of which stage tune is done; the LLM of an adapter is exported by the one command."""
    llm = work_dir / "tune/llm"
    if more:
        parsed = dict(option.split("=") for option in more) | options
        out = export_config(harness.TINY_CONFIG, fmt="llm", work_dir=work_dir, options=parsed,
                            dtype="float32")  # fmt: skip
        assert out == llm
    return Round(work_dir, llm, more)


@pytest.fixture(scope="module")
def rounds(reference, tmp_path_factory):
    """The first and the second round, trained in full or by LoRA."""
    made = {}

    def make(train_llm: str) -> tuple[Round, Round]:
        if train_llm not in made:
            folder = tmp_path_factory.mktemp("rounds")
            one, more = reference(FULL).work_dir, []
            if train_llm == "lora":
                one, more = folder / "one", LORA
                for stage in ("proxy", "align"):
                    harness.finish(stage, one, *LORA)
                harness.finish("tune", one, *LORA, prepare=watched(one))
            first = finished(one, more)
            second = folder / "two"
            harness.finish(None, second, *first.options(), prepare=watched(second))
            options = {"llm_name_or_path": str(first.llm)}
            options |= {"tune.init_projector": str(first.projector)}
            made[train_llm] = first, finished(second, more, **options if more else {})
        return made[train_llm]

    return make


both = pytest.mark.parametrize("train_llm", ["full", "lora"])


@torch.no_grad()
def logits(work_dir: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the stage's model with these weights, for a few samples with pictures."""
    cfg = Config.fromfile(work_dir / "tune" / harness.TINY_CONFIG.name)
    model = MODELS.build(cfg.model)
    nn.Module.load_state_dict(model, state)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    batch = collate([data[i] for i in range(6)])["data"]
    return model.eval().llm(**model.splice(batch), use_cache=False).logits.float()


@both
def test_the_second_round_begins_where_the_first_one_ended(train_llm, rounds):
    first, second = rounds(train_llm)
    end, start = first.watched()["after"], second.watched()["before"]
    ended, begun = logits(first.work_dir, end), logits(second.work_dir, start)
    assert ended.std() > 0.1
    torch.testing.assert_close(begun, ended, atol=1e-5, rtol=0)
    if train_llm == "full":  # the adapter's weights are added to others
        assert harness.differing(end, start) == []
    original = logits(first.work_dir, first.watched()["before"])
    assert (original - ended).abs().max() > 0.01


@both
def test_the_second_round_trains_and_writes_as_tune_does(train_llm, rounds):
    first, second = rounds(train_llm)
    assert not (second.work_dir / "align").exists() and not (second.work_dir / "proxy").exists()
    seen = second.watched()
    assert seen["trainable"] == first.watched()["trainable"]
    assert set(harness.differing(seen["before"], seen["after"])) == seen["trainable"]
    part = "llm" if train_llm == "full" else "llm_adapter"
    assert {"projector", part} <= {f.parent.name for f in second.work_dir.glob("tune/*/dpa.json")}


@both
def test_a_third_round_keeps_the_lineage(train_llm, rounds, tmp_path):
    first, second = rounds(train_llm)
    harness.finish(None, tmp_path / "three", *second.options(), prepare=watched(tmp_path / "three"))
    start = torch.load(tmp_path / "three/watched-tune.pt")["before"]
    third, ended = (logits(w, s) for w, s in (
        (tmp_path / "three", start), (second.work_dir, second.watched()["after"])
    ))  # fmt: skip
    torch.testing.assert_close(third, ended, atol=1e-5, rtol=0)
    for file in ("tune/projector/dpa.json", "tune/stage.json"):
        record = json.loads((tmp_path / "three" / file).read_text())
        record = record.get("origin", record)
        assert record["llm"]["name"] == str(second.llm)
        assert record["settings"]["init_projector"] == str(second.projector)
        before = record
        for earlier in (second, first):
            digest = file_sha256(earlier.projector / "model.safetensors")
            assert before["loads"]["projector/model.safetensors"] == digest
            before = before["initialised_from"]["projector"]
            assert before["step"] == 6 and before["config"] == str(harness.TINY_CONFIG)
        assert "initialised_from" not in before


@both
def test_the_tuned_llm_is_a_whole_folder(train_llm, rounds, tiny):
    first, _ = rounds(train_llm)
    original = AutoTokenizer.from_pretrained(tiny / "llm")
    tokenizer = AutoTokenizer.from_pretrained(first.llm)
    text = "What is it?\nTwo cats."
    assert tokenizer(text).input_ids == original(text).input_ids
    llm, info = AutoModelForCausalLM.from_pretrained(first.llm, output_loading_info=True)
    assert not any(info.values()) and llm.config.use_cache
    ids = torch.tensor([tokenizer(text).input_ids])
    longer = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_length=40)
    assert longer.shape[1] == ids.shape[1] + 3


def test_generation_settings_are_the_originals_even_odd_ones(reference, tiny, tmp_path):
    """Vicuna's name a temperature and no sampling, which transformers refuses to save."""
    original = shutil.copytree(tiny / "llm", tmp_path / "llm")
    odd = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 2], "max_length": 99}
    (original / "generation_config.json").write_text(json.dumps(odd))
    for stage in ("proxy", "align"):
        harness.copy_stage(reference(FULL).work_dir, tmp_path / "run", stage)
    # pytest's own filter would hide the warning that transformers turns into an error.
    harness.finish("tune", tmp_path / "run", f"llm_name_or_path={original}", "tune.max_steps=1",
                   prepare=lambda: warnings.simplefilter("default"))  # fmt: skip
    written = GenerationConfig.from_pretrained(tmp_path / "run/tune/llm")
    assert {key: getattr(written, key) for key in odd} == odd


# What belongs together.


def told(options: list[str], work_dir: Path, **how) -> str:
    message = harness.refusal(None, work_dir, *options, **how)
    assert not list(work_dir.glob("tune/iter_*"))
    return message


@both
def test_an_llm_that_was_not_tuned_with_the_projector_is_refused(
    train_llm, rounds, reference, tiny, tmp_path
):
    first, second = rounds(train_llm)
    other = second.llm  # of another round
    for llm in (tiny / "llm", other):
        message = told(first.options(llm_name_or_path=llm), tmp_path / "run")
        assert str(first.projector) in message and str(llm) in message
        assert f"Set llm_name_or_path to {first.llm}" in message
    assert ("--format llm writes" in message) == (train_llm == "lora")
    message = told(second.options(llm_name_or_path=first.llm), tmp_path / "run")
    assert "of another run or" in message if train_llm == "full" else "from another run" in message


@both
def test_an_llm_whose_weights_have_changed_since_is_refused(train_llm, rounds, tmp_path):
    first, _ = rounds(train_llm)
    harness.copy_with_one_weight_changed(first.llm, tmp_path / "llm")
    message = told(first.options(llm_name_or_path=tmp_path / "llm"), tmp_path / "run")
    assert "belongs to another llm" in message and "fingerprint" in message
    assert str(first.llm) in message and str(tmp_path / "llm") in message


def test_the_projector_of_align_goes_with_the_original_llm_alone(rounds, reference, tiny, tmp_path):
    first, _ = rounds("full")
    align = reference(FULL).work_dir / "align/projector"
    given = {"tune.init_projector": align}
    harness.finish(
        None, tmp_path / "run", *first.options(llm_name_or_path=tiny / "llm", **given),
        prepare=watched(tmp_path / "run"),
    )  # fmt: skip
    # It is the tune stage of the first run.
    again = torch.load(tmp_path / "run/watched-tune.pt")["after"]
    assert harness.differing(again, first.watched()["after"]) == []
    message = told(first.options(**given), tmp_path / "other")
    assert f"{align} belongs to another llm" in message
    assert str(tiny / "llm") in message and str(first.llm) in message


def test_another_projector_is_refused(rounds, reference, tiny, tmp_path):
    first, _ = rounds("full")
    tampered = shutil.copytree(first.projector, tmp_path / "tampered")
    record = json.loads((tampered / "dpa.json").read_text())
    (tampered / "dpa.json").write_text(json.dumps(record | {"seed": 7}))
    message = told(first.options(**{"tune.init_projector": tampered}), tmp_path / "run")
    assert "seed: 42, the projector's 7" in message and str(tampered) in message


def test_a_projector_trained_in_another_precision_is_told(rounds, tmp_path):
    first, _ = rounds("full")
    run = shutil.copytree(first.work_dir, tmp_path / "first")
    for file in (run / "tune/projector/dpa.json", run / "tune/llm/dpa.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"precision": "fp16"}))
    given = {"tune.init_projector": run / "tune/projector", "llm_name_or_path": run / "tune/llm"}
    message = told(first.options(**given), tmp_path / "run")
    assert "was trained in precision='fp16', and this run computes in 'bf16'" in message


def test_an_exported_llm_goes_with_the_very_projector_that_was_there(rounds, tmp_path):
    first, _ = rounds("lora")
    other = shutil.copytree(first.projector, tmp_path / "projector")
    weights = {k: v + 1 for k, v in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = told(first.options(**{"tune.init_projector": other}), tmp_path / "run")
    assert "it was exported from another run or checkpoint" in message
    assert str(first.work_dir) in message


@pytest.mark.parametrize(
    ("place", "told_of"),
    [
        ("nowhere", "nowhere' does not exist. Give the folder of a projector"),
        ("stage.json", "stage.json' is not a folder"),
        ("", "has no dpa.json, config.json, model.safetensors"),
        ("llm", "holds llm, not a projector"),
    ],
)
def test_what_is_no_projector_is_told(place, told_of, rounds, tmp_path):
    first, _ = rounds("full")
    given = {"tune.init_projector": first.work_dir / "tune" / place}
    assert told_of in told(first.options(**given), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "told_of"),
    [
        (["projector.type=resampler"], "describes the projector {'type': 'mlp', 'depth': 2}"),
        (["projector.depth=3"], "'depth': 3"),
        (["encoder.type=siglip"], "siglip"),
        (["model.visual_select_layer=-1"], "model.visual_select_layer: was None, is -1"),
        (["tune.start_from=proxy"], "with tune.init_projector the run has the stage tune alone"),
        (["align.lr=1e-3"], "align.lr: with tune.init_projector the run has the stage tune alone"),
        (["proxy.lr=1e-3"], "proxy.lr: with tune.init_projector the run has the stage tune alone"),
        (["captions.share=0.5"], "captions.share: with tune.init_projector"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_the_projector_are_told(options, told_of, rounds, tmp_path):
    first, _ = rounds("full")
    assert told_of in told(first.options() + options, tmp_path / "run")


def test_a_stage_that_the_run_has_not_is_told(rounds, tmp_path):
    first, _ = rounds("full")
    message = harness.refusal("align", tmp_path / "run", *first.options())
    assert "'align' is not a stage of method='dpa' with tune.init_projector" in message
    assert message.strip().endswith("Stages: tune.")


def test_an_llm_of_another_size_is_refused_before_anything_is_built(rounds, reference, tmp_path):
    first, _ = rounds("full")
    other = shutil.copytree(first.llm, tmp_path / "llm")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    message = told(first.options(llm_name_or_path=other), tmp_path / "run")
    assert '"hidden_size": 64' in message and '"hidden_size": 32' in message


def test_another_visual_encoder_is_refused(rounds, tiny, tmp_path):
    first, _ = rounds("full")
    harness.copy_with_one_weight_changed(tiny / "visual_encoder", tmp_path / "encoder")
    given = first.options(visual_encoder_name_or_path=tmp_path / "encoder")
    message = told(given, tmp_path / "run")
    assert "belongs to another visual_encoder" in message
    assert str(tiny / "visual_encoder") in message and str(tmp_path / "encoder") in message


# Stops, and what comes after.


@both
def test_a_stopped_second_round_goes_on_and_ends_the_same(train_llm, rounds, tmp_path):
    first, second = rounds(train_llm)

    def stop() -> None:
        stock = HandOverHook.after_train_iter

        def stopping(self, runner, batch_idx, *rest, **more):
            stock(self, runner, batch_idx, *rest, **more)
            if batch_idx == 9:
                sys.exit(3)

        HandOverHook.after_train_iter = stopping

    code, output = harness.run(None, tmp_path / "run", *first.options(), prepare=stop)
    assert code == 3, output[-3000:]
    copied = shutil.copytree(first.projector, tmp_path / "projector")
    message = harness.refusal(
        None, tmp_path / "run", *first.options(**{"tune.init_projector": copied})
    )
    assert f"settings.init_projector: was {first.projector}, is {copied}" in message
    assert "resumes from" in harness.finish(None, tmp_path / "run", *first.options())
    own = harness.weights(second.work_dir)
    if train_llm == "lora":  # the export
        own = {k: v for k, v in own.items() if not k.startswith("tune/llm/")}
    assert harness.differing(own, harness.weights(tmp_path / "run")) == []
    message = harness.refusal(
        None, tmp_path / "run", *first.options(**{"tune.init_projector": copied})
    )
    assert "was trained with settings that differ" in message
    assert "Stage tune is finished" in harness.finish(None, tmp_path / "run", *first.options())


@both
def test_the_second_round_is_exported(train_llm, rounds, tmp_path):
    first, second = rounds(train_llm)
    options = dict(option.split("=") for option in first.options())
    out = export_config(harness.TINY_CONFIG, work_dir=second.work_dir, options=options,
                        out=tmp_path / "hf", dtype="float32")  # fmt: skip
    exported = load_file(out / "model.safetensors")
    after, cfg = second.watched()["after"], Config.fromfile(second.work_dir / "tune/tiny_config.py")
    model = MODELS.build(cfg.model)
    nn.Module.load_state_dict(model, after)
    llm = model.llm.merge_and_unload() if train_llm == "lora" else model.llm
    for name, weight in llm.state_dict().items():
        rows = exported[f"language_model.{name}"][: len(weight)]
        torch.testing.assert_close(rows, weight.float(), atol=1e-6, rtol=0, msg=name)
    linear = exported["multi_modal_projector.linear_1.weight"]
    assert torch.equal(linear, after["projector.model.0.weight"])


def test_a_rehearsal_of_a_second_round(rounds, tiny, tmp_path):
    first, _ = rounds("full")
    env = {"DPA_REHEARSE": "1"}
    output = harness.finish(None, tmp_path / "run", *first.options(), env=env)
    assert "Stage tune (1 of 1)" in output and "captions" not in output.split("Stage tune")[0]
    state = json.loads((tmp_path / "run-rehearsal/tune/stage.json").read_text())
    assert state["status"] == "finished"


def test_a_second_round_with_zero2(rounds, tmp_path):
    first, _ = rounds("full")
    output = harness.finish(None, tmp_path / "run", *first.options(), deepspeed=True)
    assert "Stage tune (1 of 1)" in output and f"begins from given weights: {first.llm}" in output
    again = Round(tmp_path / "run", tmp_path / "run/tune/llm", [])
    harness.finish(None, tmp_path / "next", *again.options(), deepspeed=True)


def test_the_tools_know_a_run_of_one_stage(rounds, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import train

    first, second = rounds("full")
    options = dict(option.split("=") for option in first.options())
    assert [line.split()[0] for line in train.summary(second.work_dir).splitlines()] == [
        "stage", "tune",
    ]  # fmt: skip
    cfg = config_from_file(harness.TINY_CONFIG, options)
    assert list(stage_models(cfg)) == ["tune"]
    axes = sweep.grid(["tune.lr=1e-3,2e-3", "align.lr=1e-3,2e-3"])
    plan = sweep.plan(harness.TINY_CONFIG, axes, options)
    assert [run.name for run in plan] == ["tune.lr=1e-3", "tune.lr=2e-3"]
    assert not any(run.refused for run in plan)
    for run in plan:
        shutil.copytree(second.work_dir, tmp_path / run.name)
        sweep.write_status(tmp_path, run, "finished")
    assert all(row["tune cross_entropy"] > 0 for row in sweep.rows(tmp_path))


def test_the_data_of_tune_alone_is_checked(rounds, capsys):
    options = dict(option.split("=") for option in rounds("full")[0].options())
    assert check_config(harness.TINY_CONFIG, options, None)
    printed = capsys.readouterr().out
    assert "Stage tune" in printed and "Stage align" not in printed
