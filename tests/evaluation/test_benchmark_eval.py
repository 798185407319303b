"""The benchmark of evaluation: its plain loop answers what the wrapper answers."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_eval.py"
from support.tiny_folder import picture, rows, write_data, write_folder  # noqa: E402

OWN = """
from dpa_xtuner.evaluation.benchmarks import Benchmark, DataFile, register_benchmark
register_benchmark(Benchmark("own", "Own", "general", (DataFile("MMVP"),), group=2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setenv("DPA_WITHOUT_XTUNER", "")
    spec = importlib.util.spec_from_file_location("benchmark_eval", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_by_one_and_batches_give_the_same_answers(tool, folder, tmp_path):
    records = [{"conversations": [{"value": "no picture"}]}]
    for i in range(5):
        picture(i, size=(14, 9)).save(tmp_path / f"{i}.png")
        question = "<image>\nWhat is this" + ", or that" * i
        records.append({"image": f"{i}.png", "conversations": [{"value": question}]})
    (tmp_path / "questions.json").write_text(json.dumps(records))
    args = Namespace(
        folder=folder, questions=tmp_path / "questions.json", samples=4, batch_sizes=[1, 3],
        max_new_tokens=6, repeats=2, threads=1,
    )  # fmt: skip
    result = tool.measure(args)
    assert list(result["rows"]) == ["one by one", "batch 1", "batch 3"]
    assert all(row["same_answers"] == 4 for row in result["rows"].values())
    assert all(len(row["all_s"]) == 2 for row in result["rows"].values())
    assert result["rows"]["one by one"]["ratio"] == 1
    table = tool.throughput_table(result)
    assert "4 questions, 4 image tokens" in table and "4 of 4" in table


def test_imports_are_timed_without_those_that_they_bring_along(tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tool, "WATCHED", ("outer_package", "inner_package"))
    monkeypatch.setattr("builtins.__import__", __import__)  # put back at the end
    (tmp_path / "inner_package.py").write_text("import time; time.sleep(0.2)")
    (tmp_path / "outer_package.py").write_text(
        "import inner_package, time; time.sleep(0.1); import inner_package"
    )
    seconds = {}
    tool.watch_imports(seconds)
    exec("import outer_package")
    assert seconds["inner_package"] == pytest.approx(0.2, abs=0.08)
    assert seconds["outer_package"] == pytest.approx(0.1, abs=0.08)


def test_startup_is_split_into_parts(folder, tmp_path):
    write_data(tmp_path / "data", "MMVP", rows("MMVP", 4))
    (tmp_path / "own_benchmark.py").write_text(OWN)
    environment = os.environ | {"PYTHONPATH": f"{TOOL.parents[1]}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [
            sys.executable, TOOL, folder, "--startup", "--repeats", "1", "--out", tmp_path, "--",
            "--benchmarks", "own", "--import", "own_benchmark", "--data", tmp_path / "data",
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = json.loads((tmp_path / "benchmark_eval_startup.json").read_text())["seconds"]
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, rel=0.01)
    named = {f"import {package}" for package in ("torch", "transformers", "opencompass", "vlmeval")}
    assert named | {"model", "data", "first batch", "other"} <= set(seconds)
    assert all(taken > 0 for taken in seconds.values())
    assert "| total" in done.stdout
