"""Style leakage, against plain transformers."""

import numpy as np
import pytest
import torch
from mmengine.device import get_device
from support import tiny_llava

from dpa_xtuner.data.problems import Problem
from dpa_xtuner.model import leakage
from dpa_xtuner.model.leakage import style_leakage
from dpa_xtuner.precision import Precision

AMP = Precision("fp32").autocast(get_device())


class Captions(list):
    """As much of a data set as is asked for."""

    def text(self, index: int) -> dict:
        return self[index]

    def images_of(self, index: int) -> list[str]:
        return [str(index)] * len(self[index]["pixel_values"])


def nats(model, row: dict, pixels: torch.Tensor | None) -> list[float]:
    """-log p of each token from 20 on but the first, by one plain forward of the LLM."""
    tokens = torch.from_numpy(row["input_ids"])
    embeds = model.llm.get_input_embeddings()(tokens.clamp(min=0))
    keep = tokens >= 0
    if pixels is not None:
        embeds[~keep] = model.encode_images(pixels[None])[0]
        keep = torch.ones_like(keep)
    at = torch.arange(len(tokens))[keep]
    inputs = dict(inputs_embeds=embeds[keep][None], position_ids=at[None])
    # Without a mask, transformers 4.57 takes a gap of the positions for another text.
    inputs["attention_mask"] = torch.ones_like(inputs["position_ids"])
    logits = model.llm(**inputs).logits[0]
    kept = tokens[keep]
    places = [j for j, label in enumerate(kept.tolist()) if label >= 20][1:]
    return [-logits[j - 1].log_softmax(-1)[kept[j]].item() for j in places]


@torch.no_grad()
def test_each_caption_is_asked_with_its_own_another_a_blank_and_no_picture():
    model = tiny_llava.build(sharp=True).eval()
    rows = [tiny_llava.sample(1, "image", 5, 20 + i, 21, 22 + i) for i in range(4)]
    alone = tiny_llava.sample(1, "image", "image", 5, 20, 21)  # nobody else has two pictures
    text = tiny_llava.sample(1, 5, 20, 21)
    found = style_leakage(model, Captions([text, *rows[:2], alone, *rows[2:]]), 3, AMP)

    def mean(pixels_of) -> float:
        every = [value for i, row in enumerate(rows) for value in nats(model, row, pixels_of(i))]
        return sum(every) / len(every)

    expected = {
        "without_picture": mean(lambda i: None),
        "own_picture": mean(lambda i: rows[i]["pixel_values"][0]),
        "other_picture": mean(lambda i: rows[(i + 1) % 4]["pixel_values"][0]),
        "blank_picture": mean(lambda i: torch.zeros(3, 8, 8)),
    }
    expected["leakage"] = expected["without_picture"] - expected["other_picture"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found.values())) == 5


def test_a_picture_that_cant_be_read_is_left_out_and_a_lone_one_is_not_measured(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(leakage, "print_log", lambda text, *_: said.append(text))
    model = tiny_llava.build(sharp=True).eval()
    rows = [tiny_llava.sample(1, "image", 5, 20 + i, 21, 22 + i) for i in range(3)]
    assert style_leakage(model, Captions(rows[:1]), 2, AMP) == {}

    class Broken(Captions):
        def __getitem__(self, index: int):
            row = super().__getitem__(index)
            return Problem("1", "broken image", position=1) if index == 1 else row

        def text(self, index: int) -> dict:
            return list.__getitem__(self, index)

        def images_of(self, index: int) -> list[str]:
            return [str(index)]

    class AllBroken(Broken):
        def __getitem__(self, index: int):
            return Problem(str(index), "broken image", position=index)

    found = style_leakage(model, Broken(rows), 2, AMP)
    with torch.no_grad():  # 0 and 2 get each other's picture
        other = [nats(model, rows[i], rows[2 - i]["pixel_values"][0]) for i in (0, 2)]
        own = [nats(model, rows[i], rows[i]["pixel_values"][0]) for i in (0, 2)]
    assert found["other_picture"] == pytest.approx(np.mean(other), rel=1e-4)
    assert found["own_picture"] == pytest.approx(np.mean(own), rel=1e-4)  # of the same captions
    assert "leaves out 1 of 3 held-out captions" in said[0]
    assert style_leakage(model, AllBroken(rows), 2, AMP) == {}
