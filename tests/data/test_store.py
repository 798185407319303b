"""The tokenised store: when it is built, read, rebuilt and trusted."""

import functools
import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from dpa_xtuner import files
from dpa_xtuner.data import store
from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.formats import parse_record
from dpa_xtuner.data.problems import Problem, enforce_skip_limit, list_problems
from dpa_xtuner.data.store import open_store
from dpa_xtuner.errors import DPAError

FORK = multiprocessing.get_context("fork")


def encoder(tokenizer, sample_format="caption", image_tokens=4, template=None, max_length=64):
    return RecordTokenizer(tokenizer, sample_format, image_tokens, template, max_length)


@pytest.fixture
def built(monkeypatch):
    """Counts the builds of this process."""
    folders = []
    build = store._write

    def watched(*args):
        folders.append(args[-1])
        return build(*args)

    monkeypatch.setattr(store, "_write", watched)
    return folders


@pytest.fixture
def data(write, caption):
    return write([caption(f"r{i}", "A red balloon. " * i) for i in range(1, 30)])


def test_a_store_holds_what_the_encoder_says(data, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 1000)
    found = open_store(data, encoder(tokenizer))
    assert len(found) == 29 and found.records == 29
    for i, record in enumerate(json.loads(data.read_text())):
        alone = encoder(tokenizer)([parse_record(record, i)])
        tokens, supervised = found.tokens(i)
        assert tokens.tolist() == alone.tokens.tolist()
        assert supervised.tolist() == alone.supervised.tolist()
        assert found.names(i) == (record["id"], ["wide.png"], [])
        assert found.arrays["lengths"][i] == alone.lengths[0]
        assert found.arrays["truncated"][i] == alone.truncated[0]
    assert 0 < found.arrays["truncated"].sum() < 29


def test_records_are_counted_without_a_progress_bar(data, tokenizer, monkeypatch):
    # As TQDM_DISABLE does, which tqdm reads when it is imported.
    monkeypatch.setattr(store, "tqdm", functools.partial(store.tqdm, disable=True))
    assert open_store(data, encoder(tokenizer)).records == 29


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(store, "print_log", lambda line, logger: lines.append(line))
    return lines


def test_a_process_builds_a_store_and_says_so_once(data, tokenizer, built, lines):
    first, second = (open_store(data, encoder(tokenizer)) for _ in range(2))
    assert len(built) == 1 and first.folder == second.folder
    cut = int(first.arrays["truncated"].sum())
    (line,) = lines
    assert line.startswith(f"built 29 samples from 29 records ({cut} truncated; left out: none)")


def test_the_second_start_reads_and_says_so_once(data, tokenizer, built, lines):
    first_start = FORK.Process(target=open_store, args=(data, encoder(tokenizer)))
    first_start.start()
    first_start.join()
    for _ in range(2):
        open_store(data, encoder(tokenizer))
    (line,) = lines
    assert not built and line.startswith("read 29 samples")


def test_arrays_are_mapped_and_left_behind_when_pickled(data, tokenizer):
    found = open_store(data, encoder(tokenizer))
    assert all(isinstance(array, np.memmap) for array in found.arrays.values())
    with pytest.raises(ValueError, match="read-only"):
        found.tokens(0)[0][0] = 1
    copied = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 1000 and isinstance(copied.tokens(3)[0], np.memmap)
    assert copied.tokens(3)[0].tolist() == found.tokens(3)[0].tolist()


def test_a_change_of_anything_that_counts_builds_anew(
    data, tokenizer, make_tokenizer, built, write, caption
):
    def start(expected, **changes):
        open_store(data, encoder(changes.pop("tokenizer", tokenizer), **changes))
        assert len(built) == expected

    start(1)
    start(2, max_length=63)
    start(3, image_tokens=5)
    start(4, sample_format="caption_text")
    start(5, sample_format="chat", template="qwen_chat")
    start(6, sample_format="chat", template="llama3_chat")
    start(6, sample_format="caption", template="llama3_chat")  # which a caption does not use
    start(7, tokenizer=make_tokenizer(adds_bos=False))
    larger = make_tokenizer()
    larger.add_tokens(["balloon"])
    start(8, tokenizer=larger)
    stat = data.stat()
    data.write_text(data.read_text().replace("red", "sad"))  # the same size
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    start(9)
    write([caption("new")])
    start(10)
    assert len(open_store(data, encoder(tokenizer))) == 1
    assert len(set(built)) == 10


def test_a_tokenizer_is_known_by_what_it_does(tokenizer, tmp_path):
    key = encoder(tokenizer).cache_key()
    tokenizer.pad_token = "</s>"
    tokenizer(["cat", "two cats"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    moved = type(tokenizer).from_pretrained(tmp_path / "elsewhere")
    assert encoder(tokenizer).cache_key() == encoder(moved).cache_key() == key


def test_slow_tokenizers_have_a_key_too(bpe_folder, tmp_path):
    from transformers import GPT2Tokenizer

    def key():
        files = str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
        return encoder(GPT2Tokenizer(*files, unk_token="</s>")).cache_key()

    before = key()
    assert key() == before
    merges = (bpe_folder / "merges.txt").read_text().splitlines()
    (bpe_folder / "merges.txt").write_text("\n".join(merges[:-1]) + "\n")
    assert key() != before


def test_any_number_of_processes_gives_the_same_store(write, caption, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as XTuner sets it
    tokenizer(["a", "b"] * 50)  # starts the threads
    data = [caption(f"r{i}", "A red </s> balloon. " * (i % 30)) for i in range(300)]
    path = write([*data, {**caption("bad"), "image": 3}])
    found = {}
    for processes in (1, 3):
        monkeypatch.setenv("DPA_CACHE", str(path.parent / str(processes)))
        folder = open_store(path, encoder(tokenizer), num_proc=processes).folder
        found[processes] = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert found[1] == found[3] and len(found[1]) == 9


def test_what_fails_in_another_process_is_told(write, caption, tokenizer):
    path = write([caption(f"r{i}") for i in range(30)])
    with pytest.raises(DPAError, match="image_tokens is 0"):
        open_store(path, encoder(tokenizer, image_tokens=0), num_proc=2)


def test_a_process_that_is_killed_is_told(data, tokenizer, monkeypatch):
    def die(self, items):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(RecordTokenizer, "__call__", die)
    with pytest.raises(DPAError, match=r"was killed.*lower num_proc=2"):
        open_store(data, encoder(tokenizer), num_proc=2)


def test_two_processes_at_once_build_once(data, tokenizer, tmp_path, monkeypatch):
    build = store._write

    def slow(*args):
        with (tmp_path / "builds").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return build(*args)

    def start(queue):
        queue.put(len(open_store(data, encoder(tokenizer))))

    monkeypatch.setattr(store, "_write", slow)
    queue = FORK.Queue()
    processes = [FORK.Process(target=start, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [29] * 3
    for process in processes:
        process.join()
    assert (tmp_path / "builds").read_text() == "x"


@pytest.mark.parametrize(
    ("module", "step"),
    [(store, "_columns"), (store, "write_json"), (files.os, "replace")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_killed_build_is_never_trusted(data, tokenizer, built, module, step):
    def die():
        setattr(module, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        open_store(data, encoder(tokenizer))

    process = FORK.Process(target=die)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    root = store.cache_root() / "tokens"
    assert len(list(root.glob(".*.partial"))) == 1
    assert len(open_store(data, encoder(tokenizer))) == 29
    assert len(built) == 1 and not list(root.glob(".*.partial"))


@pytest.mark.parametrize("name", ["tokens.npy", "counts.npy", "meta.json"])
def test_a_damaged_store_is_built_again(data, tokenizer, built, name):
    folder = open_store(data, encoder(tokenizer)).folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-8])
    open_store(data, encoder(tokenizer))
    assert len(built) == 2 and (folder / name).read_bytes() == whole


def test_data_that_change_during_the_build_are_refused(data, tokenizer, monkeypatch):
    columns = store._columns

    def meanwhile(encoded):
        os.utime(data, (1, 1))
        return columns(encoded)

    monkeypatch.setattr(store, "_columns", meanwhile)
    with pytest.raises(DPAError, match="changed while it was read"):
        open_store(data, encoder(tokenizer))
    assert [path.suffix for path in (store.cache_root() / "tokens").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(data, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DPAError, match="set DPA_CACHE"):
        open_store(data, encoder(tokenizer))


def test_problems_are_kept_and_counted(write, caption, tokenizer):
    bad = {**caption("bad"), "image": 3}
    blank = caption("blank", "")
    path = write([bad, caption("good"), blank, caption("long", prompt="<image>" * 2)])
    for _ in range(2):
        found = open_store(path, encoder(tokenizer))
        assert {p.record_id: p.kind for p in found.problems} == {
            "bad": "malformed image",
            "blank": "empty caption",
            "long": "wrong number of <image>",
        }
        assert len(found) == 1 and found.records == 4
    with pytest.raises(DPAError) as error:
        enforce_skip_limit(found.problems, 4, 0.7, ["data.json"])
    assert "3 of 4 records" in str(error.value) and "1  empty caption: blank" in str(error.value)
    enforce_skip_limit(found.problems, 4, 0.75, ["data.json"])


def test_the_list_of_problems_is_short():
    problems = [Problem(str(i), f"missing image: {i}.png") for i in range(12)]
    text = list_problems([*problems, Problem("x", "empty caption")])
    assert text.splitlines() == [
        "      12  missing image: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...",
        "          first: missing image: 0.png",
        "       1  empty caption: x",
    ]
