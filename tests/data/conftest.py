"""Small data, tokenizers and images that all data tests share."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

TEXT = [
    "A red balloon drifts over the harbour at dusk.",
    "Two cats sleep on a wooden bench. What are they doing?",
    "user assistant system Describe the picture. image",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def bpe_folder(tmp_path):
    """A folder with vocab.json and merges.txt of a byte-level BPE."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT * 5, vocab_size=320, special_tokens=["<s>", "</s>"])
    folder = tmp_path / "bpe"
    folder.mkdir()
    bpe.save_model(str(folder))
    return folder


@pytest.fixture
def make_tokenizer(bpe_folder):
    """Makes a fast tokenizer that knows <s> and </s>, and adds <s> itself if asked to."""

    def make(adds_bos=True):
        bpe = ByteLevelBPETokenizer.from_file(
            str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
        )._tokenizer
        if adds_bos:
            bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    """A fast tokenizer that adds <s>."""
    return make_tokenizer()


@pytest.fixture
def processor():
    """An image processor for 8 x 8 pixels."""
    return CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.5, 0.4, 0.3]
    )


@pytest.fixture
def images(tmp_path):
    """A folder with a wide, a tall, a grey, a broken and an empty image; none.png is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    Image.fromarray(noise.transpose(1, 0, 2)).save(folder / "tall.png")
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    whole = (folder / "wide.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture
def caption():
    """Makes a caption record."""

    def make(record_id, text="A red balloon.", image="wide.png", prompt="<image>\nDescribe."):
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]
        return {"id": record_id, "image": image, "conversations": turns}

    return make


@pytest.fixture
def chat():
    """Makes a record from alternating human and gpt texts, with one image if it is named."""

    def make(record_id, *values, image=None, system=None):
        roles = ["human", "gpt"] * (len(values) // 2)
        turns = [{"from": r, "value": v} for r, v in zip(roles, values, strict=True)]
        if system is not None:
            turns.insert(0, {"from": "system", "value": system})
        record = {"id": record_id, "conversations": turns}
        return record if image is None else {**record, "image": image}

    return make


@pytest.fixture
def write(tmp_path):
    """Writes records to a JSON file, or to JSON lines where the name asks for it."""

    def write_records(records, name="data.json"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(json.dumps(records))
        return path

    return write_records
