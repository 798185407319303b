"""Figures of a file, and the page of samples."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from dpa_xtuner.data import DPADataset, check_dataset
from dpa_xtuner.data.figures import file_figures
from dpa_xtuner.data.sample_page import page
from dpa_xtuner.errors import DPAError


@pytest.fixture
def make(images, tokenizer, processor, write):
    def make_dataset(data, sample_format="caption", name="data.json", **settings):
        settings = {"image_tokens": 4, "skip_limit": 1, **settings}
        path = write(data, name)
        return DPADataset(path, images, tokenizer, processor, sample_format, **settings)

    return make_dataset


def test_figures_of_a_file(make, caption, tokenizer):
    data = [caption(str(i), "cat " * i) for i in range(1, 9)]
    data += [caption("again", "cat " * 3), caption("blank", ""), caption("red", "красный</s>")]
    dataset = make(data, max_length=24)
    (figures,) = file_figures(dataset, tokenizer)
    assert (figures.format, figures.records, figures.samples) == ("JSON array", 11, 10)
    assert (figures.pictures, figures.duplicates) == (10, 1)
    assert figures.truncated == sum(
        int(dataset.stores[0].arrays["truncated"][i]) for i in range(10)
    )
    answers = sorted((dataset.text(i)["labels"] != -100).sum() for i in range(10))
    assert figures.answers == (answers[0], int(np.median(answers)), answers[-1])
    edges, counts = figures.lengths
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low <= length < high for length in dataset.length)
    assert counts.sum() == 10
    assert figures.notes == {"special token in a text": (1, ["red"])}
    assert set(figures.scripts) == {"latin", "cyrillic"}
    shown = str(figures)
    assert "11  records, 10 usable, with 10 pictures" in shown
    assert "1  records with special token in a text: red" in shown


def test_the_check_runs_what_training_runs(make, caption, images):
    Image.new("RGB", (1, 1), "red").save(images / "dot.png")
    Image.new("F", (2, 2), float("nan")).save(images / "nan.tif")
    dataset = make([caption("dot", image="dot.png"), caption("nan", image="nan.tif")])
    assert dataset[0]["pixel_values"][0].shape == (3, 8, 8)
    (problem,) = check_dataset(dataset).problems
    assert (problem.record_id, problem.position) == ("nan", 1)
    assert problem.reason == dataset[1].reason and "not all finite" in problem.reason


def test_problems_know_their_file_and_place(make, caption, images, tokenizer, processor, write):
    make([caption("a", ""), caption("b")])
    first = write([caption("a", ""), caption("b")], "one.json")
    second = write([caption("c"), caption("d", image="none.png")], "two.jsonl")
    dataset = DPADataset([first, second], images, tokenizer, processor, "caption", 4, skip_limit=1)
    found = check_dataset(dataset).problems
    assert [(p.file, p.place, p.record_id, p.kind) for p in found] == [
        (str(first), 0, f"{first}: a", "empty caption"),
        (str(second), 1, f"{second}: d", "missing image"),
    ]


def test_a_file_of_bad_records_says_why(make, caption):
    with pytest.raises(DPAError) as error:
        make([caption("a", image=3), caption("b", image=3)])
    assert "no usable sample: 0 samples from 2 records" in str(error.value)
    assert "2  malformed image: a, b" in str(error.value)
    assert "first: malformed image: expected a path" in str(error.value)


def test_the_page_shows_pictures_and_supervised_text(make, chat, tokenizer, images):
    Image.new("RGB", (8, 8), (200, 30, 100)).save(images / "plain.png")
    data = [
        chat("a", "<image>\nWhat <b>?", "Two cats & a dog. </s>", image="plain.png"),
        chat("b", "<image>", "Cats", image="none.png"),
    ]
    settings = {"prompt_template": {"INSTRUCTION": "{input} "}}
    shown = page({"Stage x": make(data, "chat", **settings)}, tokenizer)
    assert shown.count("<section>") == 2
    assert '<span class="picture">4 picture tokens</span>' in shown
    assert re.search(r'<span class="prompt">\s*What &lt;b&gt;\? </span>', shown)
    end = '<span class="answer special">&lt;/s&gt;</span>'
    assert f'<span class="answer">Two cats &amp; a dog. &lt;/s&gt;</span>{end}' in shown
    assert "missing image" in shown
    (content,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert pixels.shape == (8, 8, 3) and abs(pixels - np.array([200, 30, 100])).max() <= 1
