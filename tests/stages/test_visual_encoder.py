"""tune.train_visual_encoder: the encoder is trained, written, resumed, exported and tuned on."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file
from support import harness
from support.harness import Layout
from transformers import CLIPImageProcessor, CLIPVisionModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config
from dpa_xtuner.stages.settings import config_from_file, read_settings

pytestmark = pytest.mark.slow

ON = ["tune.train_visual_encoder=True", "tune.visual_encoder_lr=1e-3"]
OPTIONS = {"tune.train_visual_encoder": True, "tune.visual_encoder_lr": 1e-3}
# What follows the second-last layer, whose output are the features, gets no gradient.
# Since transformers 5 its names lack the first word in memory, and keep it in files.
UNREAD = re.compile(r"(vision_model\.)?(encoder\.layers\.2|post_layernorm)\.")


@dataclass
class Trained:
    """A finished run whose stage tune trained the encoder: what was seen of it."""

    work_dir: Path
    output: str
    seen: dict
    deepspeed: bool

    @property
    def encoder(self) -> Path:
        return self.work_dir / "tune/visual_encoder"

    def of_encoder(self, when: str) -> dict[str, torch.Tensor]:
        return encoder_of(self.seen[when])


def encoder_of(watched: dict) -> dict[str, torch.Tensor]:
    prefix = "visual_encoder."
    return {k.removeprefix(prefix): v for k, v in watched.items() if k.startswith(prefix)}


def is_read(name: str) -> bool:
    return not UNREAD.match(name)


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):
    """Gives a run with the encoder trained, plain or with ZeRO-2."""
    made = {}

    def make(deepspeed: bool = False) -> Trained:
        if deepspeed not in made:
            layout = Layout(deepspeed=deepspeed, dropout=0.0, train_llm="full")
            work_dir = tmp_path_factory.mktemp("encoder") / "run"
            for stage in ("proxy", "align"):
                harness.copy_stage(reference(layout).work_dir, work_dir, stage)
            file = work_dir / "watched-tune.pt"
            output = harness.finish(
                "tune", work_dir, *ON, prepare=harness.watch(file), deepspeed=deepspeed
            )
            made[deepspeed] = Trained(work_dir, output, torch.load(file), deepspeed)
        return made[deepspeed]

    return make


both = pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])


@both
def test_what_the_features_are_made_of_is_trained(deepspeed, trained, tiny):
    run = trained(deepspeed)
    before, after = run.of_encoder("before"), run.of_encoder("after")
    dtype = torch.bfloat16 if deepspeed else torch.float32
    published = CLIPVisionModel.from_pretrained(tiny / "visual_encoder", torch_dtype=dtype)
    assert harness.differing(before, published.state_dict()) == []
    learns = set(encoder_of(dict.fromkeys(run.seen["trainable"])))
    assert learns == set(filter(is_read, before)) and len(learns) < len(before)
    # A key's bias adds the same to all of a query's scores, so nothing depends on it.
    idle = {name for name in learns if name.endswith("k_proj.bias")}
    if deepspeed:  # bfloat16 rounds a small change of a weight of 1 away
        idle |= {name for name in learns if "norm" in name and name.endswith("weight")}
    changed = set(harness.differing(before, after))
    assert learns - idle <= changed <= learns
    modules = {name.split(".")[0] for name in run.seen["trainable"]}
    assert modules == {"llm", "visual_encoder", "projector"}


@both
def test_the_trained_encoder_is_a_folder_that_transformers_opens(deepspeed, trained, tiny):
    run = trained(deepspeed)
    loaded, info = CLIPVisionModel.from_pretrained(
        run.encoder, torch_dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert harness.differing(run.of_encoder("after"), loaded.state_dict()) == []
    own, published = (
        CLIPImageProcessor.from_pretrained(folder)
        for folder in (run.encoder, tiny / "visual_encoder")
    )
    assert own.to_dict() == published.to_dict()


@both
def test_it_is_counted_in_the_log_and_in_the_records(deepspeed, trained):
    run = trained(deepspeed)
    rows = {line.split()[0]: line.split() for line in run.output.splitlines() if line[:2] == "  "}
    sizes = {True: 0, False: 0}
    for name, tensor in run.of_encoder("after").items():
        sizes[is_read(name)] += tensor.numel()
    assert rows["visual_encoder"][1:3] == [f"{sizes[True]:,}", f"{sizes[False]:,}"]
    assert rows["visual_encoder"][-1] == str(run.encoder)
    state = json.loads((run.work_dir / "tune/stage.json").read_text())
    assert state["writes"]["visual_encoder"] == str(run.encoder)
    assert state["origin"]["settings"]["visual_encoder_lr"] == 1e-3
    record = json.loads((run.encoder / "dpa.json").read_text())
    assert record["component"] == "visual_encoder" and record["step"] == 6
    assert record["trained_visual_encoder"] != record["visual_encoder"]["fingerprint"]
    assert set(record["shapes"]) == set(run.of_encoder("after"))


def test_with_the_setting_off_records_say_nothing_of_it(reference):
    layout = Layout(dropout=0.0, train_llm="full")
    state = json.loads((reference(layout).work_dir / "tune/stage.json").read_text())
    assert not [key for key in state["origin"]["settings"] if "visual_encoder" in key]
    assert sorted(state["writes"]) == ["llm", "projector"]


def note_rates(file: Path):
    """For `prepare`: write down the rates of the optimizer's groups at the start."""

    def prepare() -> None:
        before = harness.HandOverHook.before_train

        def before_train(self, runner):
            before(self, runner)
            groups = runner.optim_wrapper.optimizer.param_groups
            rates = Counter(group["initial_lr"] for group in groups)
            file.write_text(json.dumps({"rates": sorted(rates), "iter": runner.iter}))

        harness.HandOverHook.before_train = before_train

    return prepare


@both
def test_a_resumed_run_ends_as_one_that_was_not_stopped(deepspeed, trained, tmp_path):
    run = trained(deepspeed)
    work_dir, tune = tmp_path / "run", tmp_path / "run/tune"
    shutil.copytree(run.work_dir, work_dir)
    state = json.loads((tune / "stage.json").read_text())
    (tune / "stage.json").write_text(json.dumps(state | {"status": "running"}))
    for name in ("llm", "visual_encoder", "projector"):
        shutil.rmtree(tune / name)
    last = max(tune.glob("iter_*"), key=lambda path: int(path.stem.split("_")[1]))
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    message = harness.refusal("tune", work_dir, ON[0], deepspeed=deepspeed)
    assert "visual_encoder_lr: was 0.001, is None" in message
    notes = tmp_path / "rates.json"
    harness.finish("tune", work_dir, *ON, deepspeed=deepspeed, prepare=note_rates(notes))
    assert json.loads(notes.read_text()) == {"rates": [1e-3, 1e-2], "iter": 8}
    assert harness.differing(harness.weights(run.work_dir), harness.weights(work_dir)) == []


@both
@pytest.mark.parametrize("fmt", ["hf", "parts", "xtuner"])
def test_every_format_carries_the_trained_encoder(fmt, deepspeed, trained, tmp_path):
    run = trained(deepspeed)
    prefix, folder = ("vision_tower.", ".") if fmt == "hf" else ("", "visual_encoder")
    how = {"fmt": fmt, "work_dir": run.work_dir, "options": OPTIONS, "dtype": "float32"}
    checkpoint = max(run.work_dir.glob("tune/iter_*"), key=lambda p: int(p.stem.split("_")[1]))
    for name, given in (("finished", None), ("checkpoint", checkpoint)):
        out = export_config(harness.TINY_CONFIG, **how, out=tmp_path / name, checkpoint=given)
        (file,) = (out / folder).glob("*.safetensors")
        found = load_file(file)
        for key, weight in run.of_encoder("after").items():
            exported = found.get(prefix + key, found.get(f"{prefix}vision_model.{key}"))
            if given and deepspeed:  # it holds float32 copies
                exported = exported.bfloat16().float()
            assert torch.equal(exported, weight.float()), (name, key)
        if fmt != "hf":
            CLIPImageProcessor.from_pretrained(out / folder)
    if fmt == "xtuner":
        command = json.loads((out / "dpa.json").read_text())["command"]
        assert "--visual-encoder" not in command


def test_an_export_without_the_setting_is_refused(trained, tmp_path):
    with pytest.raises(DPAError, match=r"settings\.train_visual_encoder: was True"):
        export_config(harness.TINY_CONFIG, work_dir=trained().work_dir, out=tmp_path / "hf")


def further(run: Trained, *more: str, **changed) -> list[str]:
    """The options of a second round."""
    given = {
        "llm_name_or_path": run.work_dir / "tune/llm",
        "visual_encoder_name_or_path": run.encoder,
        "tune.init_projector": run.work_dir / "tune/projector",
    }
    return [f"{key}={value}" for key, value in (given | changed).items()] + list(more)


@pytest.mark.parametrize("more", [[], ON], ids=["frozen again", "trained on"])
def test_a_second_round_begins_with_the_encoder_that_was_trained(more, trained, tmp_path):
    run, file = trained(), tmp_path / "watched.pt"
    options = further(run, *more)
    harness.finish(None, tmp_path / "run", *options, prepare=harness.watch(file))
    seen = torch.load(file)
    begun, ended = encoder_of(seen["before"]), run.of_encoder("after")
    dtype = torch.float32 if more else torch.bfloat16  # frozen weights are of the run's type
    assert harness.differing(begun, {k: v.to(dtype) for k, v in ended.items()}) == []
    moved = harness.differing(begun, encoder_of(seen["after"]))
    assert bool(moved) == bool(more)
    if more:  # and a third begins with that of the second
        again = Trained(tmp_path / "run", "", seen, False)
        harness.finish(None, tmp_path / "next", *further(again))


def test_a_second_round_with_another_encoder_is_refused(trained, tiny, tmp_path):
    run = trained()
    for encoder in (tiny / "visual_encoder", trained(True).encoder):
        options = further(run, visual_encoder_name_or_path=encoder)
        message = harness.refusal(None, tmp_path / "run", *options)
        assert f"{run.work_dir}/tune/projector belongs to another visual_encoder" in message
        assert f"it was trained with {run.encoder}" in message and str(encoder) in message
        shutil.rmtree(tmp_path / "run")


def test_a_rate_without_training_is_refused():
    cfg = config_from_file(harness.TINY_CONFIG, {"tune.visual_encoder_lr": 1e-5})
    with pytest.raises(DPAError, match="train_visual_encoder=False trains no visual encoder"):
        read_settings(cfg)
    cfg.tune.train_visual_encoder = True
    read_settings(cfg)


def test_two_ranks_train_one_encoder(reference, tmp_path):
    """DistributedDataParallel stops at parameters without a gradient."""
    layout = Layout(ranks=2, dropout=0.0, train_llm="full")
    work_dir = tmp_path / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(reference(Layout(dropout=0.0)).work_dir, work_dir, stage)
    harness.finish("tune", work_dir, *ON, **layout.how())
    written = load_file(work_dir / "tune/visual_encoder/model.safetensors")
    assert written and all(weight.isfinite().all() for weight in written.values())
    (dumped,) = (work_dir / "tune").glob("*/vis_data/config.py")
    assert Config.fromfile(dumped).model.freeze_visual_encoder is False
