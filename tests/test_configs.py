"""Every config loads, can be used, and goes through its three stages in a rehearsal."""

import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, VISBACKENDS, VISUALIZERS
from mmengine.utils import get_object_from_string
from safetensors.torch import load_file
from xtuner.utils import PROMPT_TEMPLATE

from dpa_xtuner.loss import CMO, build_scheme
from dpa_xtuner.stages import Settings
from dpa_xtuner.stages.models import complete

CONFIGS = Path(__file__).parents[1] / "configs"
FOUND = sorted(p.stem for p in CONFIGS.rglob("*.py") if "_base_" not in p.parts)
HOW_MANY = 20
NO_MODEL_NO_DATA = {"DPA_REHEARSE": "1", "HF_HUB_OFFLINE": "1", "DPA_DATA": "nowhere"}
WRITTEN = ["align/projector", "proxy/llm_adapter", "tune/llm", "tune/projector"]


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def test_all_configs_are_found():
    assert len(FOUND) == HOW_MANY
    assert "dpa_internlm2_7b" in FOUND


@pytest.mark.parametrize("name", FOUND)
def test_settings_are_valid_and_names_known(name):
    cfg = load(name)
    settings = Settings.from_config(cfg)
    assert settings.prompt_template in PROMPT_TEMPLATE
    for stage in (settings.align, settings.tune):
        assert build_scheme(stage.loss) == CMO(d_min=0.05, d_max=0.5, window=3, boundary="sample")


@pytest.mark.parametrize("name", FOUND)
def test_every_type_is_that_of_something(name):
    cfg = load(name)
    cfg = complete(cfg, Settings.from_config(cfg))
    types = [cfg.tokenizer.type, cfg.image_processor.type, cfg.model.llm.type]
    types.append(cfg.model.visual_encoder.type)
    for path in types:
        assert get_object_from_string(path).__name__ == "from_pretrained", path
    for hook in cfg.default_hooks.values():
        assert HOOKS.get(hook.type), hook.type
    assert OPTIM_WRAPPERS.get(cfg.optim_wrapper.type)
    assert VISUALIZERS.get(cfg.visualizer.type)
    for backend in cfg.visualizer.vis_backends:
        assert VISBACKENDS.get(backend.type)


@pytest.mark.parametrize("name", [name for name in FOUND if name.endswith("b")])
def test_the_papers_numbers_hold_for_the_papers_sizes(name):
    settings = Settings.from_config(load(name))
    assert (settings.proxy.lr, settings.align.lr, settings.tune.lr) == (4e-5, 2e-3, 4e-5)
    assert (settings.proxy.lora.r, settings.proxy.lora.lora_alpha) == (256, 512)
    for stage in (settings.proxy, settings.align, settings.tune):
        assert (stage.global_batch_size, stage.max_epochs, stage.warmup_ratio) == (256, 1, 0.03)


def rehearse(command: list[str], work_dir: Path, **env: str) -> str:
    environment = {**os.environ, **NO_MODEL_NO_DATA, **env}
    done = subprocess.run(
        [*command, "--work-dir", str(work_dir)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def check(work_dir: Path, output: str, tuned: str = "llm") -> None:
    wanted = [place.replace("tune/llm", f"tune/{tuned}") for place in WRITTEN]
    written = Path(f"{work_dir}-rehearsal")
    assert (
        sorted(f.parent.relative_to(written).as_posix() for f in written.glob("*/*/dpa.json"))
        == wanted
    )
    for file in written.glob("*/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert output.count("Stage tune (3 of 3)") == 1
    assert all(place in output.rsplit("Finished:", 1)[1] for place in wanted)
    assert not work_dir.exists()


@pytest.mark.parametrize("name", ["dpa_llama3_1_8b", "dpa_qwen2_5_7b"])
def test_rehearsal_of_one_stage_after_the_other(name, tmp_path):
    work_dir = tmp_path / name
    base = f"{work_dir}-rehearsal"
    later = {"DPA_REHEARSAL": base, "DPA_CACHE": f"{base}/cache"}
    for stage in harness.STAGES:
        env = NO_MODEL_NO_DATA | (later if stage != "proxy" else {})
        config = CONFIGS / f"{name}.py"
        output = harness.finish(stage, work_dir, config=config, env=env)
    check(work_dir, output)


def test_rehearsal_of_all_stages_by_one_command(tmp_path):
    work_dir, config = tmp_path / "run", CONFIGS / "dpa_smollm2_135m_openmoji.py"
    command = [sys.executable, "-m", "xtuner.tools.train", str(config)]
    check(work_dir, rehearse(command, work_dir), tuned="llm_adapter")


@pytest.mark.timeout(900)
def test_rehearsal_by_the_xtuner_command_on_two_ranks_with_zero2(tmp_path):
    work_dir = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("xtuner")), "train"]
    command += [str(CONFIGS / "dpa_internlm2_7b.py"), "--deepspeed", "zero2"]
    port = str(harness.free_port())
    check(work_dir, rehearse(command, work_dir, NPROC_PER_NODE="2", PORT=port))
