"""Samples, batches, images and the check, held against stock XTuner."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, FUNCTIONS
from PIL import Image
from torch.utils.data import DataLoader
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

from dpa_xtuner.data import DPADataset, Problem, check_dataset, collate
from dpa_xtuner.data.images import ImageProblem, load_pixels
from dpa_xtuner.errors import DPAError


@pytest.fixture
def make(images, tokenizer, processor, write):
    """Makes a data set from records."""

    def make_dataset(data, sample_format="caption", **settings):
        settings = {"image_tokens": 4, "skip_limit": 0, **settings}
        return DPADataset(write(data), images, tokenizer, processor, sample_format, **settings)

    return make_dataset


def test_equals_stock_llava_dataset(images, tokenizer, processor, write, chat):
    data = [
        chat("a", "<image>\nWhat?", "A balloon.", image="tall.png"),
        chat("b", "What is this?\n<image>", "Two cats.", image="wide.png"),
    ]
    path = write(data)
    theirs = LLaVADataset(
        str(images),
        processor,
        data_path=str(path),
        tokenizer=tokenizer,
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat),
        pad_image_to_square=True,
    )
    ours = DPADataset(
        path, images, tokenizer, processor, "chat", 1, "qwen_chat", pad_image_to_square=True
    )
    assert ours.modality_length == theirs.modality_length
    for i in range(2):
        assert ours[i]["input_ids"].tolist() == theirs[i]["input_ids"]
        assert ours[i]["labels"].tolist() == theirs[i]["labels"]
        (pixels,) = ours[i]["pixel_values"]
        assert pixels.dtype == torch.float32 and torch.equal(pixels, theirs[i]["pixel_values"])


def test_images_are_expanded_and_inputs_marked(make, chat, tokenizer):
    dataset = make(
        [chat("a", "<image> or <image>?", "Cats", image=["wide.png", "grey.png"])],
        sample_format="chat",
        prompt_template={"INSTRUCTION": "{input}", "SUFFIX": "</s>", "SUFFIX_AS_EOS": True},
        image_tokens=3,
    )
    sample = dataset[0]
    between = tokenizer.encode(" or ", add_special_tokens=False)
    after = tokenizer.encode("?", add_special_tokens=False)
    answer = tokenizer.encode("Cats</s>", add_special_tokens=False)
    image = [-200] * 3
    prompt = [tokenizer.bos_token_id, *image, *between, *image, *after]
    assert sample["input_ids"].tolist() == prompt + answer
    assert sample["labels"].tolist() == [-100] * len(prompt) + answer
    assert sample["input_ids"].dtype == sample["labels"].dtype == np.int64
    assert [image.shape for image in sample["pixel_values"]] == [(3, 8, 8)] * 2
    assert dataset.length == dataset.modality_length == [len(prompt) + len(answer)]


def test_lengths_tell_the_modality(make, chat):
    data = [chat("a", "<image>?", "Cats", image="wide.png"), chat("b", "Hi", "Hello")]
    dataset = make(data, sample_format="chat", prompt_template="qwen_chat")
    with_image, without = (len(dataset[i]["input_ids"]) for i in range(2))
    assert dataset.modality_length == [with_image, -without]
    assert dataset.length == [with_image, without]
    assert dataset[1]["pixel_values"] == []


def test_the_text_format_needs_no_image(write, caption, tokenizer):
    dataset = DPADataset(write([caption("a")]), None, tokenizer, None, "caption_text")
    assert dataset[0]["pixel_values"] == [] and dataset.modality_length[0] < 0


def test_held_out_samples_are_no_training_samples(make, caption):
    data = [caption(str(i)) for i in range(20)]
    train, held_out = (make(data, held_out=6, split=split) for split in ("train", "held_out"))
    kept, trained = ([d.text(i)["id"] for i in range(len(d))] for d in (held_out, train))
    assert len(kept) == 6 and sorted(kept + trained, key=int) == [str(i) for i in range(20)]
    data[0] = caption("0", "")  # a record that one format drops moves no other to the other split
    again = make(data, sample_format="caption_text", held_out=6, split="held_out", skip_limit=0.1)
    assert {again.text(i)["id"] for i in range(len(again))} == set(kept) - {"0"}
    with pytest.raises(KeyError, match="test"):
        make(data, split="test", skip_limit=1)


def test_too_many_problems_stop_the_start(make, caption):
    data = [caption(str(i)) for i in range(99)] + [caption("blank", "")]
    assert len(make(data, skip_limit=0.01)) == 99
    with pytest.raises(DPAError, match=r"1 of 100 records .* skip_limit=0.009(?s:.)*blank"):
        make(data, skip_limit=0.009)
    with pytest.raises(DPAError, match="no usable sample: 0 samples from 1 records"):
        make([caption("blank", "")], skip_limit=1)
    with pytest.raises(DPAError, match="no usable sample: 0 samples from 0 records"):
        make([])


def test_a_bad_image_is_skipped_with_its_path(make, caption, images):
    names = {"missing": "none.png", "broken": "broken.png", "void": "empty.png", "dir": "."}
    dataset = make([caption(key, image=name) for key, name in names.items()])
    for sample, (key, name) in zip((dataset[i] for i in range(4)), names.items(), strict=True):
        assert isinstance(sample, Problem) and sample.record_id == key
        assert sample.reason.startswith("missing image" if key == "missing" else "broken image")
        assert str(images / name) in sample.reason


def test_a_bomb_is_a_broken_image(images, processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageProblem, match=r"broken image: .*DecompressionBombError"):
        load_pixels(images / "wide.png", processor, True)


def test_an_image_that_would_take_gigabytes_is_out_of_shape(images, processor):
    Image.new("1", (60_000, 1)).save(images / "long.png")  # 11 GB as a square, and scaled up
    Image.new("1", (600, 1)).save(images / "thin.png")
    for name, square in [("long.png", True), ("long.png", False), ("thin.png", False)]:
        with pytest.raises(ImageProblem, match=rf"image out of shape: .*{name}"):
            load_pixels(images / name, processor, square)
    assert load_pixels(images / "thin.png", processor, True)[0].shape == (3, 8, 8)


def test_a_thin_image_is_no_crash(images, processor):
    for size in [(1, 1), (3, 1), (1, 200)]:
        Image.new("RGB", size).save(images / "thin.png")
        for square in (True, False):
            try:
                (pixels,) = load_pixels(images / "thin.png", processor, square)
                assert pixels.shape == (3, 8, 8)
            except ImageProblem as problem:
                assert "thin.png" in str(problem)


def test_from_config_in_workers(write, images, tokenizer, processor, caption, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    processor.save_pretrained(tmp_path / "processor")
    config = {
        "type": "DPADataset",
        "data_path": str(write([caption(str(i), "A cat. " * (i + 1)) for i in range(6)])),
        "image_folder": str(images),
        "sample_format": "caption",
        "image_tokens": 4,
        "tokenizer": {
            "type": "transformers.AutoTokenizer.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / "tokenizer"),
        },
        "image_processor": {
            "type": "transformers.CLIPImageProcessor.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / "processor"),
        },
    }
    dataset = DATASETS.build(config)
    loader = DataLoader(dataset, 2, num_workers=2, collate_fn=FUNCTIONS.get("dpa_collate"))
    here = DataLoader(dataset, 2, collate_fn=collate)
    for theirs, ours in zip(loader, here, strict=True):
        assert theirs["data"].keys() == ours["data"].keys()
        for key, value in ours["data"].items():
            same = torch.equal if isinstance(value, torch.Tensor) else list.__eq__
            assert same(theirs["data"][key], value)


def test_pickles_small(make, caption):
    dataset = make([caption(str(i), "cats " * 50) for i in range(2000)])
    dataset[0], dataset.problems, dataset.modality_length
    written = sum(path.stat().st_size for path in dataset.stores[0].folder.iterdir())
    assert len(pickle.dumps(dataset)) < 40_000 < written / 10
    assert pickle.loads(pickle.dumps(dataset))[7]["input_ids"].tolist()


def batch(*items):
    return collate(list(items))["data"]


def sample(record_id, tokens, images=0):
    tokens = np.array(tokens)
    labels = np.where(tokens == -200, -100, tokens)
    pixels = [torch.full((3, 2, 2), float(tokens[0])) for _ in range(images)]
    item = {"id": record_id, "index": "abcd".index(record_id), "pixel_values": pixels}
    return item | {"input_ids": tokens, "labels": labels}


def test_a_batch_by_hand():
    data = batch(
        sample("a", [7, -200, -200, 8], images=1),
        Problem("b", "missing image: x.png"),
        sample("c", [9]),
        sample("d", [5, -200], images=1),
    )
    assert data["input_ids"].tolist() == [[7, 0, 0, 8], [9, 0, 0, 0], [5, 0, 0, 0]]
    assert data["labels"].tolist() == [
        [7, -100, -100, 8],
        [9, -100, -100, -100],
        [5, -100, -100, -100],
    ]
    assert data["attention_mask"].tolist() == [
        [True] * 4,
        [True] + [False] * 3,
        [True] * 2 + [False] * 2,
    ]
    assert data["image_mask"].int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert data["position_ids"].tolist() == [[0, 1, 2, 3]] * 3
    assert data["pixel_values"][:, 0, 0, 0].tolist() == [7.0, 5.0]
    assert data["ids"] == ["a", "c", "d"] and data["indices"] == [0, 2, 3]
    assert data["skipped"] == [("b", "missing image: x.png")]
    kinds = [data[k].dtype for k in ("input_ids", "labels", "attention_mask", "image_mask")]
    assert kinds == [torch.int64, torch.int64, torch.bool, torch.bool]


def test_collate_leaves_its_inputs_unchanged():
    items = [sample("a", [7, -200, 8], images=1), sample("b", [9])]
    before = copy.deepcopy(items)
    data = batch(*items)
    data["input_ids"].zero_(), data["labels"].zero_()
    for item, old in zip(items, before, strict=True):
        assert item["input_ids"].tolist() == old["input_ids"].tolist()
        assert item["labels"].tolist() == old["labels"].tolist()


def test_text_only_and_all_skipped_batches():
    assert "pixel_values" not in batch(sample("a", [1, 2]))
    data = batch(Problem("a", "broken image: x"), Problem("b", "missing image: y"))
    assert data["input_ids"].tolist() == [[0]] and data["labels"].tolist() == [[-100]]
    assert data["attention_mask"].tolist() == [[True]] and not data["image_mask"].any()
    assert data["ids"] == [] and len(data["skipped"]) == 2 and "pixel_values" not in data


def test_check_finds_everything(make, caption):
    data = [caption(f"good{i}", "cats " * 10) for i in range(6)]
    data += [caption("long", "cats " * 100), caption("blank", ""), caption("odd", prompt="None")]
    data += [caption("gone", image="none.png"), caption("half", image="broken.png")]
    dataset = make(data, skip_limit=1, max_length=120)
    report = check_dataset(dataset)
    assert {problem.record_id: problem.kind for problem in report.problems} == {
        "blank": "empty caption",
        "odd": "wrong number of <image>",
        "gone": "missing image",
        "half": "broken image",
    }
    assert (dataset.records, report.samples, report.checked) == (11, 9, 9)
    lengths = [len(x["input_ids"]) for x in dataset if not isinstance(x, Problem)]
    assert max(lengths) == max(dataset.length) == 120
    assert not report.ok
    assert "1  missing image: gone" in str(report) and "9  samples of 9" in str(report)


def test_check_of_a_sample_is_reproducible(make, caption):
    data = [caption(str(i), image="none.png" if i % 2 else "wide.png") for i in range(40)]
    dataset = make(data)
    first, again, other = (check_dataset(dataset, sample=10, seed=s) for s in (1, 1, 2))
    assert first.checked == 10 and first.problems == again.problems != other.problems
    assert all(int(problem.record_id) % 2 for problem in first.problems)
    clean = check_dataset(make(data[::2]), sample=100)
    assert clean.ok and clean.checked == 20
