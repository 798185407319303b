"""What a method's name changes: its stages, its losses, where align starts, what is measured."""

import json

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file
from support import harness
from support.harness import Layout
from transformers import LlamaForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.settings import Settings, read_settings
from dpa_xtuner.stages.table import stage_table

pytestmark = pytest.mark.slow

# Written out: has a proxy stage, scheme of align and tune.
METHODS = {
    "vanilla": (False, "uniform"),
    "pmo": (True, "uniform"),
    "cmo": (False, "cmo"),
    "dpa": (True, "cmo"),
    "cal": (False, "cal"),
}


def settings(**changes) -> Settings:
    cfg = Config.fromfile(harness.TINY_CONFIG)
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return read_settings(cfg)


def state(work_dir, stage: str) -> dict:
    return json.loads((work_dir / stage / "stage.json").read_text())


def llm_before(file) -> dict[str, torch.Tensor]:
    watched = torch.load(file)["before"]
    return {k.removeprefix("llm."): v for k, v in watched.items() if k.startswith("llm.")}


@pytest.mark.parametrize(("method", "expected"), METHODS.items(), ids=METHODS)
def test_a_name_decides_the_stages_and_the_losses(method, expected):
    proxy, scheme = expected
    found = settings(method=method)
    assert list(stage_table(found)) == (["proxy"] if proxy else []) + ["align", "tune"]
    assert found.align.loss == found.tune.loss == {"type": scheme}
    loads = {"llm_adapter": "proxy/llm_adapter"} if proxy else {}
    assert stage_table(found)["align"].loads == loads


@pytest.mark.parametrize(
    ("changes", "align", "tune"),
    [
        ({"align__loss": "uniform"}, {"type": "uniform"}, {"type": "cmo"}),
        ({"align__loss__type": "cal"}, {"type": "cal"}, {"type": "cmo"}),
        ({"tune__loss__d_min": 0.0}, {"type": "cmo"}, {"type": "cmo", "d_min": 0.0}),
        ({"method": "vanilla", "tune__loss": "cmo"}, {"type": "uniform"}, {"type": "cmo"}),
        ({"method": "cal", "align__loss": None}, {"type": "cal"}, {"type": "cal"}),
    ],
)
def test_a_stage_can_have_a_loss_of_its_own(changes, align, tune):
    found = settings(**changes)
    assert (found.align.loss, found.tune.loss) == (align, tune)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dap"}, r"method: 'dap' is not .*; did you mean 'dpa'.*Known: vanilla, pmo, c"),
        ({"method": "pmo", "proxy": None}, "method='pmo' needs its stage proxy, but proxy=None"),
        (
            {"method": "cmo", "tune__start_from": "proxy"},
            "method='cmo' does not have: set it to 'target', or choose one of pmo, dpa",
        ),
        ({"method": "cal", "proxy__lr": 1.0}, "proxy.lr: method='cal' has no stage proxy"),
        (
            {"proxy__train_llm": "full", "proxy__lora__r": 2},
            "proxy.lora.r: proxy.train_llm='full' trains no LoRA",
        ),
        ({"tune__lora__r": 2}, "tune.lora.r: tune.train_llm='full' trains no LoRA"),
        ({"proxy__lora__r": 0}, r"proxy.lora.r: Input should be greater than 0 \(got 0\)"),
        ({"encoder": {"type": "pair"}}, "encoder: The encoder 'pair' .* first: it is missing; sec"),
        ({"proxy__train_llm": "all"}, r"proxy.train_llm: .*'full' or 'lora' \(got 'all'\)"),
        ({"captions__share": 0.0}, "captions.share: Input should be greater than 0"),
        (
            {"captions__data_path": ["a", "b"], "captions__weights": [1.0]},
            "weights has 1 values and data_path 2",
        ),
        (
            {"captions__data_path": ["a"], "captions__weights": [0.0]},
            "captions.weights.*: Input should be greater than 0",
        ),
        ({"instructions__image_folder": ["a", "b"]}, "names 1 files and image_folder 2 folders"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(DPAError, match=message):
        settings(**changes)


def test_a_config_may_set_what_its_method_leaves_out():
    assert settings(method="vanilla").proxy.lr == 1e-2  # as tiny_config.py has it


@pytest.fixture(scope="module", params=["vanilla", "cal"])
def without_proxy(request, tiny, tmp_path_factory):
    """A pipeline without a proxy stage, run by stages: method and work dir."""
    work_dir = tmp_path_factory.mktemp(request.param) / "run"
    option = f"method={request.param}"
    watch = harness.watch(work_dir / "watched-align.pt")
    output = harness.finish("align", work_dir, option, prepare=watch)
    output += harness.finish("tune", work_dir, option)
    return request.param, work_dir, output


def test_align_starts_from_the_original_llm_without_a_proxy(without_proxy, tiny):
    _, work_dir, output = without_proxy
    published = LlamaForCausalLM.from_pretrained(tiny / "llm", torch_dtype=torch.bfloat16)
    start = llm_before(work_dir / "watched-align.pt")
    assert harness.differing(start, published.state_dict()) == []
    assert not (work_dir / "proxy").exists()
    assert "Stage align (1 of 2)" in output and "Stage tune (2 of 2)" in output


def test_without_a_proxy_align_is_measured_without_a_floor(without_proxy):
    method, work_dir, output = without_proxy
    measured = state(work_dir, "align")["measured"].keys()
    assert {"align", "leakage"} < measured and not {"floor", "original"} & measured
    assert "floor" not in output
    for stage in ("align", "tune"):
        assert state(work_dir, stage)["origin"]["settings"]["loss"]["type"] == METHODS[method][1]


def test_a_method_has_no_other_stages_than_its_own(tiny, tmp_path):
    code, output = harness.run("proxy", tmp_path / "run", "method=vanilla")
    assert code == 1 and "Traceback" not in output
    assert "DPA_STAGE='proxy' is not a stage of method='vanilla'. Stages: align, tune." in output


def test_another_method_does_not_go_on_from_a_finished_align(reference, tmp_path):
    work_dir = tmp_path / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(reference(Layout()).work_dir, work_dir, stage)
    code, output = harness.run(None, work_dir, "method=pmo")
    assert code == 1 and "Stage proxy is finished" in output  # pmo has the same one
    assert "settings.loss.type: was cmo, is uniform" in output


FULL_PROXY = ("proxy.train_llm=full", "tune.start_from=proxy")


@pytest.fixture(scope="module")
def full_proxy(tiny, tmp_path_factory):
    """A pipeline whose proxy is trained in full, and whose tune starts from it."""
    work_dir = tmp_path_factory.mktemp("full_proxy") / "run"
    for stage in harness.STAGES:
        watch = harness.watch(work_dir / f"watched-{stage}.pt")
        harness.finish(stage, work_dir, *FULL_PROXY, prepare=watch)
    return work_dir


def test_a_proxy_in_full_trains_and_writes_the_whole_llm(full_proxy, tiny):
    watched = torch.load(full_proxy / "watched-proxy.pt")
    names = set(LlamaForCausalLM.from_pretrained(tiny / "llm").state_dict())
    assert watched["trainable"] == {f"llm.{name}" for name in names}
    assert set(harness.differing(watched["before"], watched["after"])) == watched["trainable"]
    written = load_file(full_proxy / "proxy/llm/model.safetensors")
    after = {k.removeprefix("llm."): v for k, v in watched["after"].items()}
    assert harness.differing(written, after) == []


@pytest.mark.parametrize(("stage", "dtype"), [("align", torch.bfloat16), ("tune", torch.float32)])
def test_align_and_tune_start_from_the_full_proxy(stage, dtype, full_proxy):
    proxy = LlamaForCausalLM.from_pretrained(full_proxy / "proxy/llm", torch_dtype=dtype)
    start = llm_before(full_proxy / f"watched-{stage}.pt")
    assert harness.differing(start, proxy.state_dict()) == []


def test_the_records_of_a_full_proxy_name_the_original_llm(full_proxy, tiny, reference):
    original = state(reference(Layout()).work_dir, "align")["origin"]["llm"]
    for stage in harness.STAGES:
        origin = state(full_proxy, stage)["origin"]
        assert origin["llm"] == original and original["name"] == str(tiny / "llm")
    assert set(state(full_proxy, "align")["origin"]["loads"]) == {"llm/model.safetensors"}
    assert {"original", "floor", "align", "leakage"} < set(state(full_proxy, "align")["measured"])


def test_tune_can_start_from_the_original_llm_after_a_full_proxy(full_proxy, tiny, tmp_path):
    work_dir = tmp_path / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(full_proxy, work_dir, stage)
    watch = harness.watch(work_dir / "watched-tune.pt")
    harness.finish("tune", work_dir, "proxy.train_llm=full", prepare=watch)
    published = LlamaForCausalLM.from_pretrained(tiny / "llm", torch_dtype=torch.float32)
    assert harness.differing(llm_before(work_dir / "watched-tune.pt"), published.state_dict()) == []


def test_a_full_proxy_that_is_killed_ends_with_the_same_bits(full_proxy, tmp_path):
    work_dir = tmp_path / "killed"
    prepare = harness.die_at_change(work_dir, 28)
    code, output = harness.run("proxy", work_dir, *FULL_PROXY, prepare=prepare)
    assert code == -9, output[-3000:]
    assert "resumes from" in harness.finish("proxy", work_dir, *FULL_PROXY)
    whole = {k: v for k, v in harness.weights(full_proxy).items() if k.startswith("proxy/")}
    assert harness.differing(whole, harness.weights(work_dir)) == []


def test_a_full_proxy_under_deepspeed(tiny, tmp_path):
    work_dir = tmp_path / "run"
    harness.finish("proxy", work_dir, *FULL_PROXY, deepspeed=True)
    watch = harness.watch(work_dir / "watched-align.pt")
    harness.finish("align", work_dir, *FULL_PROXY, deepspeed=True, prepare=watch)
    written = load_file(work_dir / "proxy/llm/model.safetensors")
    original = load_file(tiny / "llm/model.safetensors")
    assert set(harness.differing(original, written)) == set(written)
    assert harness.differing(llm_before(work_dir / "watched-align.pt"), written) == []


def test_a_retrained_full_proxy_makes_a_finished_align_stale(full_proxy, tmp_path):
    work_dir = tmp_path / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(full_proxy, work_dir, stage)
    file = work_dir / "proxy/llm/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, output = harness.run("align", work_dir, *FULL_PROXY)
    assert code == 1 and "loads.llm/model.safetensors: was" in output


def test_the_contrast_cache_is_read_without_a_proxy(tiny, tmp_path):
    options = ("method=cmo", f"align.contrast_cache={tmp_path / 'p_wo'}")
    first = harness.finish("align", tmp_path / "one", *options)
    second = harness.finish("align", tmp_path / "two", *options)
    assert "Computing what the LLM says" in first and "Computing" not in second
    one, two = harness.weights(tmp_path / "one"), harness.weights(tmp_path / "two")
    assert harness.differing(one, two) == []
