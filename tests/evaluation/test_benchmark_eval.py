"""The benchmark of evaluation: its plain loop answers what the wrapper answers."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
from support.tiny_folder import picture

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "benchmarks" / "benchmark_eval.py"


@pytest.fixture
def tool():
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
