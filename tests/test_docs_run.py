"""The code of README.md and docs/ runs: word for word, on tiny models in place of large ones."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmengine.config import Config, DictAction
from PIL import Image
from support import documented, encoder_folders, harness, run_eval, runs, tiny_folder
from support.documented import ROOT, Command

from dpa_xtuner.data.formats import parse_record
from dpa_xtuner.data.records import Record
from dpa_xtuner.stages.settings import config_from_file, read_settings

pytestmark = pytest.mark.slow

# What is not run here, by the first words that fit, and why. Shell syntax is checked of all.
NOT_RUN = {
    "make install": "installs, from the network",
    "source": "needs what `make install` makes",
    "pip": "installs, from the network",
    "python -m dpa_xtuner.compat": "changes the installed XTuner; tests/test_compat.py",
    "python -m dpa_xtuner.check": "tests/test_check.py",
    "make demo": "ten minutes; tests/demo",
    "python -m dpa_xtuner.demo prepare": "needs the demo's packages; tests/demo",
    "python -m studies.report": "tests/studies",
    "python tools/get_benchmarks.py": "downloads; tests/evaluation/test_get_benchmarks.py",
    "NPROC_PER_NODE=8": "needs 8 GPUs",
    "NNODES=2": "needs two machines",
    "srun": "needs slurm; tests/test_launchers.py",
    "export": "the folders of one's own data",
    "DPA_REHEARSE=1 xtuner train": "a minute; tests/test_configs.py rehearses all configs",
    "xtuner train": "needs GPUs; its settings are read here",
    "python benchmarks/": "measures for minutes; tests/benchmarks",
}
# What is added to a command, so that it takes less time.
SHORTENED = {"tools/conflict.py": ["--steps", "4"]}
# What a command leaves, below the folder that it runs in.
RUN = "work_dirs/dpa_internlm2_7b"
WRITTEN = {
    "--html samples.html": "samples.html",
    "--report problems.jsonl": "problems.jsonl",
    "show_relevance.py work_dirs/RUN": f"{RUN}/tune/relevance.html",
    "show_relevance.py work_dirs/RUN --stage align": f"{RUN}/align/relevance.html",
    "plot_run.py": "curves.png",
    "conflict.py": "work_dirs/dpa_internlm2_7b/conflict/conflict.json",
    "export.py": f"{RUN}/tune/hf/model.safetensors",
    "eval.py": "work_dirs/eval",
}
QUICK_START = "quickstart.md"
ALL = [command for command in documented.commands() if command.page != QUICK_START]


def reason(command: Command) -> str | None:
    lines = (str(command), command.line, " ".join(command.words))
    return next((key for key in NOT_RUN if any(line.startswith(key) for line in lines)), None)


HERE = [command for command in ALL if reason(command) is None]


def test_nothing_is_left_out_for_a_reason_that_is_gone():
    every = documented.commands()
    assert {reason(command) for command in every} - {None} == set(NOT_RUN)
    assert len(HERE) > 10


def test_all_shell_code_is_shell_code():
    for page, block in documented.blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: {done.stderr}"


@pytest.mark.parametrize(
    "command", [c for c in documented.commands() if " xtuner train " in f" {c.line}"], ids=str
)
def test_the_settings_of_a_training_are_read(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in command.words if "=" not in word or "." in word]
    path, options = words[2], [word for word in words[3:] if "=" in word]
    if path == "CONFIG":
        return
    given = {o.partition("=")[0]: DictAction._parse_iterable(o.partition("=")[2]) for o in options}
    read_settings(config_from_file(Path(path), given))


def test_configs_of_the_pages_are_read(tmp_path):
    (tmp_path / "_base_").symlink_to(ROOT / "configs/_base_")
    shown = [(p, b) for p, b in documented.blocks("python") if b.startswith("_base_")]
    assert {page.name for page, _ in shown} == {"README.md", "training.md"}
    for _, block in shown:
        (tmp_path / "my.py").write_text(block)
        assert read_settings(Config.fromfile(tmp_path / "my.py")).family == "qwen2_5"


def records() -> list[dict]:
    """The records that README.md and docs/data.md show."""
    found = []
    for _, block in documented.blocks("json"):
        decoder, rest = json.JSONDecoder(), block.strip()
        while rest:
            record, end = decoder.raw_decode(rest)
            found.append(record)
            rest = rest[end:].strip()
    return found


def test_the_records_of_the_pages_are_read():
    shown = records()
    assert len(shown) >= 6
    for record in shown:
        pictures = record.get("images") or []
        if pictures and isinstance(pictures[0], dict):  # inside a Parquet file
            continue
        assert isinstance(parse_record(record, 0), Record), record


@pytest.fixture(scope="module")
def checkout(tiny, reference, tmp_path_factory) -> Path:
    """A folder as the pages' reader has it: tools, configs, a finished run, data, pictures.

    The configs that the pages name are the tests' tiny one.
    """
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tools", folder / "tools")
    (folder / "configs").mkdir()
    finished = reference(harness.Layout())
    base = f"_base_ = [{str(harness.TINY_CONFIG)!r}]\n"
    for name in (
        "dpa_internlm2_7b",
        "vanilla_internlm2_7b",
        "dpa_qwen2_5_1_5b",
        "dpa_smollm2_135m_openmoji",
    ):
        (folder / "configs" / f"{name}.py").write_text(
            base + "proxy = dict(lora=dict(lora_dropout=0.0))\n"
            "tune = dict(train_llm='full', lora=dict(lora_dropout=0.0))\n"
        )
    shutil.copytree(finished.work_dir, folder / RUN)
    for other in ("RUN", "another_run", "dpa_smollm2_135m_openmoji", "vanilla_internlm2_7b"):
        (folder / "work_dirs" / other).symlink_to(folder / RUN)
    last = sorted((folder / RUN / "align").glob("iter_*.pth"))[-1]
    last.with_name("iter_400.pth").symlink_to(last)
    for name in ("MODEL_A", "MODEL_B"):
        (folder / name).symlink_to(tiny / "llm")
    for name in ("plain.json", "ornate.json"):
        shutil.copy(tiny / "captions.json", folder / name)
    runs.write_image(folder / "picture.jpg")
    write_the_pages_data(folder)
    for name in ("another_llava", "llava-1.5-7b-hf"):
        tiny_folder.write_folder(folder / "path/to" / name)
    for dataset in ("AI2D_TEST", "MMVP"):
        tiny_folder.write_data(folder / "benchmarks", dataset, tiny_folder.rows(dataset, 4))
    asked = {"query": "Ice is", "choices": ["cold.", "hot.", "blue.", "far."], "gold": 0}
    hellaswag = folder / "benchmarks/hellaswag/hellaswag.jsonl"
    hellaswag.parent.mkdir()
    hellaswag.write_text(json.dumps(asked) + "\n")
    (folder / "cache").mkdir()
    return folder


def write_the_pages_data(folder: Path) -> None:
    """The files that docs/data.md names, of the records that it shows."""
    (folder / "pictures").mkdir()
    runs.write_image(folder / "pictures" / "a.jpg")
    ((_, table),) = [(p, b) for p, b in documented.blocks("text") if b.startswith("file_name")]
    assert next(csv.DictReader(io.StringIO(table)))["text"] == "A cat sleeps on a bench."
    (folder / "captions.csv").write_text(table)
    talks = [record for record in records() if "messages" in record]
    assert len(talks) == 2
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    ((row,)) = [record for record in records() if "texts" in record]
    row["images"][0]["bytes"] = (folder / "pictures" / "a.jpg").read_bytes()
    (folder / "cauldron").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), folder / "cauldron" / "train.parquet")


def run_here(words: list[str], folder: Path, stdin: str = "") -> harness.Processes:
    """Do what ``python ...`` does, in a forked process that has imported XTuner already."""

    def body() -> None:
        os.chdir(folder)
        os.environ.update(LMUData=str(folder / "benchmarks"))
        for name in ("_configs", "_processes"):
            sys.modules.pop(name, None)  # other tests import those of the repository
        sys.stdin, sys.argv = io.StringIO(stdin), words[1:]
        sys.path.insert(0, str((folder / words[1]).resolve().parent))
        if words[1].endswith("eval.py"):
            run_eval.accept_any_file()
        runpy.run_path(words[1], run_name="__main__")

    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    return harness.Processes([body], logs / f"{len(list(logs.iterdir()))}.log")


@pytest.mark.parametrize("command", HERE, ids=str)
def test_a_command_runs(command, checkout, monkeypatch):
    words = ["dpa_internlm2_7b" if word == "CONFIG" else word for word in command.words]
    left = [file for key, file in WRITTEN.items() if f"{key} " in f"{command.line} "]
    for file in left:
        path = checkout / file
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if "--web" in words:
        serve(words, checkout)
    elif words[0] == "python":
        stdin = "What is it?\n" if "chat.py" in command.line and "--prompt" not in words else ""
        running = run_here([*words, *SHORTENED.get(words[1], [])], checkout, stdin)
        code = running.wait()
        output = running.log.read_text()
        assert code == 0 and "Traceback" not in output, output[-3000:]
    else:
        monkeypatch.setenv("DPA_CACHE", str(checkout / "cache"))
        subprocess.run(["bash", "-ec", command.line], cwd=checkout, check=True)
        assert not (checkout / "cache").exists()
    for file in left[-1:]:
        assert (checkout / file).exists(), file


def serve(words: list[str], folder: Path) -> None:
    """Start what serves a page, read the page, and end it."""
    port = str(harness.free_port())
    running = run_here([*words, "--port", port], folder)
    try:
        for _ in range(600):
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).read()
                break
            except OSError:
                assert running.alive(), running.log.read_text()[-3000:]
                time.sleep(0.1)
        assert b"<html" in page
    finally:
        running.kill()


def test_the_quick_start_runs_as_it_stands(pieces, tmp_path):
    """On tiny models in place of those that the demo prepares."""
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    models = tmp_path / "data/models"
    runs.write_llm(models / "smollm2-135m-instruct", pieces, "smollm2")
    encoder_folders.clip(models / "openmoji-vit")
    files = documented.files(QUICK_START)
    assert sorted(files) == ["my_first.py", "my_pictures.py"]
    for name, block in files.items():
        (tmp_path / name).write_text(block)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    asked = [c.words for c in documented.commands() if c.page == QUICK_START and not reason(c)]
    assert [words[1] for words in asked] == [
        "my_pictures.py", "tools/check_data.py", "tools/train.py", "tools/chat.py",
        "tools/export.py",
    ]  # fmt: skip
    for words in asked:
        if words[1] == "tools/train.py":  # which becomes the process of one stage after the other
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-3000:]
            the_log_is_readable(done.stdout)
        else:
            running = run_here(words, tmp_path)
            assert running.wait() == 0, running.log.read_text()[-3000:]
    assert len(Image.open(tmp_path / "my_data/images/circle.png").getcolors()) > 1
    assert (tmp_path / "work_dirs/my_first/tune/hf/README.md").is_file()
    assert "Wrote" in running.log.read_text()
    stages = [json.loads(f.read_text()) for f in tmp_path.glob("work_dirs/my_first/*/stage.json")]
    assert [stage["status"] for stage in stages] == ["finished"] * 3


def the_log_is_readable(output: str) -> None:
    """A line for each interval with the time left, nothing three times, no notes of packages."""
    intervals = re.findall(r"Iter\(train\) *\[ *(\d+)/(\d+)\].* eta: \d:\d\d:\d\d ", output)
    assert intervals == [
        (str(step), end) for end in ("5", "10", "20") for step in (1, *range(5, int(end) + 1, 5))
    ]
    said = re.findall(r" - mmengine - \w+ - (.*)", output)
    assert {line: n for line, n in Counter(said).items() if n > 2} == {}
    for note in ("Using env variable", "bitsandbytes", "accelerator", "Hooks will"):
        assert note not in output
