"""What others meet in an exported folder: its card, its pictures, the layout that vLLM reads."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support import runs
from transformers import AutoProcessor
from xtuner.registry import BUILDER

from dpa_xtuner.data.images import load_pixels
from dpa_xtuner.export import export_config
from dpa_xtuner.model_card import MODEL_CARD, write_card
from dpa_xtuner.pictures import as_rgb

pytestmark = pytest.mark.slow

DINO = dict(type="dinov2", image_size=16, layer=-2)
KINDS = {
    "clip": ("internlm2", dict(train_llm="full")),
    "siglip": ("qwen2", dict(encoder="siglip")),
    "dinov2": ("smollm2", dict(encoder=DINO)),
}
NOT_OURS = "import sys; assert not {'dpa_xtuner', 'xtuner', 'mmengine'} & set(sys.modules)\n"


@pytest.fixture(scope="module")
def made(run):
    """Name of an encoder -> a finished run and its export."""
    found = {}
    for name, (family, how) in KINDS.items():
        one = run(family, **how)
        found[name] = one, export_config(one.config, work_dir=one.work_dir, dtype="float32")
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Lying on its side, with transparency, and wide: what a processor alone gets wrong."""
    path = tmp_path_factory.mktemp("picture") / "picture.jpg"
    image = Image.effect_mandelbrot((40, 26), (-3, -2.5, 2, 2.5), 100).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, "PNG", exif=exif)
    return path


def snippet(folder) -> str:
    return re.search(r"```python\n(.*?)```", (folder / MODEL_CARD).read_text(), re.DOTALL)[1]


def pixels_of_training(run, picture) -> torch.Tensor:
    processor = BUILDER.build(run.cfg.image_processor.to_dict())
    return load_pixels(picture, processor, pad_to_square=True)[0]


@pytest.mark.parametrize("name", KINDS)
def test_the_code_of_the_card_gives_training_s_pixels_and_answer(name, made, picture, tmp_path):
    run, folder = made[name]
    place = tmp_path / "copied"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    (place / "picture.jpg").write_bytes(picture.read_bytes())
    code = snippet(folder) + NOT_OURS + "inputs.pixel_values.numpy().tofile('pixels')\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = pixels_of_training(run, picture)
    found = torch.from_file(str(place / "pixels"), size=wanted.numel()).view(wanted.shape)
    assert torch.equal(found, wanted) and wanted.std() > 0.3
    asked = runs.Record("", ("x",), None, (("<image>\nWhat is shown here?", "A fractal."),))
    generation = json.loads((folder / "generation_config.json").read_text())
    said = run.greedy(
        run.prompt(asked), picture, 200, generation["eos_token_id"],
        json.loads((folder / "config.json").read_text())["image_token_index"],
    )  # fmt: skip
    expected = run.tokenizer.decode(said, skip_special_tokens=True)
    assert done.stdout.strip()[:40] == expected.strip()[:40] != ""


@pytest.mark.parametrize("name", KINDS)
def test_the_processor_pads_where_transformers_can(name, made, picture):
    run, folder = made[name]
    processor = AutoProcessor.from_pretrained(folder)
    image = as_rgb(Image.open(picture))
    found = processor.image_processor(images=[image], return_tensors="pt").pixel_values[0]
    wanted = pixels_of_training(run, picture)
    kind = type(processor.image_processor).__name__
    if kind.startswith("LlavaImageProcessor"):
        assert torch.equal(found, wanted)
    else:  # transformers 4.48: the card says what to do
        assert kind == "CLIPImageProcessor"
        assert (
            not torch.equal(found, wanted) and "4.48 does not" in (folder / MODEL_CARD).read_text()
        )


def test_pictures_that_training_cropped_are_cropped(run, picture):
    how = {"tune.pad_image_to_square": False}
    cropped = run("vicuna", options=how)
    folder = export_config(cropped.config, work_dir=cropped.work_dir, options=how)
    processor = AutoProcessor.from_pretrained(folder)
    found = processor.image_processor(as_rgb(Image.open(picture)), return_tensors="pt")
    trained = BUILDER.build(cropped.cfg.image_processor.to_dict())
    assert torch.equal(found.pixel_values[0], load_pixels(picture, trained, False)[0])
    assert "square" not in (folder / MODEL_CARD).read_text()


def test_the_card_names_what_it_was_made_from_and_how_it_scored(made):
    run, folder = made["clip"]
    card = (folder / MODEL_CARD).read_text()
    for fact in (run.folder / "llm", run.folder / "encoder", "`dpa`", "data.json", "## Licence"):
        assert str(fact) in card
    assert "## Scores" not in card and "{" not in re.sub(r"```.*?```|`[^`]*`", "", card, flags=re.S)
    before = (folder / "config.json").stat().st_mtime_ns
    write_card(folder, {"MMBench": 61.25}, limit=50)
    card = (folder / MODEL_CARD).read_text()
    assert "| MMBench | 61.2 |" in card and "At most 50" in card
    export_config(run.config, work_dir=run.work_dir, dtype="float32")
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert "| MMBench" in (folder / MODEL_CARD).read_text()


def test_captions_are_asked_without_a_question(run):
    made = run("vicuna", stage="align")
    folder = export_config(made.config, "align", work_dir=made.work_dir, dtype="float32")
    code = snippet(folder)
    assert "question" not in code.replace("no question", "")
    compile(code, "card", "exec")


# What vllm/model_executor/models/llava.py reads (vllm-project/vllm at 35d3c24b): CLIP and SigLIP
# alone, and the LLM by text_config.architectures (init_vllm_registered_model in utils.py).
VLLM_ENCODERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
VLLM_PREFIXES = {
    "language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.",
    "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "llm"), [("clip", "LlamaForCausalLM"), ("siglip", "Qwen2ForCausalLM")]
)
def test_the_layout_is_what_vllm_reads(name, llm, made):
    _, folder = made[name]
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [llm]
    assert vision["model_type"] == VLLM_ENCODERS[name]
    assert isinstance(config["vision_feature_layer"], int)
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True
    # Tokens of a picture: patches and CLIP's class token, less one for the strategy "default".
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    strategy = {"clip": "default", "siglip": "full"}[name]
    assert config["vision_feature_select_strategy"] == strategy
    assert config["image_seq_length"] == patches
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_token == "<image>"
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert {prefix for prefix in VLLM_PREFIXES for n in names if n.startswith(prefix)} == (
        VLLM_PREFIXES - ({"language_model.lm_head."} if name == "siglip" else set())  # tied
    )
    assert all(n.startswith(tuple(VLLM_PREFIXES)) for n in names)
