"""Families, encoders, projectors, tiles and mixtures: from a setting to a trained stage."""

import json
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config
from safetensors.torch import load_file
from support import harness

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.settings import Settings

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[2] / "configs/_base_/dpa.py"
NOTHING_HERE = {"DPA_REHEARSE": "1", "DPA_DATA": "nowhere"}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def rehearse(folder: Path, config: str, stages: tuple[str, ...]) -> Path:
    """Rehearse a config whose models and data are not here: the work dir."""
    file = folder / "config.py"
    file.write_text(f"_base_ = [{str(BASE)!r}]\nllm_name_or_path = 'nobody/nothing'\n{config}")
    base = folder / "run-rehearsal"
    env = NOTHING_HERE
    for stage in stages:
        harness.finish(stage, folder / "run", config=file, env=env, log_folder=folder / "logs")
        env = NOTHING_HERE | {"DPA_REHEARSAL": str(base), "DPA_CACHE": f"{base}/cache"}
    return base


def stage_config(work_dir: Path, stage: str) -> Config:
    (file,) = (work_dir / stage).glob("*/vis_data/config.py")
    return Config.fromfile(file)


def saved_projector(work_dir: Path) -> dict:
    return json.loads((work_dir / "tune/projector/config.json").read_text())


def test_qwen_siglip_pixel_shuffle_and_tiles(tmp_path):
    config = "family = 'qwen2_5'\nencoder = 'siglip'\nprojector = dict(type='pixel_shuffle')\n"
    config += "visual_encoder_name_or_path = 'nobody/no-siglip'\nmax_tiles = 4\n"
    work_dir = rehearse(tmp_path, config, harness.STAGES)
    dataset = stage_config(work_dir, "align").train_dataloader.dataset
    # 28 x 28 pixels are 2 x 2 patches, which the projector makes one token of.
    assert (dataset.image_tokens, dataset.tile_size, dataset.max_tiles) == (1, 28, 4)
    template = stage_config(work_dir, "tune").train_dataloader.dataset.prompt_template
    assert template.DEFAULT_SYSTEM.startswith("You are Qwen, created by Alibaba Cloud")
    assert saved_projector(work_dir)["type"] == "pixel_shuffle"
    assert json.loads((work_dir / "tune/llm/config.json").read_text())["model_type"] == "qwen2"
    adapter = json.loads((work_dir / "proxy/llm_adapter/adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == LINEAR


def test_internlm2_dinov2_resampler_and_a_full_proxy(tmp_path):
    config = "family = 'internlm2'\nprojector = dict(type='resampler', queries=3)\n"
    config += "encoder = dict(type='dinov2', image_size=28)\n"
    config += "visual_encoder_name_or_path = 'nobody/no-dino'\n"
    config += "proxy = dict(train_llm='full')\ntune = dict(start_from='proxy', train_llm='lora')\n"
    work_dir = rehearse(tmp_path, config, harness.STAGES)
    assert stage_config(work_dir, "align").train_dataloader.dataset.image_tokens == 3
    assert saved_projector(work_dir)["queries"] == 3
    # Loaded as a LLaMA, and saved as one.
    assert json.loads((work_dir / "proxy/llm/config.json").read_text())["model_type"] == "llama"
    state = json.loads((work_dir / "tune/stage.json").read_text())
    assert "llm/model.safetensors" in state["origin"]["loads"]
    assert state["origin"]["encoder"] == {"type": "dinov2", "image_size": 28}


def test_gemma_a_pair_pooling_and_a_mixture_without_a_proxy(tmp_path):
    config = "family = 'gemma2'\nmethod = 'vanilla'\nprojector = dict(type='avg_pool')\n"
    config += "encoder = dict(type='pair', first='clip', second='siglip')\n"
    config += "visual_encoder_name_or_path = 'nobody/clip + nobody/siglip'\n"
    config += "captions = dict(data_path=['a.json', 'b.json'], image_folder=['a', 'b'],\n"
    config += "                weights=[1, 3], share=0.5)\n"
    work_dir = rehearse(tmp_path, config, ("align", "tune"))
    dataset = stage_config(work_dir, "align").train_dataloader.dataset
    assert [Path(file).name for file in dataset.data_path] == ["captions_0.json", "captions_1.json"]
    assert dataset.image_tokens == 1
    state = json.loads((work_dir / "align/stage.json").read_text())
    assert len(state["origin"]["data"]["sha256"]) == 2
    weights = load_file(work_dir / "tune/projector/model.safetensors")
    assert weights["model.0.weight"].shape[1] == 2 * 32  # both encoders' channels


def test_share_and_weights_reach_the_data(tiny, tmp_path):
    files = f"captions.data_path=[{tiny}/captions.json,{tiny}/instructions.json]"
    options = (files, "captions.share=0.5", "captions.weights=[1,3]", "captions.skip_limit=1.0")
    harness.finish("align", tmp_path / "run", "method=cmo", *options)
    dataset = stage_config(tmp_path / "run", "align").train_dataloader.dataset
    assert (dataset.share, list(dataset.weights)) == (0.5, [1, 3])
    code, output = harness.run(
        "align", tmp_path / "run", "method=cmo", *options[:2], "captions.weights=[3,1]", options[3]
    )
    assert code == 1 and "data.weights: was [1.0, 3.0], is [3.0, 1.0]" in output


def refusal(work_dir: Path, *options: str, **how) -> str:
    code, output = harness.run(None, work_dir, *options, **how)
    assert code == 1 and "Traceback" not in output, output[-3000:]
    assert not work_dir.exists()
    return output.split("\ndpa_xtuner: ")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["family=qwen"], "family: 'qwen' is not a known family; did you mean 'qwen3'"),
        (["encoder=clipp"], "encoder: 'clipp' is not a known encoder; did you mean 'clip'"),
        (["encoder=siglip2.0"], "encoder: 'siglip2.0' is not a known encoder; did you mean"),
        (
            ["encoder.leyer=1"],
            "built: leyer: not a known key; did you mean 'layer'",
        ),
        (["projector=mpl"], "projector: 'mpl' is not a known projector; did you mean 'mlp'"),
        (
            ["projector.dept=1"],
            "'mlp' can't be built: dept: not a known key; did you mean 'depth'",
        ),
        (["max_tiles=0"], "max_tiles: Input should be greater than or equal to 1 (got 0)"),
        (["prompt_template=None"], "does not say what kind of LLM"),
        (["encoder=siglip"], "is a model of type 'clip_vision_model', but the encoder SigLIP"),
        (["projector.type=avg_pool", "projector.factor=3"], "does not divide the encoder's 2 x 2"),
        (["projector.type=resampler", "projector.queries=0"], "projector.queries=0 is not"),
        (["model.projector_depth=3"], "set projector.depth instead"),
        (["encoder.layer=-9"], "The feature layer -9 is not one of the 4 hidden states of CLIP"),
        (["model.visual_select_layer=7"], "The feature layer 7 is not one of the 4 hidden states"),
        (["visual_encoder_name_or_path=no/where"], "visual_encoder_name_or_path=FOLDER, or"),
        (["tokenizer.type=transformers.AutoTokeniser.from_pretrained"], "can't be imported: mend"),
        (["image_processor.type=transformers.Non.from_pretrained"], "can't be imported: mend it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_models_that_do_not_fit_are_refused_before_the_first_stage(
    options, message, tiny, tmp_path
):
    assert message in refusal(tmp_path / "run", *options)


@pytest.mark.parametrize(
    ("side", "file", "part"),
    [("llm", "tokenizer*", "tokenizer"), ("visual_encoder", "preprocessor*", "image_processor")],
)
def test_a_folder_that_lacks_a_part_is_refused_before_the_first_stage(
    side, file, part, tiny, tmp_path
):
    folder = shutil.copytree(tiny / side, tmp_path / side)
    for found in [*folder.glob(file), *folder.glob("special_tokens*")]:
        found.unlink()
    setting = f"{side}_name_or_path"
    message = refusal(tmp_path / "run", f"{setting}={folder}")
    assert message.startswith(f"The {part} of {setting}='{folder}' can't be loaded (")
    assert f"--cfg-options {setting}=FOLDER, or connect to the hub" in message


def test_the_proxy_alone_needs_no_encoder(tiny, tmp_path):
    option = "visual_encoder_name_or_path=no/where"
    harness.finish("proxy", tmp_path / "run", option, "proxy.max_steps=1")


def test_an_option_of_the_llm_that_it_can_not_take_is_told(tiny, tmp_path):
    option = "model.llm.attn_implementation=sdap"
    code, output = harness.run("proxy", tmp_path / "run", option)
    assert code == 1 and "Traceback" not in output, output[-3000:]
    assert "did you mean 'sdpa'" in output


def test_a_template_of_the_configs_own_stands_before_the_familys():
    cfg = Config.fromfile(harness.TINY_CONFIG)
    cfg.merge_from_dict({"family": "qwen2", "prompt_template": None})
    system = "You are a helpful assistant."
    assert Settings.from_config(cfg).template["DEFAULT_SYSTEM"] == system
    cfg.prompt_template = "vicuna"
    assert Settings.from_config(cfg).template["INSTRUCTION"] == "USER: {input} ASSISTANT:"


@pytest.fixture
def by_family(tiny, tmp_path):
    """A config that names a family, and neither a loader nor a template."""

    def write(family: str, llm: Path) -> Path:
        file = tmp_path / f"{family}.py"
        file.write_text(
            f"_base_ = [{str(harness.TINY_CONFIG)!r}]\nfamily = {family!r}\n"
            f"prompt_template = None\nllm_name_or_path = {str(llm)!r}\n"
            "model = dict(llm=dict(_delete_=True))\n"
        )
        return file

    return write


def test_a_model_of_another_family_is_refused(by_family, tiny, tmp_path):
    message = refusal(tmp_path / "run", config=by_family("gemma2", tiny / "llm"))
    assert "is a model of type 'llama', but family 'gemma2' loads gemma2" in message


def test_a_template_that_is_not_the_tokenizers_is_refused(by_family, tiny, tmp_path):
    llm = shutil.copytree(tiny / "llm", tmp_path / "llm")
    file = llm / "tokenizer_config.json"
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    config = by_family("vicuna", llm)
    message = refusal(tmp_path / "run", config=config)
    assert "The chat template of 'vicuna' is not the one" in message
    assert "[user] What is shown here?" in message and "USER: What is shown here?" in message
    # On purpose, it is allowed.
    harness.finish("proxy", tmp_path / "run", "tokenizer.chat_template=''", config=config)


def test_a_loader_and_a_template_of_ones_own_need_no_family():
    cfg = Config.fromfile(harness.TINY_CONFIG)
    template = {"INSTRUCTION": "Q: {input} A: ", "SUFFIX": "."}
    cfg.prompt_template = template
    settings = Settings.from_config(cfg)
    assert settings.template == template and settings.llm_family is None
    cfg.model.llm.pop("type")
    with pytest.raises(DPAError, match=r"set family, one of gemma2, .*model.llm.type"):
        Settings.from_config(cfg)
