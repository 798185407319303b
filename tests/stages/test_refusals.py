"""A mistake ends the command with exit code 1 and one message, without a traceback."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop
from support import harness
from support.harness import Layout

from dpa_xtuner.engine.hooks import HandOverHook

pytestmark = pytest.mark.slow

FULL = Layout(dropout=0.0, train_llm="full")


@pytest.fixture
def work_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def copied(reference, work_dir):
    """A work dir with finished stages of a reference run."""

    def copy(*stages: str) -> Path:
        for stage in stages:
            harness.copy_stage(reference(FULL).work_dir, work_dir, stage)
        return work_dir

    return copy


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("proxy", ["promt_template=x"], "did you mean 'prompt_template'"),
        ("proxy", ["align.lrr=1", "tune.lr=-1"], "did you mean 'lr'"),
        ("algn", [], "DPA_STAGE='algn' is not a stage of method='dpa'; did you mean 'align'"),
        ("align", [], "Run DPA_STAGE=proxy first"),
        ("proxy", ["randomness.seed=None"], "give --seed"),
        ("proxy", ["proxy.loss=cmo"], "proxy.loss: not a setting"),
        ("proxy", ["tune.loss=unifrm"], "'unifrm' is not a known weighting scheme; did you mean"),
        ("proxy", ["align.loss.windw=5"], "windw: not a known key; did you mean 'window'"),
        ("proxy", ["prompt_template=internlm2_chatt"], "internlm2_chat"),
        ("proxy", ["train_cfg.max_iters=3"], "set <stage>.max_epochs or <stage>.max_steps instead"),
        ("proxy", ["optim_wrapper.optimizer.lr=1"], "set <stage>.lr instead"),
        ("proxy", ["optim_wrapper.optimizer.beta=1"], "did you mean 'betas'"),
        ("proxy", ["model.use_activation_checkpoint=1"], "'use_activation_checkpointing'"),
        ("proxy", ["model.llm.torch_dtyp=1"], "torch_dtyp"),
        ("proxy", ["default_hooks.checkpoint.max_keep_ckpts=1"], "at least 2"),
        ("", ["instructions.data_path=nowhere.json"], "which stage tune reads"),
        ("proxy", ["proxy.batch_size=3"], "not a multiple of proxy.batch_size=3 x 1"),
        ("proxy", ["captions.data_path=nowhere.json"], "nowhere.json"),
        ("proxy", ["runner_type=Foo"], "runner_type='Foo' is not a known runner"),
        ("proxy", ["llm_name_or_path=nowhere"], "--cfg-options llm_name_or_path=FOLDER"),
        ("proxy", ["_scope_=foo"], "_scope_: expected 'dpa_xtuner'"),
        ("proxy", ["proxy.lr.x=1"], "--cfg-options don't fit"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value[:12],
)
def test_a_wrong_setting_is_told_in_one_message(stage, options, message, tiny, work_dir):
    assert message in harness.refusal(stage, work_dir, *options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper=3", "optim_wrapper: expected a dict (got 3)"),
        ("train_dataloader=x", "train_dataloader: expected a dict (got 'x')"),
        ("optim_wrapper.clip_grad=3", "optim_wrapper.clip_grad: expected a dict (got 3)"),
    ],
)
def test_what_xtuners_script_fails_on_with_deepspeed_is_told(option, message, tiny, work_dir):
    assert message in harness.refusal("proxy", work_dir, option, deepspeed=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "custom_imports: Failed to import my_module: No module named 'my_module'"),
        ("import torch.no_such", "my_module: No module named 'torch.no_such'"),
        ("from torch import no_such", "my_module: cannot import name 'no_such' from 'torch'"),
    ],
)
def test_a_module_that_can_not_be_imported_is_named(body, message, tiny, work_dir, tmp_path):
    if body:
        (tmp_path / "my_module.py").write_text(body)
    config = tmp_path / "with_imports.py"
    config.write_text(
        f"_base_ = [{str(harness.TINY_CONFIG)!r}]\n"
        "custom_imports = dict(imports=['dpa_xtuner.plugin', 'my_module'])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert message in harness.refusal("proxy", work_dir, config=config)


def test_a_stage_does_not_start_from_an_unfinished_one(copied):
    folder = copied("proxy")
    state = json.loads((folder / "proxy/stage.json").read_text())
    (folder / "proxy/stage.json").write_text(json.dumps(state | {"status": "running"}))
    assert "DPA_STAGE=proxy" in harness.refusal("align", folder)


def test_a_missing_image_is_named_and_stops_the_run(copied, tiny, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in (tiny / "images").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    trained_on = harness.held_out_split(tiny)[1]
    (images / f"{trained_on[0]}.png").write_bytes(b"")
    (images / f"{trained_on[1]}.png").unlink()
    folder = copied("proxy")
    message = harness.refusal("align", folder, f"captions.image_folder={images}")
    assert "2 of 29 samples drawn" in message
    assert f"broken image: {trained_on[0]}" in message
    assert f"missing image: {trained_on[1]}" in message
    assert not (folder / "align/projector").exists()


def test_a_finished_stage_with_other_settings_is_refused_with_the_differences(copied):
    folder = copied("proxy", "align")
    decay = "optim_wrapper.paramwise_cfg.norm_decay_mult=0.0"
    message = harness.refusal(None, folder, "proxy.lr=5e-3", "proxy.lora.r=2", decay)
    assert f"{folder / 'proxy'} was trained with settings that differ" in message
    assert "settings.lr: was 0.01, is 0.005" in message
    assert "settings.lora.r: was 4, is 2" in message
    assert "paramwise_cfg: was None, is {'norm_decay_mult': 0.0}" in message


def test_a_started_stage_with_other_settings_is_refused_with_the_differences(copied):
    folder = copied("proxy")
    state = json.loads((folder / "proxy/stage.json").read_text())
    (folder / "proxy/stage.json").write_text(json.dumps(state | {"status": "running"}))
    assert "settings.lr: was 0.01, is 0.005" in harness.refusal("proxy", folder, "proxy.lr=5e-3")


def test_a_retrained_proxy_makes_a_finished_align_stale(copied):
    folder = copied("proxy", "align")
    (adapter,) = (folder / "proxy/llm_adapter").glob("*.safetensors")
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    assert "loads.llm_adapter/adapter_model.safetensors: was" in harness.refusal("align", folder)


def test_a_finished_stage_is_left_alone(copied):
    folder = copied("proxy")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    output = harness.finish("proxy", folder, "proxy.batch_size=1", "proxy.save_steps=5")
    assert "Stage proxy is finished" in output
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_resuming_from_another_stages_checkpoint_is_refused(copied):
    folder = copied("proxy")
    checkpoint = folder / "proxy/iter_12.pth"
    message = harness.refusal("align", folder, arguments=("--resume", str(checkpoint)))
    assert f"{checkpoint} is not a checkpoint of stage align" in message


def test_resuming_with_another_number_of_processes_is_refused(copied):
    folder = copied("proxy")
    state = json.loads((folder / "proxy/stage.json").read_text())
    (folder / "proxy/stage.json").write_text(json.dumps(state | {"status": "running"}))
    message = harness.refusal("proxy", folder, ranks=2)
    assert "'processes': 1" in message and "'processes': 2" in message


def test_resuming_with_a_mended_image_that_changes_the_samples_is_refused(tiny, tmp_path):
    images = shutil.copytree(tiny / "images", tmp_path / "images")
    image = images / f"{harness.held_out_split(tiny)[1][0]}.png"
    whole = image.read_bytes()
    options = ["method=cmo", "max_tiles=4", f"captions.image_folder={images}"]
    options += ["captions.skip_limit=0.5"]
    image.write_bytes(b"")  # with tiles its size is needed, so its record makes no sample
    harness.finish("align", tmp_path / "run", *options)
    file = tmp_path / "run/align/stage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))

    image.write_bytes(whole)
    message = harness.refusal("align", tmp_path / "run", *options)
    assert "they now give other samples" in message and "iter_12.pth" in message
    image.write_bytes(b"")
    env = {"DPA_CACHE": str(tmp_path / "cache")}
    assert "resumes from" in harness.finish("align", tmp_path / "run", *options, env=env)


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_parts_of_another_model_are_refused_naming_both(stage, copied, tiny, tmp_path):
    folder = copied("proxy") if stage == "align" else copied("proxy", "align")
    side = {"align": "llm", "tune": "visual_encoder"}[stage]
    other = tmp_path / "other"
    harness.copy_with_one_weight_changed(tiny / side, other)
    message = harness.refusal(stage, folder, f"{side}_name_or_path={other}")
    assert f"belongs to another {side}" in message
    assert str(tiny / side) in message and str(other) in message and "fingerprint" in message
    assert not list((folder / stage).glob("iter_*"))


def test_parts_of_another_architecture_are_refused_before_anything_is_built(copied, tiny, tmp_path):
    folder, other = copied("proxy"), tmp_path / "other"
    harness.copy_with_one_weight_changed(tiny / "llm", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    message = harness.refusal("align", folder, f"llm_name_or_path={other}")
    assert '"hidden_size": 64' in message and '"hidden_size": 32' in message
    assert not (folder / "align").exists()


def test_a_work_dir_that_cannot_be_written_is_told(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in harness.refusal("proxy", tmp_path / "file/run", log_folder=tmp_path / "logs")


def test_a_cache_that_cannot_be_written_is_told(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    message = harness.refusal(
        "proxy", tmp_path / "run", env={"DPA_CACHE": str(tmp_path / "file/cache")}
    )
    assert "set DPA_CACHE" in message


def limit_file_size() -> None:
    """Let the system refuse larger files, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def before(owner: type, method: str):
    """For `prepare`: the limit holds from the first call of this method on."""

    def prepare() -> None:
        stock = getattr(owner, method)

        def limited(self, *args, **kwargs):
            limit_file_size()
            return stock(self, *args, **kwargs)

        setattr(owner, method, limited)

    return prepare


def refused_for_lack_of_room(stage: str, work_dir: Path, prepare, deepspeed: bool) -> set[str]:
    """The names of the checkpoints that are there afterwards."""
    message = harness.refusal(stage, work_dir, prepare=prepare, deepspeed=deepspeed)
    assert str(work_dir) in message or "File too large" in message
    assert not (work_dir / stage / "llm").exists()
    assert not (work_dir / stage / "llm_adapter").exists()
    state = json.loads((work_dir / stage / "stage.json").read_text())
    assert state["status"] == "failed" and state["reason"].split(": ")[-1] in message
    return {path.name for path in (work_dir / stage).glob("iter_*")}


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_a_disk_too_full_for_a_checkpoint_is_told(deepspeed, reference, work_dir):
    whole = reference(Layout(deepspeed=deepspeed, dropout=0.0, train_llm="full"))
    full = before(IterBasedTrainLoop, "run_iter")
    assert refused_for_lack_of_room("proxy", work_dir, full, deepspeed) == set()
    harness.finish("proxy", work_dir, deepspeed=deepspeed)
    own = {k: v for k, v in harness.weights(whole.work_dir).items() if k.startswith("proxy")}
    assert harness.differing(own, harness.weights(work_dir)) == []


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_a_disk_too_full_for_the_written_llm_is_told(deepspeed, reference, work_dir):
    whole = reference(Layout(deepspeed=deepspeed, dropout=0.0, train_llm="full"))
    for stage in ("proxy", "align"):
        harness.copy_stage(whole.work_dir, work_dir, stage)
    full = before(HandOverHook, "after_train")
    kept = refused_for_lack_of_room("tune", work_dir, full, deepspeed)
    assert kept == {"iter_8.pth", "iter_12.pth"}
    harness.finish("tune", work_dir, deepspeed=deepspeed)
    assert harness.differing(harness.weights(whole.work_dir), harness.weights(work_dir)) == []


def test_a_folder_that_another_run_trains_in_is_left_alone(tiny, work_dir):
    (work_dir / "proxy").mkdir(parents=True)
    with FileLock(work_dir / "proxy" / ".lock"):
        assert "Another run is training in" in harness.refusal("proxy", work_dir)


def test_data_without_images_stop_the_start(tiny, work_dir, copied):
    copied("proxy")
    empty = work_dir / "images"
    empty.mkdir()
    message = harness.refusal("align", work_dir, f"captions.image_folder={empty}")
    assert "29 of 29 samples" in message and "tools/check_data.py" in message


def test_held_out_captions_without_images_stop_the_start(tiny, work_dir, copied):
    copied("proxy")
    images = shutil.copytree(tiny / "images", work_dir / "images")
    held_out, _ = harness.held_out_split(tiny)
    for name in held_out[1:]:
        (images / f"{name}.png").unlink()
    options = [f"captions.image_folder={images}", "captions.skip_limit=0.5", "align.max_steps=1"]
    told = f"{len(held_out) - 1} of {len(held_out)} captions that "
    assert told in harness.finish("align", work_dir, *options)
    shutil.rmtree(work_dir / "align")
    (images / f"{held_out[0]}.png").unlink()
    message = harness.refusal("align", work_dir, *options)
    assert "so nothing could be measured on them" in message


def test_unusable_instructions_are_found_before_the_first_stage_starts(tiny, work_dir, tmp_path):
    file = tmp_path / "instructions.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": 3} for i in range(20)]))
    message = harness.refusal(None, work_dir, f"instructions.data_path={file}")
    assert f"20 of 20 records of {file}" in message
    assert not (work_dir / "proxy").exists()


def test_instructions_without_images_are_found_before_the_first_stage_starts(tiny, work_dir):
    empty = work_dir.parent / "images"
    empty.mkdir()
    message = harness.refusal(None, work_dir, f"instructions.image_folder={empty}")
    assert "have no usable image" in message
    assert not (work_dir / "proxy/stage.json").exists()


def test_the_arguments_of_later_stages_are_held_against_their_parts(tiny, work_dir):
    assert "'torch_dtype'" in harness.refusal(None, work_dir, "model.visual_encoder.torch_dtyp=x")
    assert not (work_dir / "proxy").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper.clip_grad.norm_type=1.0", "leave out norm_type=1.0"),
        ("optim_wrapper.clip_grad.error_if_nonfinite=True", "error_if_nonfinite=True"),
        ("optim_wrapper.paramwise_cfg.bias_lr_mul=1", "did you mean 'bias_lr_mult'"),
        ("optim_wrapper.initial_scale=1", "optim_wrapper.initial_scale: not a known key"),
        ("optim_wrapper.constructor=Foo", "optim_wrapper.constructor: not a known"),
        ("strategy.fp17.enabled=True", "did you mean 'fp16'"),
        ("optim_wrapper.optimizer.type=FusedAdm", "optimizer.type: 'FusedAdm' is not a known"),
    ],
)
def test_what_deepspeed_would_drop_is_told(option, message, tiny, work_dir):
    assert message in harness.refusal("proxy", work_dir, option, deepspeed=True)


def test_gradients_are_not_clipped_where_the_config_says_so(tiny, work_dir):
    harness.finish("proxy", work_dir, "optim_wrapper.clip_grad=None", deepspeed=True)
    (dumped,) = work_dir.glob("proxy/*/vis_data/config.py")
    strategy = Config.fromfile(dumped, import_custom_modules=False).strategy
    assert strategy.gradient_clipping == 0.0  # DeepSpeed's "not at all"
