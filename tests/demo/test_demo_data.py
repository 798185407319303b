"""The demo's drawings, pictures and questions."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

from dpa_xtuner.demo import drawings, prepare, scenes, vit
from dpa_xtuner.errors import DPAError

RECIPE = scenes.Recipe(captions=60, questions=60, held_out=32, text_only=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "openmoji"
    assert scenes.write_scenes(root, RECIPE)
    return root


def _records(root: Path, name: str) -> list[dict]:
    return json.loads((root / name).read_text())


def test_same_recipe_gives_the_same_files(data: Path, tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path / "again", RECIPE)
    assert scenes.digest(tmp_path / "again") == scenes.digest(data)


def test_finished_data_is_not_made_again(data: Path) -> None:
    before = (data / scenes.CAPTIONS).stat().st_mtime_ns
    assert not scenes.write_scenes(data, RECIPE)
    assert (data / scenes.CAPTIONS).stat().st_mtime_ns == before
    assert not scenes.is_written(data, scenes.Recipe(captions=61))


def test_nothing_is_left_of_a_broken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "_held_out_question_records", fail)
    with pytest.raises(OSError, match="disk full"):
        scenes.write_scenes(tmp_path / "data", RECIPE)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert scenes.write_scenes(tmp_path / "data", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_concept_is_on_both_sides() -> None:
    sides: dict[str, set[bool]] = {}
    for drawing in drawings.catalogue():
        sides.setdefault(drawing.name, set()).add(drawing.held_out)
    assert all(len(side) == 1 for side in sides.values())
    share = sum(side == {True} for side in sides.values()) / len(sides)
    assert 0.1 < share < 0.2


def test_no_held_out_drawing_in_training_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, set[str]] = {}
    save = scenes._Folder.save

    def record(folder: scenes._Folder, name: str, scene: scenes.Scene) -> str:
        drawn.setdefault(name.rpartition("-")[0], set()).update(d.code for d in scene.drawings)
        return save(folder, name, scene)

    monkeypatch.setattr(scenes._Folder, "save", record)
    scenes.write_scenes(tmp_path / "data", RECIPE)
    held_out = {drawing.code for drawing in drawings.catalogue() if drawing.held_out}
    assert not (drawn["caption"] | drawn["question"]) & held_out
    assert drawn["heldout"] | drawn["heldout-caption"] <= held_out


def test_vision_encoder_is_trained_on_training_drawings_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vit, "_variants", lambda code, *_: code)

    batches = vit.Batches(SimpleNamespace(banks={"name": ()}), seed=0)
    held_out = {drawing.code for drawing in drawings.catalogue() if drawing.held_out}
    assert not (set(batches.small) | set(batches.large)) & held_out
    sampled = {drawing.code for kind in batches.sampler.by_kind.values() for drawing in kind}
    assert sampled == set(batches.small)


@pytest.mark.parametrize(
    ("code", "colour"),
    [
        ("1F34E", "red"),
        ("1F438", "green"),
        ("1F34C", "yellow"),
        ("1F499", "blue"),
        ("1F7E0", "orange"),
        ("1F346", "purple"),
        ("1F9A9", "pink"),
        ("1F7EB", "brown"),
        ("1F418", "grey"),
        ("26AB", "black"),
        ("26AA", None),
    ],
)
def test_colour_of_known_drawings(code: str, colour: str | None) -> None:
    assert drawings.colour_family(drawings.render(code, drawings.COLOUR_SIZE)) == colour


def test_white_paper_has_no_colour() -> None:
    assert drawings.colour_family(np.full((8, 8, 3), 255, np.uint8)) is None


def test_scene_puts_a_drawing_into_its_cell() -> None:
    apple = next(d for d in drawings.catalogue() if d.name == "red apple")
    pixels = scenes.draw(scenes.Scene((apple,), (scenes.CELLS.index("bottom left"),)))
    assert (pixels[64:, :32] != 255).any()
    assert (pixels[:64] == 255).all()
    assert (pixels[:, 32:] == 255).all()


def test_questions_of_a_scene_are_answered_from_it() -> None:
    known = {drawing.name: drawing for drawing in drawings.catalogue()}
    scene = scenes.Scene(
        (known["red apple"], known["frog"]),
        (scenes.CELLS.index("top"), scenes.CELLS.index("bottom right")),
    )
    assert {question.text: question.answer for question in scenes.questions(scene)} == {
        "What kind of thing is at the top?": "food",
        "Which colour is the thing at the top?": "red",
        "What kind of thing is at the bottom right?": "animal",
        "Which colour is the thing at the bottom right?": "green",
    }
    alone = scenes.Scene((known["frog"],), (scenes.CELLS.index("left"),))
    assert {question.text: question.answer for question in scenes.questions(alone)} == {
        "What kind of thing is shown?": "animal",
        "Which colour is the thing shown?": "green",
        "How many things are there?": "one",
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_question_tells_a_fact_that_is_asked_for(seed: int) -> None:
    """Places of several drawings are told, to say which is meant, and then not asked for."""
    asked = scenes.questions(scenes.Sampler(False, random.Random(seed)).scene())
    for question in asked:
        words = question.text.rstrip("?").split()
        facts = {other.answer for other in asked}
        assert not facts & set(words), question.text


def test_held_out_questions_carry_kind_and_choices(data: Path) -> None:
    records = _records(data, scenes.HELD_OUT_QUESTIONS)
    assert len(records) == RECIPE.held_out
    for record in records:
        assert record["choices"] == len(scenes.ANSWERS[record["kind"]])
        assert record["conversations"][1]["value"] in scenes.ANSWERS[record["kind"]]


def test_instructions_hold_text_only_samples(data: Path) -> None:
    plain = [record for record in _records(data, scenes.QUESTIONS) if "image" not in record]
    assert len(plain) == RECIPE.text_only
    assert all("<image>" not in record["conversations"][0]["value"] for record in plain)


def test_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(DPAError, match="'no_such_package_for_the_demo', which `make install`"):
        drawings.require("no_such_package_for_the_demo")


def test_scaling_features_changes_nothing_but_their_size() -> None:
    torch.manual_seed(0)
    model = vit.new_vit().eval()
    pixels = torch.rand(2, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        before = model(pixels, output_hidden_states=True)
        vit.scale_features(model, 0.25)
        after = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(
        after.hidden_states[-2], before.hidden_states[-2] / 4, atol=1e-2, rtol=0
    )
    torch.testing.assert_close(after.pooler_output, before.pooler_output, atol=1e-2, rtol=0)


def test_shipped_encoder_loads_and_sees_a_difference() -> None:
    encoder = CLIPVisionModel.from_pretrained(prepare.SHIPPED_VIT, torch_dtype=torch.float32)
    processor = CLIPImageProcessor.from_pretrained(prepare.SHIPPED_VIT)
    assert (prepare.SHIPPED_VIT / "model.safetensors").stat().st_size < 8_000_000
    pictures = [Image.fromarray(drawings.render(code, 96)) for code in ("1F34E", "1F438")]
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert features.shape == (2, 36, 192)
    assert (features[0] - features[1]).abs().mean() > 0.1
