"""What the page of weights says, against plain PyTorch with whole softmaxes."""

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support import runs, small_tokenizers, tiny_llava

from dpa_xtuner.analysis import relevance
from dpa_xtuner.analysis.models import find_source, spread, trained_model
from dpa_xtuner.analysis.relevance import (
    Sample,
    Token,
    Weights,
    by_class,
    page,
    read_sample,
    show_relevance,
    weigh,
)
from dpa_xtuner.analysis.words import PART, class_of, classes_of, token_texts
from dpa_xtuner.data import collate
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.loss import ContrastScheme
from dpa_xtuner.registry import SCHEMES


@dataclass(frozen=True)
class Twice(ContrastScheme):
    d_min: float = 0.01
    d_max: float = 1.0

    def difference(self, log_probs, no_image):
        return 2 * (log_probs.probability - no_image.probability)


@pytest.fixture
def twice_the_difference():
    """A user's scheme, known by its name while a test runs."""
    SCHEMES.register_module("twice_the_difference", module=Twice)
    yield
    del SCHEMES.module_dict["twice_the_difference"]


def plainly(model, row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities and logits of a row's supervised tokens, with its pictures and without."""
    data = collate([row])["data"]
    seen = model.splice(data)
    with_picture = model.llm(**seen).logits[0]  # (T, V)
    text = ~data["image_mask"][0]
    inputs = {
        "input_ids": data["input_ids"][:, text],
        "position_ids": data["position_ids"][:, text],
        # Without a mask, transformers 4.57 takes a gap of the positions for another text.
        "attention_mask": torch.ones(1, int(text.sum()), dtype=torch.long),
    }
    without = model.llm(**inputs).logits[0]  # (S, V)
    places = [i for i, label in enumerate(row["labels"]) if i and label >= 0]
    found = []
    for i in places:
        token, before = row["labels"][i], int(text[:i].sum()) - 1  # in the text-only row
        a, b = with_picture[i - 1], without[before]
        found.append((a.softmax(-1)[token], b.softmax(-1)[token], a[token], b[token]))
    return tuple(torch.tensor(column) for column in zip(*found, strict=True))


def pooled(values: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    clamped = values.clamp(low, high)
    windows = [clamped[max(0, i - 1) : i + 2].mean() for i in range(len(clamped))]
    return clamped, torch.stack(windows)


@pytest.mark.usefixtures("twice_the_difference")
@pytest.mark.parametrize("loss", ["uniform", "cmo", "cal", "twice_the_difference"])
def test_weights_and_probabilities_are_those_of_whole_softmaxes(loss):
    model = tiny_llava.build(sharp=True, loss=loss).eval()
    row = tiny_llava.sample(1, "image", 7, 20, 21, 22, 23, 24)
    with torch.no_grad():
        model.llm.lm_head.weight *= 4
        p_w, p_wo, logit, logit_wo = plainly(model, row)
    found = weigh(model, collate([row])["data"])
    assert len(p_w) == 5 and (p_w - p_wo).abs().max() > 0.05
    torch.testing.assert_close(found.p_w, p_w)
    torch.testing.assert_close(found.p_wo, p_wo)
    d, weight = {
        "uniform": lambda: (p_w - p_wo, torch.ones(5)),
        "cmo": lambda: pooled(p_w - p_wo, 0.05, 0.5),
        "cal": lambda: pooled(logit - logit_wo, 1, 5),
        "twice_the_difference": lambda: pooled(2 * (p_w - p_wo), 0.01, 1),
    }[loss]()
    torch.testing.assert_close(found.d, d)
    torch.testing.assert_close(found.weight, weight)


def test_without_a_picture_nothing_differs():
    model = tiny_llava.build(sharp=True, loss="cmo").eval()
    found = weigh(model, collate([tiny_llava.sample(1, 8, 30, 31, 32)])["data"])
    assert torch.equal(found.p_w, found.p_wo) and found.weight.tolist() == pytest.approx([0.05] * 3)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizers.byte_level("<|im_start|>", "<|im_end|>", adds_bos=False)


@pytest.mark.parametrize("text", ["Two red cats.\n", "naïve 画 ✓ end", " a  b"])
def test_the_texts_of_tokens_are_the_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(each.rstrip(PART) for each in texts) == text and len(texts) == len(ids)


def test_sentencepiece_keeps_the_spaces_inside(pieces):
    tokenizer = small_tokenizers.llama(pieces(True), "legacy")
    texts = token_texts(tokenizer, tokenizer("the cat sees", add_special_tokens=False).input_ids)
    assert "".join(texts) == "the cat sees"


def test_words_have_the_class_of_the_list():
    words = {"Cats": "thing", "red": "colour", "Seven": "number", "12": "number", "boxes": "thing",
             "the": "function", "Behold": "style", "Hund": "other word", "it's": "function",
             "left": "position", "notes": "other word", "toes": "other word", "uses": "other word",
             "potatoes": "thing"}  # fmt: skip
    assert {word: class_of(word) for word in words} == words


def test_a_token_has_the_class_of_its_word():
    texts = ["Be", "hold", ",", " two", " tro", "lleybus", "es", " leaping", ".", "\n", ""]
    assert classes_of(texts) == ["style", "style", "punctuation", "number", "thing", "thing",
                                 "thing", "other word", "punctuation", "end", "end"]  # fmt: skip


def test_a_part_of_a_character_has_the_class_of_what_it_begins():
    texts = ["a", " cat", f" {PART}", "ö", "n", " ", "4", "2", f" {PART}", PART, "☀", " ", "\n", ""]
    assert classes_of(texts) == [
        "function", "thing", "other word", "other word", "other word", "number", "number", "number",
        "punctuation", "punctuation", "punctuation", "end", "end", "end",
    ]  # fmt: skip
    assert classes_of(["ह", "ि", "न", "्", "दी"]) == ["other word"] * 5  # no letter to `re`


def test_the_space_before_a_split_character_stays(tokenizer):
    texts = token_texts(tokenizer, tokenizer("cat ön").input_ids)
    assert texts.index("ö") == len(texts) - 2 and texts[-3].endswith(PART)
    assert classes_of(texts)[0] == "thing", texts


def test_classes_are_counted_and_averaged():
    tokens = [Token("cat", "thing", 0.5, 0.6, 0.1, 0.5), Token("dog", "thing", 0.1, 0.2, 0.3, 0.05),
              Token("a", "function", 0.2, 0.9, 0.8, 0.1)]  # fmt: skip
    thing, function = by_class([Sample("x", [], ["?", *tokens])], (0.1, 0.5))
    assert thing["tokens"] == 2 and thing["weight"] == pytest.approx(0.3)
    assert thing["share"] == pytest.approx(0.6 / 0.8) and thing["p_wo"] == pytest.approx(0.2)
    assert thing["bars"] == [1.0, *[0.0] * 10, 1.0]
    assert function["kind"] == "function" and function["bars"][3] == 1.0


class Reader(HTMLParser):
    """Collects tokens with their numbers, unsupervised text, and whatever a page loads."""

    def __init__(self):
        super().__init__()
        self.tokens, self.context, self.sources, self.tags, self.span = [], [], [], [], None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        self.span = attrs if tag == "span" else None

    def handle_data(self, data):
        if self.span is not None and "title" in self.span:
            self.tokens.append((data, dict(line.rsplit(" ", 1) for line in
                                           self.span["title"].splitlines()[:4])))  # fmt: skip
        elif self.span is not None and self.span.get("class") == "context":
            self.context.append(data)

    def handle_endtag(self, tag):
        self.span = None


def test_the_page_shows_each_token_and_needs_no_other_file(tokenizer, tmp_path):
    ids = tokenizer("Is it <b>? Yes & no\n").input_ids
    start = len(tokenizer("Is it <b>?").input_ids)
    sample = {"id": "<7>", "input_ids": torch.tensor([-200, *ids]).numpy(),
              "labels": torch.tensor([-100] * (start + 1) + ids[start:]).numpy()}  # fmt: skip
    n = len(ids) - start
    numbers = torch.arange(n) / n
    image = runs.write_image(tmp_path / "x.png")
    made = read_sample(sample, Weights(numbers, numbers / 2, numbers / 3, numbers / 4), tokenizer,
                       [str(image)])  # fmt: skip
    reader = Reader()
    reader.feed(page([made], "What <i>align</i> looks at", {"loss": "cmo"}))
    assert "".join(text for text, _ in reader.tokens) == " Yes & no⏎"
    assert reader.context == ["Is it <b>?"]
    assert [float(told["weight"]) for _, told in reader.tokens] == pytest.approx(
        numbers.tolist(), abs=1e-3
    )
    last = reader.tokens[-1][1]
    assert [float(last[key]) for key in ("p_w", "p_wo", "d")] == pytest.approx(
        [float(numbers[-1]) / k for k in (2, 3, 4)], abs=1e-3
    )
    assert len(reader.sources) == 1 and reader.sources[0].startswith("data:image/jpeg;base64,")
    assert not {"link", "script", "b", "iframe"} & set(reader.tags)


def test_samples_are_spread():
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1]


# Of whole runs.

RUNS = [
    dict(stage="align"),
    dict(stage="tune", train_llm="lora"),
    dict(stage="tune", train_llm="full"),
    dict(stage="tune", train_llm="lora", start_from="proxy"),
]


def captions(made) -> None:
    """Give a run captions with pictures in place of its one record."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Two red cats."}]
    image = runs.write_image(made.folder / "x.png").name
    records = [{"id": str(i), "image": image, "conversations": talk} for i in range(3)]
    (made.folder / "data.json").write_text(json.dumps(records))


def batch_of(model) -> dict:
    size = model.encoder_spec.image_size(model.visual_encoder.config)
    tokens = model.encode_images(torch.zeros(1, 3, size, size)).shape[1]
    row = {"id": "x", "index": 0, "input_ids": torch.tensor([5] + [-200] * tokens + [6, 7, 8, 9])}
    row["labels"] = torch.where(row["input_ids"] > 6, row["input_ids"], -100).numpy()
    row["input_ids"] = row["input_ids"].numpy()
    generator = torch.Generator().manual_seed(0)
    row["pixel_values"] = [torch.randn(3, size, size, generator=generator)]
    return collate([row])["data"]


@pytest.mark.slow
@pytest.mark.parametrize("how", RUNS, ids=lambda how: "-".join(how.values()))
def test_the_model_is_the_one_that_was_trained(run, how):
    made = run("smollm2", **how)
    source = find_source(made.config, how["stage"], made.work_dir)
    found, data = trained_model(source), batch_of(made.model)
    with torch.no_grad():
        expected = made.model.eval().log_probs(data).cross_entropy
        torch.testing.assert_close(found.log_probs(data).cross_entropy, expected)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.slow
def test_a_checkpoint_is_looked_at_in_place_of_the_end(run, tmp_path):
    made = run("smollm2", stage="tune")
    file = tmp_path / "iter_1.pth"
    with torch.no_grad():
        for weight in made.model.projector.parameters():
            weight.mul_(2)
    torch.save({"state_dict": dict(made.model.state_dict())}, file)
    found = trained_model(find_source(made.config, "tune", made.work_dir, file))
    data = batch_of(made.model)
    with torch.no_grad():
        expected = made.model.eval().log_probs(data).cross_entropy
        torch.testing.assert_close(found.log_probs(data).cross_entropy, expected)
    torch.save({"state_dict": {"projector.x": torch.ones(1)}}, file)
    with pytest.raises(
        DPAError, match=r"is not of stage tune of this config: 33 weights are missing or unknown"
    ):
        trained_model(find_source(made.config, "tune", made.work_dir, file))


@pytest.mark.slow
def test_a_runs_page_is_written(run):
    made = run("smollm2", stage="align")
    captions(made)
    reader = Reader()
    reader.feed(show_relevance(find_source(made.config, None, made.work_dir), 2, None).read_text())
    assert "".join(text for text, _ in reader.tokens) == "Two red cats.⏎" * 2
    assert len(reader.sources) == 2


def text_of(page: Path) -> str:
    reader = Reader()
    reader.feed(page.read_text())
    return "".join(text for text, _ in reader.tokens)


@pytest.mark.slow
def test_a_runs_folder_knows_the_data_that_it_was_trained_on(run, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(relevance, "print_log", lambda text, *_: said.append(text))
    made = run("smollm2", stage="align")
    captions(made)
    others = made.folder / "others.json"
    others.write_text((made.folder / "data.json").read_text().replace("Two red", "One blue"))
    state = made.work_dir / "align" / "stage.json"
    told = json.loads(state.read_text())
    trained = {"data_path": str(others), "sha256": [file_sha256(others)]}
    told["origin"]["data"] |= trained
    state.write_text(json.dumps(told))
    page = show_relevance(find_source(made.work_dir), 1, None)
    assert text_of(page) == "One blue cats.⏎" and "1 of 3 samples that it was" in page.read_text()
    other = {"captions.data_path": str(made.folder / "data.json")}
    page = show_relevance(find_source(made.work_dir, options=other), 1, None)
    assert text_of(page) == "Two red cats.⏎"
    assert "data.json, which the stage was not trained on" in page.read_text()
    with pytest.raises(DPAError, match=r"folder of a run, and --work-dir x is given too"):
        find_source(made.work_dir, work_dir=Path("x"))
    with pytest.raises(DPAError, match=r"those of method='vanilla'. Give the method of its"):
        find_source(made.work_dir, "align", options={"method": "vanilla"})
    records = json.loads(others.read_text())
    records[0]["image"] = "gone.png"
    others.write_text(json.dumps(records))
    loose = {"captions.skip_limit": 1}
    page = show_relevance(find_source(made.work_dir, options=loose), 3, None)
    assert text_of(page) == "One blue cats.⏎" * 2 and "gone.png" in page.read_text()
    assert "leaves out 1 that can't be read" in said[0]
    others.write_text(json.dumps(records[:1]))
    with pytest.raises(DPAError, match=r"(?s)None of the samples .* can be read.*gone.png"):
        show_relevance(find_source(made.work_dir, options=loose), 3, None)


@pytest.mark.slow
def test_what_is_no_run_is_told(run, tmp_path):
    made = run("smollm2", stage="align")
    with pytest.raises(DPAError, match="is not the folder of a run in which align has begun"):
        find_source(tmp_path)
    with pytest.raises(DPAError, match=r"There is no run in .*nothing"):
        find_source(made.config, None, tmp_path / "nothing")
    with pytest.raises(DPAError, match="Stage proxy sees no picture: give --stage align or tune"):
        find_source(made.config, "proxy", made.work_dir)
    state = made.work_dir / "align" / "stage.json"
    told = json.loads(state.read_text())
    assert told["origin"]["config"]
    told["origin"]["config"] = "gone.py"
    state.write_text(json.dumps(told))
    with pytest.raises(DPAError, match=r"was trained with gone.py, which is not there"):
        find_source(made.work_dir)
    told["origin"]["visual_encoder"]["fingerprint"] = "another"
    state.write_text(json.dumps(told))
    with pytest.raises(
        DPAError, match=r"encoder holds other weights than .* did when .*align was trained"
    ):
        trained_model(find_source(made.config, None, made.work_dir))
