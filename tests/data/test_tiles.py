"""Dynamic tiles: the grid, the cut, and samples whose images take tokens by their sizes."""

import threading

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from dpa_xtuner.data import DPADataset, GroupedSampler, Problem, check_dataset, collate, store
from dpa_xtuner.data.images import ImageProblem, load_pixels
from dpa_xtuner.data.tiles import Tiling
from dpa_xtuner.errors import DPAError


def nearest(width, height, max_tiles, tile_size):
    """The rule once more: all grids by their number of tiles, the last good one of the nearest."""
    columns, rows = np.mgrid[1 : max_tiles + 1, 1 : max_tiles + 1].reshape(2, -1)
    order = np.argsort(columns * rows, kind="stable")
    order = order[(columns * rows)[order] <= max_tiles]
    distance = np.abs(width / height - columns[order] / rows[order])
    first, *others = order[distance == distance.min()]
    large = [i for i in others if 2 * width * height > tile_size**2 * columns[i] * rows[i]]
    best = (large or [first])[-1]
    return int(columns[best]), int(rows[best])


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "expected"),
    [
        (300, 300, 12, (1, 1)),  # 90,000 pixels are less than half of 2 x 2 tiles
        (600, 600, 12, (2, 2)),  # 360,000 are more than half of 2 x 2, less than half of 3 x 3
        (800, 800, 12, (3, 3)),
        (800, 800, 8, (2, 2)),
        (1000, 250, 12, (4, 1)),
        (250, 1000, 12, (1, 4)),
        (1080, 1920, 12, (2, 4)),  # 0.5625: 1/2 is 0.0625 away, 2/3 is 0.104
        (448, 336, 12, (4, 3)),
        (448, 336, 4, (1, 1)),  # 4/3 is 1/3 from 1, 2/3 from 2
        (420, 336, 6, (1, 1)),  # 5/4 is as near to 3/2; 6 tiles are far too many
        (1250, 1000, 6, (3, 2)),
        (5000, 10, 12, (12, 1)),
        (640, 480, 1, (1, 1)),
    ],
)
def test_grids_by_hand(width, height, max_tiles, expected):
    assert Tiling(max_tiles, 336).grid(width, height) == expected
    tiles = expected[0] * expected[1]
    assert Tiling(max_tiles, 336).count((width, height)) == (tiles if tiles == 1 else tiles + 1)


@pytest.mark.parametrize("tile_size", [336, 448])
def test_grids_follow_the_rule(tile_size):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 3000, (500, 2)), rng.integers(1, 12, (200, 2)) * 100])
    for width, height in sizes.tolist():
        for max_tiles in (1, 2, 6, 7, 12):
            found = Tiling(max_tiles, tile_size).grid(width, height)
            assert found == nearest(width, height, max_tiles, tile_size)


def picture(width, height):
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    )


def test_tiles_go_row_by_row_and_the_thumbnail_is_last():
    image = picture(24, 16)  # 3 x 2 tiles of 8 pixels: nothing is stretched
    array = np.asarray(image)
    *tiles, thumbnail = Tiling(6, 8).cut(image)
    assert len(tiles) == 6
    for i, tile in enumerate(tiles):
        y, x = 8 * (i // 3), 8 * (i % 3)
        assert np.array_equal(np.asarray(tile), array[y : y + 8, x : x + 8])
    assert np.array_equal(np.asarray(thumbnail), np.asarray(image.resize((8, 8), 3)))


def test_a_padded_thumbnail_keeps_its_shape():
    *_, thumbnail = Tiling(12, 8).cut(Image.new("RGB", (32, 16), "white"), (0, 0, 0))
    rows = np.asarray(thumbnail)[:, 4, 0].tolist()
    assert rows[0] == rows[-1] == 0 and rows[3] == rows[4] == 255
    *_, stretched = Tiling(12, 8).cut(Image.new("RGB", (32, 16), "white"))
    assert np.asarray(stretched).min() == 255


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 5}, crop_size={"height": 5, "width": 5}),
        BitImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 8, "width": 8}),
        SiglipImageProcessor(size={"height": 5, "width": 5}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_the_processor_only_normalises_tiles(processor, tmp_path):
    image = picture(16, 24)
    image.save(tmp_path / "a.png")
    tensors = load_pixels(tmp_path / "a.png", processor, False, "white", Tiling(6, 8), (16, 24))
    scaled = np.asarray(image) / 255
    pixels = ((scaled - processor.image_mean) / processor.image_std).transpose(2, 0, 1)
    slices = [pixels[:, y : y + 8, x : x + 8] for y in (0, 8, 16) for x in (0, 8)]
    assert len(tensors) == 7 and tensors[-1].shape == (3, 8, 8)
    for tensor, expected in zip(tensors, slices, strict=False):
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)


def test_an_image_of_one_tile_is_as_without_tiles(processor, tmp_path):
    picture(10, 9).save(tmp_path / "a.png")
    (tile,) = load_pixels(tmp_path / "a.png", processor, True, "white", Tiling(12, 8), (10, 9))
    # Since transformers 5 the processor scales by torchvision, and not by Pillow as tiles are.
    by_pillow = not hasattr(transformers, "CLIPImageProcessorPil")
    (whole,) = load_pixels(tmp_path / "a.png", processor, True)
    torch.testing.assert_close(tile, whole, atol=0 if by_pillow else 0.03, rtol=0)


@pytest.fixture
def make(images, tokenizer, processor, write):
    """Makes a data set whose images are cut into up to 6 tiles of 8 x 8 pixels."""

    written = []

    def make_dataset(data, sample_format="caption", **settings):
        settings = {"image_tokens": 4, "skip_limit": 0, "max_tiles": 6, "tile_size": 8, **settings}
        folder = settings.pop("image_folder", images)
        if data not in written:  # the same file otherwise, untouched
            written[:] = [data, write(data)]
        return DPADataset(written[1], folder, tokenizer, processor, sample_format, **settings)

    return make_dataset


@pytest.fixture
def headers(monkeypatch):
    """The paths whose size is read from now on."""
    paths = []
    read = store.read_size

    def watched(path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(store, "read_size", watched)
    return paths


def test_several_images_and_none(make, chat, images, tokenizer):
    picture(9, 9).save(images / "small.png")
    data = [
        chat("a", "<image> or <image>?", "Cats", image=["wide.png", "small.png"]),
        chat("b", "Hi", "Hello"),
        chat("c", "<image>\nWhat?", "A", image="tall.png"),
    ]
    template = {"INSTRUCTION": "{input}", "SUFFIX": "</s>", "SUFFIX_AS_EOS": True}
    dataset = make(data, "chat", prompt_template=template)
    between, after, answer = (
        tokenizer.encode(text, add_special_tokens=False) for text in (" or ", "?", "Cats</s>")
    )
    # 30 x 20 pixels are 3 x 2 tiles and a thumbnail, 9 x 9 are one tile; 4 tokens each.
    prompt = [tokenizer.bos_token_id, *[-200] * 28, *between, *[-200] * 4, *after]
    samples = [dataset[i] for i in range(3)]
    assert samples[0]["input_ids"].tolist() == prompt + answer
    assert samples[0]["labels"].tolist() == [-100] * len(prompt) + answer
    assert [len(sample["pixel_values"]) for sample in samples] == [8, 0, 7]
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert dataset.modality_length == [lengths[0], -lengths[1], lengths[2]]
    assert dataset.length == lengths
    assert dataset.text_length == [lengths[0] - 32 + 2, lengths[1], lengths[2] - 28 + 1]
    batch = collate(samples)["data"]
    assert batch["pixel_values"].shape == (15, 3, 8, 8)
    assert batch["image_mask"].sum(1).tolist() == [32, 0, 28]
    assert torch.equal(batch["pixel_values"][8:], torch.stack(samples[2]["pixel_values"]))
    for i, sample in enumerate(samples):
        del sample["pixel_values"]
        text = dataset.text(i)
        assert text.keys() == sample.keys()
        assert all(np.array_equal(text[key], sample[key]) for key in text)
    sampler = GroupedSampler(dataset, 1, "modality_length")
    assert next(iter(sampler)) == 0  # the longest first


def test_the_text_format_opens_no_image(make, caption, headers):
    data = [caption("a", image="none.png"), caption("b")]
    text = make(data, "caption_text", image_folder=None)
    assert len(text) == 2 and not headers
    assert text.cache_key == make(data, "caption_text", max_tiles=1).cache_key


def test_max_length_counts_tiles(make, caption):
    full = make([caption("a", "A red balloon.")])
    (length,) = full.length
    cut_off = make([caption("a", "A red balloon.")], max_length=length - 1)
    assert cut_off.length == [length - 1] == [len(cut_off[0]["input_ids"])]
    assert cut_off.stores[0].arrays["truncated"].all() and len(cut_off[0]["pixel_values"]) == 7
    with pytest.raises(
        DPAError, match=r"image cut off: 1 image\(s\) in 7 tiles of 4 tokens .* max_length 28"
    ):
        make([caption("a", "A red balloon.")], max_length=28)


def test_sizes_are_read_once(make, caption, headers, images):
    data = [caption(str(i)) for i in range(5)]
    first = make(data)
    assert headers == [str(images / "wide.png")] * 5
    second = make(data)
    assert len(headers) == 5 and second[3]["input_ids"].tolist() == first[3]["input_ids"].tolist()
    make(data, max_tiles=1)
    assert len(headers) == 5
    make(data, max_tiles=5)
    make(data, tile_size=16)
    assert len(headers) == 15
    elsewhere = images.rename(images.with_name("elsewhere"))
    make(data, image_folder=elsewhere)
    assert headers[15:] == [str(elsewhere / "wide.png")] * 5
    make(data, image_folder=elsewhere, max_tiles=1)
    assert len(headers) == 20


def test_headers_are_read_side_by_side(make, caption, monkeypatch):
    together = threading.Barrier(4, timeout=20)
    read = store.read_size

    def wait(path):
        together.wait()
        return read(path)

    monkeypatch.setattr(store, "read_size", wait)
    assert len(make([caption(str(i)) for i in range(8)])) == 8


def test_images_without_a_size_are_problems_until_they_are_mended(make, caption, images, headers):
    names = {"gone": "none.png", "void": "empty.png", "good": "wide.png"}
    data = [caption(key, image=name) for key, name in names.items()]
    dataset = make(data, skip_limit=0.7)
    assert {p.record_id: p.kind for p in dataset.problems} == {
        "gone": "missing image",
        "void": "broken image",
    }
    assert len(dataset) == 1 and dataset.records == 3
    report = check_dataset(dataset)
    assert "1  missing image: gone" in str(report) and not report.ok
    with pytest.raises(DPAError, match=r"2 of 3 records(?s:.)*none\.png"):
        make(data)
    headers.clear()
    make(data, skip_limit=0.7)
    assert sorted(headers) == sorted(str(images / name) for name in ("none.png", "empty.png"))
    picture(8, 16).save(images / "none.png")
    mended = make(data, skip_limit=0.7)
    assert [p.record_id for p in mended.problems] == ["void"] and len(mended) == 2
    assert mended[0]["id"] == "gone" and len(mended[0]["pixel_values"]) == 3


def test_a_bad_image_behind_a_good_header_is_skipped(make, caption, images):
    data = [
        caption("half", image="broken.png"),
        caption("shrunk"),
        caption("good", image="tall.png"),
    ]
    dataset = make(data)
    assert len(dataset) == 3
    picture(15, 10).save(images / "wide.png")
    half, shrunk, _ = (dataset[i] for i in range(3))
    assert isinstance(half, Problem) and half.reason.startswith("broken image")
    assert isinstance(shrunk, Problem)
    assert shrunk.reason == f"changed image: {images / 'wide.png'} (15, 10), was (30, 20)"
    assert {p.record_id for p in check_dataset(dataset).problems} == {"half", "shrunk"}


def test_a_huge_image_has_a_size_but_no_pixels(processor, tmp_path):
    Image.new("1", (60_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(ImageProblem, match="image out of shape"):
        load_pixels(tmp_path / "long.png", processor, True, "white", Tiling(6, 8), (60_000, 1))


def test_encoding_tells_what_decides_the_counts(make, caption, images):
    data = [caption(str(i)) for i in range(4)]
    base = make(data).cache_key
    assert (base["max_tiles"], base["tile_size"]) == (6, 8)
    assert make(data).cache_key == base
    for change in ({"max_tiles": 5}, {"tile_size": 16}, {"share": 0.5}, {"held_out": 1}):
        (name,) = change
        changed = make(data, **change).cache_key
        assert changed[name] == change[name] != base[name]
    other = images.with_name("other")
    other.mkdir()
    picture(9, 9).save(other / "wide.png")
    assert make(data, image_folder=other).cache_key["chosen"] != base["chosen"]
