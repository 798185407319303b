"""Which samples an epoch is made of: held-out ones, a share, several files with weights."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from dpa_xtuner.data import DPADataset, Problem, check_dataset
from dpa_xtuner.data.mixture import choose
from dpa_xtuner.errors import DPAError


def whole(*sizes):
    """Files all of whose records are usable."""
    return [np.arange(n, dtype=np.int32) for n in sizes], list(sizes)


def rows(*sizes, **settings):
    return choose(*whole(*sizes), **settings).tolist()


def test_all_is_taken_in_order():
    assert rows(7) == list(range(7)) and rows(3, 4) == list(range(7))


def test_shares_are_nested_exact_and_even():
    shares = [set(rows(300, 700, share=share, held_out=40)) for share in (0.01, 0.25, 0.5, 0.75, 1)]
    assert [len(share) for share in shares] == [10, 240, 480, 720, 960]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller < larger
    # Of 300 of 1000 records, half is 150; 5 standard deviations are about 60.
    assert 90 < len([row for row in shares[2] if row < 300]) < 210
    assert rows(300, 700, share=0.25, held_out=40) == sorted(shares[1])


@pytest.mark.parametrize("weights", [None, [1, 3]])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_held_out_samples_are_never_trained_on(share, weights):
    settings = {"held_out": 12, "share": share, "weights": weights}
    kept = rows(20, 60, split="held_out", **settings)
    assert len(kept) == 12 and kept == rows(20, 60, split="held_out", held_out=12)
    assert not set(kept) & set(rows(20, 60, **settings))


def test_formats_that_lack_records_agree_on_the_others():
    positions, records = whole(50, 30)
    everything = np.concatenate(positions)
    lacking = [np.delete(positions[0], [3, 4, 20]), positions[1]]
    names = [(0, p) for p in lacking[0]] + [(1, p) for p in lacking[1]]
    for settings in ({"share": 0.5, "held_out": 10}, {"split": "held_out", "held_out": 10}):
        full = choose(positions, records, **settings)
        full = {(int(row >= 50), int(everything[row])) for row in full}
        found = {names[row] for row in choose(lacking, records, **settings)}
        assert found == full - {(0, 3), (0, 4), (0, 20)}


def counts(found, *sizes):
    """How often each sample of each file is in an epoch."""
    times = np.bincount(found, minlength=sum(sizes))
    return [part.tolist() for part in np.split(times, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((10, 30), [1, 3], (10, 30)),
        ((10, 30), [1, 1], (20, 20)),
        ((10, 30), [3, 1], (30, 10)),
        ((10, 30), [0.3, 0.1], (30, 10)),
        ((4, 3, 3), [1, 1, 1], (4, 3, 3)),  # 3.33 each: the first gets what is left
        ((3, 3, 5), [1, 2, 3], (2, 4, 5)),  # 1.83, 3.67, 5.5 of 11: down to 1, 3, 5, two left
    ],
)
def test_weights_by_hand(sizes, weights, expected):
    found = rows(*sizes, weights=weights)
    assert len(found) == sum(sizes)
    for times, size, count in zip(counts(found, *sizes), sizes, expected, strict=True):
        assert sum(times) == count
        assert set(times) <= {count // size, -(-count // size)}  # as evenly as can be
    assert found == rows(*sizes, weights=weights)


def test_a_share_of_a_mixture_is_weighted_after_it_is_drawn():
    chosen = set(rows(40, 60, share=0.5))
    weighted = rows(40, 60, share=0.5, weights=[9, 1])
    assert len(weighted) == 50 and set(weighted) <= chosen
    assert sum(row < 40 for row in weighted) == 45


@pytest.fixture
def files(write, caption, tmp_path):
    """Two files, each with an image folder of its own, of one id and image name."""
    paths, folders = [], []
    for name, size, colour in (("first", 6, "red"), ("second", 12, "blue")):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (20, 10), colour).save(folder / "wide.png")
        data = [caption(str(i), "cats " * (i + 1)) for i in range(size)]
        paths.append(write(data, f"{name}.json"))
        folders.append(folder)
    return paths, folders


@pytest.fixture
def make(files, tokenizer, processor):
    """Makes a mixture of the two files."""

    def make_dataset(data_path=files[0], image_folder=files[1], **settings):
        settings = {"image_tokens": 4, "skip_limit": 0, **settings}
        return DPADataset(data_path, image_folder, tokenizer, processor, "caption", **settings)

    return make_dataset


@pytest.mark.parametrize("tiles", [1, 6])
def test_a_mixture_is_its_files_one_after_the_other(make, files, tiles):
    settings = {"max_tiles": tiles, "tile_size": 8}
    both = make(**settings)
    alone = [make(path, folder, **settings) for path, folder in zip(*files, strict=True)]
    expected = [
        (file, dataset, i)
        for file, dataset in zip(files[0], alone, strict=True)
        for i in range(len(dataset))
    ]
    assert len(both) == len(expected) == 18
    for index, (file, dataset, i) in enumerate(expected):
        ours, theirs = both[index], dataset[i]
        assert ours["index"] == index and ours["id"] == f"{file}: {theirs['id']}"
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert len(ours["pixel_values"]) == len(theirs["pixel_values"]) == (1 if tiles == 1 else 3)
        assert ours["pixel_values"][0].equal(theirs["pixel_values"][0])
    for name in ("length", "modality_length", "text_length"):
        assert getattr(both, name) == [x for dataset in alone for x in getattr(dataset, name)]
    assert both.records == 18


def test_a_weighted_epoch(make, files):
    dataset = make(weights=[2, 1], held_out=4)
    # 18 records, 4 of them held out; two thirds of 14 samples are 9.33.
    found = [dataset.text(i)["id"].partition(": ")[0] for i in range(len(dataset))]
    assert [found.count(str(path)) for path in files[0]] == [9, 5]
    kept = make(weights=[2, 1], held_out=4, split="held_out")
    ids = [{d.text(i)["id"] for i in range(len(d))} for d in (dataset, kept)]
    assert not ids[0] & ids[1] and len(kept) == 4
    assert len(dataset.distinct) == len(ids[0]) < len(dataset)
    lengths = [len(dataset.text(i)["input_ids"]) for i in range(len(dataset))]
    assert dataset.length == lengths
    assert dataset.cache_key["weights"] == [2, 1]
    assert json.loads(json.dumps(dataset.cache_key)) == dataset.cache_key
    assert dataset.cache_key["chosen"] != make(weights=[1, 1], held_out=4).cache_key["chosen"]


def test_a_start_says_what_an_epoch_is(make, files, monkeypatch):
    lines = []
    where = "dpa_xtuner.data.dataset.print_log"
    monkeypatch.setattr(where, lambda line, logger: lines.append(line))
    make(weights=[2, 1])
    first, second = files[0]
    assert lines == [
        f"train: 18 samples an epoch: 12 (6 different ones of 6) of {first}; 6 (6 different ones "
        f"of 12) of {second}"
    ]


def test_problems_name_their_file(make, files, write, caption):
    (first, second), _ = files
    write([caption("0", ""), caption("1", image="none.png")], "first.json")
    dataset = make(skip_limit=0.1)
    assert [problem.record_id for problem in dataset.problems] == [f"{first}: 0"]
    assert isinstance(dataset[0], Problem) and dataset[0].record_id == f"{first}: 1"
    report = check_dataset(make(skip_limit=0.1, weights=[10, 1]))
    # The only sample of the first file is there 12 times, and told once.
    assert {p.record_id for p in report.problems} == {f"{first}: 0", f"{first}: 1"}
    assert len(report.image_problems) == 1 and report.samples == report.checked == 2
    with pytest.raises(DPAError, match=r"1 of 14 records"):
        make()
    write([caption("0", "")], "second.json")
    with pytest.raises(DPAError, match=rf"data file {second} has no usable sample"):
        make(skip_limit=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.01}, "no usable sample is left .*share=0.01"),
        ({"weights": [1, 1000]}, "file 1 of 2 gives 0 of an epoch's 18 samples"),
    ],
)
def test_impossible_mixtures_are_answered(make, settings, message):
    with pytest.raises(DPAError, match=message):
        make(**settings)


def test_one_folder_may_serve_all_files_but_no_file_twice(make, files):
    (first, second), (folder, _) = files
    assert make(image_folder=folder)[17]["pixel_values"][0].equal(make()[0]["pixel_values"][0])
    with pytest.raises(DPAError, match="names a file twice"):
        make([first, second, first], folder)
