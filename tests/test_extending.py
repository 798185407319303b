"""docs/extending.md shows complete files: here they are run as they stand there."""

import json
import os
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from safetensors.torch import load_file
from support import documented, harness

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "configs"
EXTENSIONS = ["my_encoder.py", "my_family.py", "my_projector.py", "my_scheme.py"]
NOTHING_HERE = {"DPA_REHEARSE": "1", "DPA_DATA": "nowhere"}


def test_the_page_shows_a_config_and_four_short_files():
    files = documented.files()
    assert sorted(files) == sorted([*EXTENSIONS, "my_config.py"])
    for name in EXTENSIONS:
        assert len(files[name].splitlines()) <= 15, name  # the comment with its name counted


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """The work dir of a rehearsal of all stages, begun where the page's files are."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(CONFIGS)  # as seen from the repository's root
    for name, content in documented.files().items():
        (folder / name).write_text(content)

    def prepare() -> None:  # PYTHONPATH=.
        os.chdir(folder)
        sys.path.insert(0, str(folder))

    base = folder / "run-rehearsal"
    env = NOTHING_HERE
    for stage in harness.STAGES:
        config = Path("my_config.py")
        options = ("default_hooks.logger.interval=1",)
        harness.finish(stage, folder / "run", *options, config=config, env=env, prepare=prepare)
        env = NOTHING_HERE | {"DPA_REHEARSAL": str(base), "DPA_CACHE": f"{base}/cache"}
    return base


def stage_config(work_dir: Path, stage: str) -> Config:
    (file,) = (work_dir / stage).glob("*/vis_data/config.py")
    return Config.fromfile(file, import_custom_modules=False)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_the_family_was_used(rehearsed):
    assert read(rehearsed / "inputs/llm/config.json")["model_type"] == "mistral"
    assert read(rehearsed / "tune/llm/config.json")["architectures"] == ["MistralForCausalLM"]
    template = stage_config(rehearsed, "tune").train_dataloader.dataset.prompt_template
    assert template.INSTRUCTION == " [INST] {input} [/INST]"
    adapter = read(rehearsed / "proxy/llm_adapter/adapter_config.json")
    assert {"q_proj", "down_proj"} < set(adapter["target_modules"])


def test_the_encoder_was_used(rehearsed):
    assert read(rehearsed / "inputs/visual_encoder/config.json")["model_type"] == "vit"
    for stage in ("align", "tune"):
        config = stage_config(rehearsed, stage)
        assert config.model.encoder == {"type": "vit"}
        # 28 x 28 pixels are 2 x 2 patches; the class token is none of them.
        assert config.train_dataloader.dataset.image_tokens == 4
        assert "ViTImageProcessor" in config.train_dataloader.dataset.image_processor.type
        origin = read(rehearsed / stage / "stage.json")["origin"]
        assert origin["visual_encoder"]["architecture"]["model_type"] == "vit"


def test_the_projector_was_used(rehearsed):
    for stage in ("align", "tune"):
        folder = rehearsed / stage / "projector"
        assert read(folder / "config.json").items() >= {"type": "linear", "bias": False}.items()
        weights = load_file(folder / "model.safetensors")
        assert {name: tuple(w.shape) for name, w in weights.items()} == {"linear.weight": (64, 32)}


def test_the_scheme_was_used(rehearsed):
    for stage in ("align", "tune"):
        assert stage_config(rehearsed, stage).model.loss == {
            "type": "log_likelihood_ratio",
            "d_max": 3.0,
        }
        (log,) = (rehearsed / stage).glob("*/vis_data/scalars.json")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        weights = [row["mean_weight"] for row in rows if "mean_weight" in row]
        # To a tiny random LLM pictures change next to nothing: it stays near the scheme's d_min,
        # which is 0.1, and 0.05 in the method's own.
        assert weights and all(0.1 - 1e-6 <= weight <= 3.0 for weight in weights)
