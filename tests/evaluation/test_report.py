"""The table, by hand."""

import csv
import json
from dataclasses import replace

import pytest

from dpa_xtuner.evaluation import report
from dpa_xtuner.evaluation.benchmarks import BENCHMARKS, PAPER, find_benchmarks
from dpa_xtuner.evaluation.evaluate import result_of
from dpa_xtuner.evaluation.folder import run_of_export
from dpa_xtuner.evaluation.report import Report, Result

FIRST = dict(zip(PAPER, (60.0, 50.0, 20.0, 30.0, 40.0, 10.0, 70.0), strict=True))
SECOND = dict(zip(PAPER, (62.0, 50.0, 21.0, 35.0, 40.0, 12.5, 65.5), strict=True))


def made(limit=None, names=PAPER, **changed) -> Report:
    models = {
        label: {name: Result(scores[name], 100) for name in names}
        for label, scores in (("vanilla", FIRST), ("dpa", SECOND))
    }
    for name, result in changed.items():
        models["dpa"][name] = result
    return Report(models, find_benchmarks(names), limit)


def cells(text, row):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_columns_means_and_differences():
    text = report.report_markdown(made())
    assert cells(text, "vanilla") == [
        "60.0", "50.0", "20.0", "30.0", "40.0", "40.0", "10.0", "70.0", "40.0", "40.0",
    ]  # fmt: skip
    header = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")][1:]
    assert header == [
        "MMBench", "AI2D", "DocVQA", "OCRBench", "general (4)",
        "CV-Bench", "MMVP", "NaturalBench", "vision-centric (3)", "all (7)",
    ]  # fmt: skip
    assert cells(text, "dpa")[-1] == f"{286 / 7:.1f}"
    assert cells(text, "difference") == [
        "+2.0", "+0.0", "+1.0", "+5.0", "+2.0", "+0.0", "+2.5", "-4.5", "-0.7", "+0.9",
    ]  # fmt: skip


def test_papers_rows_only_beside_the_papers_benchmarks():
    text = report.report_markdown(made())
    assert cells(text, "paper: Qwen2.5-7B, DPA")[-1] == "51.7"
    assert cells(text, "paper: Llama-3.1-8B, CAL")[-1] == "46.0"
    assert cells(text, "paper: Gemma-2-9B, vanilla") == [""] * 9 + ["48.2"]
    for other in (made(limit=100), made(names=PAPER[1:]), replace(made(), other_files=["one"])):
        assert "paper" not in report.report_markdown(other)
    assert "At most 100 questions or groups" in report.report_markdown(made(limit=100))


def test_chance_where_all_columns_have_one():
    known = [
        replace(b, chance=c) for b, c in zip(find_benchmarks(PAPER[:2]), (25, 30), strict=True)
    ]
    for benchmarks, row in ((known, ["25.0", "30.0", "27.5"]), (find_benchmarks(PAPER[:2]), None)):
        text = report.report_markdown(replace(made(names=PAPER[:2]), benchmarks=benchmarks))
        assert (cells(text, "chance") if "chance" in text else None) == row


def test_one_kind_and_one_benchmark_have_no_means_to_tell():
    header = report.report_markdown(made(names=["mmvp"])).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["", "MMVP"]
    header = report.report_markdown(made(names=["ai2d", "mmbench"])).splitlines()[0]
    assert "general (2)" in header and "all" not in header


def test_samples_failures_and_judges_are_told():
    failed = [{"dataset": "MMVP", "index": 7, "reason": "broken | picture"}]
    text = report.report_markdown(made(mmvp=Result(12.5, 100, failed)))
    assert cells(text, "MMVP") == ["100", "exact matching", "0", "1"]
    assert cells(text, "DocVQA") == ["100", report.OWN_METRIC, "0", "0"]
    assert "- Sample without an answer: dpa, MMVP 7: broken | picture" in text
    assert "No judge model is asked" in text
    assert "judge" not in report.report_markdown(made(names=["docvqa"]))


def test_many_failed_samples_are_listed_in_json_alone():
    failed = [{"dataset": "MMVP", "index": i, "reason": "broken"} for i in range(50)]
    text = report.report_markdown(made(mmvp=Result(12.5, 100, failed)))
    assert text.count("Sample without an answer") == report.LISTED
    assert "- 30 more of them are listed in the JSON: dpa, mmvp" in text


def test_a_failed_task_has_no_score_and_no_mean():
    broken = made(mmvp=Result(None, error="failed, see logs/x.out"))
    assert broken.failures() == ["dpa, mmvp: failed, see logs/x.out"]
    text = report.report_markdown(broken)
    assert cells(text, "dpa")[-4:] == ["failed", "65.5", "failed", "failed"]
    assert cells(text, "difference")[-4:] == ["", "-4.5", "", ""]
    assert "- Failed: dpa, mmvp: failed, see logs/x.out" in text


def test_a_data_set_without_any_answer_is_a_failure():
    """Though the benchmark has another data set, all of whose samples were answered."""

    def left(samples, failed):
        failed = [{"index": i, "reason": "no picture"} for i in range(failed)]
        return {"score": 0.0, "samples": samples, "failed": failed, "metrics": {}, "details": []}

    (cvbench,) = find_benchmarks(["cvbench"])
    found = result_of(cvbench, {"CV-Bench-2D": left(2, 2), "CV-Bench-3D": left(4, 1)})
    assert found.samples == 6 and len(found.failed) == 3 and found.score == 0.0
    line = "dpa, cvbench: no sample of CV-Bench-2D could be answered (no picture)"
    assert Report({"dpa": {"cvbench": found}}, [cvbench]).failures() == [line]


def test_files(tmp_path):
    failed = [{"dataset": "MMVP", "index": 7, "reason": "broken"}]
    text = report.save_report(made(limit=100, mmvp=Result(12.5, 100, failed)), tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    with (tmp_path / "table.csv").open() as file:
        lines = {(line["model"], line["benchmark"]): line for line in csv.DictReader(file)}
    assert len(lines) == 2 * 10
    found = lines["dpa", "mmvp"]
    assert float(found["score"]) == 12.5 and float(found["difference"]) == 2.5
    assert (found["samples"], found["failed"], found["limit"]) == ("100", "1", "100")
    assert found["scored_by"] == "exact matching"
    assert lines["vanilla", "mmvp"]["difference"] == ""
    assert float(lines["dpa", "all (7)"]["difference"]) == pytest.approx(6 / 7)
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["results"]["dpa"]["mmvp"]["failed"] == failed
    assert content["rows"][0]["score"] == 60.0 and content["limit"] == 100
    assert "paper_means" not in content
    report.save_report(made(), tmp_path)
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["paper_means"]["Qwen2.5-7B"] == {"vanilla": 49.0, "CAL": 51.0, "DPA": 51.7}


def test_titles_fit_a_markdown_table():
    assert not any("|" in benchmark.title for benchmark in BENCHMARKS.values())


def test_a_runs_scores_are_where_a_sweep_looks_for_them(tmp_path):
    (tmp_path / "run/tune/hf").mkdir(parents=True)
    (tmp_path / "run/tune/stage.json").write_text("{}")
    (tmp_path / "foreign/hf").mkdir(parents=True)
    (tmp_path / "run/align").mkdir()
    (tmp_path / "run/align/stage.json").write_text("{}")
    (tmp_path / "run/align/hf").symlink_to(tmp_path / "foreign/hf")  # on a larger disk
    assert run_of_export(tmp_path / "run/align/hf") == tmp_path / "run"
    assert run_of_export(tmp_path / "foreign/hf") is None
    found = made(mmvp=Result(None, error="log"))
    found.sources.update(
        dpa={"folder": str(tmp_path / "run/tune/hf"), "abbr": "dpa-1"},
        vanilla={"folder": str(tmp_path / "foreign/hf"), "abbr": "vanilla-1"},
    )
    report.save_beside_runs(found)
    (written,) = tmp_path.rglob("scores.json")
    assert written == tmp_path / "run/scores.json"
    expected = {name: score for name, score in SECOND.items() if name != "mmvp"}
    assert json.loads(written.read_text()) == {"model": "dpa-1", **expected}

    def again(abbr, **results):
        found = report.Report({"dpa": results}, [])
        found.sources["dpa"] = {"folder": str(tmp_path / "run/tune/hf"), "abbr": abbr}
        report.save_beside_runs(found)
        return json.loads(written.read_text())

    # Other benchmarks of the same model stay, a new model's begin anew.
    assert again("dpa-1", mmvp=Result(31.0, 2)) == {"model": "dpa-1", **expected, "mmvp": 31.0}
    assert again("dpa-2", mmvp=Result(32.0, 2)) == {"model": "dpa-2", "mmvp": 32.0}
