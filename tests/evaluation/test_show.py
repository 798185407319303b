"""The page of wrong answers."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from support.tiny_folder import picture

from dpa_xtuner import pages
from dpa_xtuner.evaluation import show
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER


def detail(index, path, correct, prediction="cow"):
    return {
        "index": index, "question": f"What is <b>{index}</b>?\nA. cow & calf", "image": path,
        "answer": "A", "prediction": prediction, "correct": correct, "group": None,
    }  # fmt: skip


@pytest.fixture
def samples(tmp_path):
    picture(0, (900, 300)).save(tmp_path / "wide.png")
    path = str(tmp_path / "wide.png")
    found = [detail(i, path, i % 2 == 0) for i in range(10)]
    found.append(detail(10, "", False, f"{NO_ANSWER}: no picture is given"))
    found += [detail(11, path, 0.5), detail(12, path, 1.0), detail(13, path, None)]
    return found


def shown(page):
    return [int(i) for i in re.findall(r"<dt>question (\d+)</dt>", page)]


def test_wrong_answers_are_evenly_spread(samples):
    found = show.page({("tiny", "MMVP"): samples}, 100)
    assert shown(found) == [1, 3, 5, 7, 9, 10, 11]
    assert shown(show.page({("tiny", "MMVP"): samples}, 3)) == [1, 5, 9]
    assert "3 of 7 wrong answers to 14 questions" in show.page({("tiny", "MMVP"): samples}, 3)
    assert shown(show.page({("tiny", "MMVP"): samples[:1]}, 3)) == []


def test_page_needs_no_other_file_and_escapes(samples):
    found = show.page({("<i>", "MMVP"): samples}, 100)
    assert "What is &lt;b&gt;1&lt;/b&gt;?\nA. cow &amp; calf" in found and "&lt;i&gt;" in found
    assert "<b>" not in found and "<i>" not in found
    assert "none: no picture is given" in found and NO_ANSWER not in found

    sources, tags = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            sources.extend(value for name, value in attrs if name in ("src", "href"))

    Reader().feed(found)
    assert len(sources) == 6 and not {"link", "script"} & set(tags)
    for source in sources:
        kind, content = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert max(image.size) == pages.SIDE
