"""What the hooks measure and guard, against plain transformers."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from support import harness
from support.harness import Layout
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
)
from xtuner.model.modules import ProjectorModel  # noqa: F401, registers the class

from dpa_xtuner.engine.hooks import HandOverHook, IterationSeedHook, iteration_seed
from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.loss.held_out import without_first

FULL = Layout(dropout=0.0, train_llm="full")


def measured(work_dir, stage: str) -> dict[str, float]:
    return json.loads((work_dir / stage / "stage.json").read_text())["measured"]


@pytest.fixture
def held_out(tiny) -> list[tuple[str, str]]:
    """Text and picture of the captions that are not trained on."""
    ids, _ = harness.held_out_split(tiny)
    records = {r["id"]: r for r in json.loads((tiny / "captions.json").read_text())}
    return [
        (records[i]["conversations"][1]["value"] + "\n", tiny / "images" / records[i]["image"][0])
        for i in ids
    ]


def llm_with(tiny, work_dir) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The original LLM, and the one with the proxy's adapter; plain peft and transformers."""
    original, base = (
        LlamaForCausalLM.from_pretrained(tiny / "llm", torch_dtype=torch.float32) for _ in "ab"
    )
    adapter = PeftModel.from_pretrained(base, str(work_dir / "proxy/llm_adapter"))
    return original, adapter.merge_and_unload()


@torch.no_grad()
def nats_per_token(llm, tokenizer, captions, picture=None) -> float:
    """Mean of -log p over each caption's tokens but its first, one token at a time."""
    nats = []
    for text, file in captions:
        ids = tokenizer(text).input_ids
        embeds = llm.get_input_embeddings()(torch.tensor([ids]))
        before = 0
        if picture is not None:
            embeds = torch.cat([picture(file), embeds], dim=1)
            before = embeds.shape[1] - len(ids)
        log_p = llm(inputs_embeds=embeds).logits[0].log_softmax(-1)
        for i in range(1, len(ids)):
            nats.append(-log_p[before + i - 1, ids[i]].item())
    return sum(nats) / len(nats)


def test_the_floor_is_that_of_a_plain_computation(reference, tiny, held_out):
    work_dir = reference(FULL).work_dir
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    original, proxy = llm_with(tiny, work_dir)
    found = measured(work_dir, "proxy")
    # Measured in bfloat16, recomputed in float32.
    assert found["original"] == pytest.approx(
        nats_per_token(original, tokenizer, held_out), abs=5e-3
    )
    assert found["floor"] == pytest.approx(nats_per_token(proxy, tokenizer, held_out), abs=5e-3)
    assert found["floor"] < found["original"] - 0.1


def align_pictures(tiny, work_dir):
    """What the projector makes of a picture (None: of a blank one), by plain transformers."""
    vit = CLIPVisionModel.from_pretrained(tiny / "visual_encoder").float()
    projector = AutoModel.from_pretrained(work_dir / "align/projector", trust_remote_code=True)
    processor = CLIPImageProcessor.from_pretrained(tiny / "visual_encoder")
    mean = tuple(int(255 * m) for m in processor.image_mean)

    def picture(file) -> torch.Tensor:
        square = Image.new("RGB", (40, 40), mean)
        if file is not None:
            image = Image.open(file).convert("RGB")  # 30 x 40
            square.paste(image, ((40 - image.width) // 2, (40 - image.height) // 2))
        pixels = processor(square, return_tensors="pt").pixel_values
        pixels = torch.zeros_like(pixels) if file is None else pixels
        return projector(vit(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])

    return picture


def test_align_is_measured_on_the_same_captions_with_their_pictures(reference, tiny, held_out):
    work_dir = reference(FULL).work_dir
    _, proxy = llm_with(tiny, work_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    expected = nats_per_token(proxy, tokenizer, held_out, align_pictures(tiny, work_dir))
    found = measured(work_dir, "align")
    assert found["align"] == pytest.approx(expected, abs=5e-3)
    assert found["floor"] == measured(work_dir, "proxy")["floor"]


def test_the_style_leakage_is_that_of_the_original_llm(reference, tiny, held_out):
    work_dir = reference(FULL).work_dir
    original, _ = llm_with(tiny, work_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llm")
    picture = align_pictures(tiny, work_dir)
    turned = [*held_out[1:], held_out[0]]
    others = [(text, file) for (text, _), (_, file) in zip(held_out, turned, strict=True)]
    blank = [(text, None) for text, _ in held_out]
    expected = {
        "without_picture": nats_per_token(original, tokenizer, held_out),
        "own_picture": nats_per_token(original, tokenizer, held_out, picture),
        "other_picture": nats_per_token(original, tokenizer, others, picture),
        "blank_picture": nats_per_token(original, tokenizer, blank, picture),
    }
    expected["leakage"] = expected["without_picture"] - expected["other_picture"]
    found = measured(work_dir, "align")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=8e-3)
    # Not those of the proxy, which was in memory.
    assert found["own_picture"] > found["align"] + 0.1


@pytest.mark.parametrize("stage", ["proxy", "align"])
def test_what_was_measured_survives_a_stop(stage, reference, tmp_path):
    work_dir = tmp_path / "run"
    if stage == "align":
        harness.copy_stage(reference(FULL).work_dir, work_dir, "proxy")
    code, _ = harness.run(stage, work_dir, prepare=harness.die_at_change(work_dir, 28))
    assert code == -9
    assert "resumes from" in harness.finish(stage, work_dir)
    assert measured(work_dir, stage) == measured(reference(FULL).work_dir, stage)


def test_without_first_ignores_the_first_supervised_token_of_each_row():
    labels = torch.tensor([[-100, -100, 5, 6, 7], [3, 4, -100, -100, -100], [-100] * 5])
    kept = labels.clone()
    assert without_first(labels).tolist() == [
        [-100, -100, -100, 6, 7],
        [-100, 4, -100, -100, -100],
        [-100] * 5,
    ]
    assert torch.equal(labels, kept)


def test_a_changed_frozen_llm_stops_align_and_nothing_is_written(reference, tmp_path):
    work_dir = tmp_path / "run"
    harness.copy_stage(reference(FULL).work_dir, work_dir, "proxy")

    def change_one_bit() -> None:
        stock = HandOverHook.after_train_iter

        def changed(self, runner, batch_idx, data_batch=None, outputs=None):
            stock(self, runner, batch_idx, data_batch, outputs)
            if batch_idx == 5:
                weight = unwrap(runner.model).llm.lm_head.weight
                weight.data.view(torch.int16)[3, 4] ^= 1

        HandOverHook.after_train_iter = changed

    code, output = harness.run("align", work_dir, prepare=change_one_bit)
    assert code == 1 and "Traceback" not in output
    assert "The LLM is frozen in align but its weights changed" in output
    assert not (work_dir / "align/projector").exists()
    assert json.loads((work_dir / "align/stage.json").read_text())["status"] == "failed"


def test_the_log_has_a_row_for_each_component(reference, tmp_path):
    work_dir = tmp_path / "run"
    for stage in ("proxy", "align"):
        harness.copy_stage(reference(FULL).work_dir, work_dir, stage)
    output = harness.finish("tune", work_dir)
    assert "Stage tune (3 of 3)" in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line[:2] == "  "}
    written = harness.weights(work_dir)
    for component in ("llm", "projector"):
        count = sum(v.numel() for k, v in written.items() if k.startswith(f"tune/{component}/"))
        assert rows[component][1:3] == [f"{count:,}", "0"]
    assert rows["visual_encoder"][1] == "0"
    assert "Stage tune begins from the original LLM's weights" in output


def test_each_iteration_and_rank_has_its_own_seed(monkeypatch):
    monkeypatch.setattr(iteration_seed, "get_world_size", lambda: 2)

    def draw(seed: int, iteration: int, rank: int) -> float:
        monkeypatch.setattr(iteration_seed, "get_rank", lambda: rank)
        IterationSeedHook().before_train_iter(SimpleNamespace(seed=seed), iteration)
        return torch.rand(1).item()

    places = [(seed, i, rank) for seed in (1, 2) for i in range(5) for rank in (0, 1)]
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    torch.rand(7)
    assert [draw(*place) for place in places] == drawn
