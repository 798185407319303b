"""A sweep's runs, its table, and how it goes on after a failure and a restart."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import harness

from dpa_xtuner.errors import DPAError
from dpa_xtuner.planning import sweep

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "tools/sweep.py"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), str(harness.TINY_CONFIG), *map(str, arguments)]
    return subprocess.run(command, env=os.environ, text=True, capture_output=True, timeout=300)


def names(wanted: list[dict]) -> list[str]:
    return [run.name for run in sweep.plan(harness.TINY_CONFIG, wanted, {})]


def test_a_grid_is_every_combination(tiny):
    wanted = sweep.grid(["method=pmo,dpa", "proxy.lora.r=2,4", "optim_wrapper.x=[1,2],[3,4]"])
    assert len(wanted) == 8
    assert wanted[0] == {"method": "pmo", "proxy.lora.r": "2", "optim_wrapper.x": "[1,2]"}
    assert wanted[7] == {"method": "dpa", "proxy.lora.r": "4", "optim_wrapper.x": "[3,4]"}


@pytest.mark.parametrize("axis", ["method", "method=", "=dpa"])
def test_an_axis_without_values_is_refused(axis):
    with pytest.raises(DPAError, match="expected SETTING=VALUE,VALUE"):
        sweep.grid([axis])


def test_what_a_method_does_not_read_makes_no_run(tiny):
    wanted = sweep.grid(["method=vanilla,dpa", "proxy.train_llm=lora,full", "proxy.lora.r=2,4"])
    assert names(wanted) == [
        "method=vanilla",
        "method=dpa,proxy.train_llm=lora,proxy.lora.r=2",
        "method=dpa,proxy.train_llm=lora,proxy.lora.r=4",
        "method=dpa,proxy.train_llm=full",
    ]


def test_runs_whose_names_would_be_the_same_have_folders_of_their_own(tiny):
    found = names([{"captions.data_path": "a/b"}, {"captions.data_path": "a_b"}, {}])
    assert len(set(found)) == 3 and found[2] == "as_it_is"
    assert not any("/" in name for name in found)
    long = names([{"captions.data_path": "x" * 300}, {"captions.data_path": "x" * 301}])
    assert len(set(long)) == 2 and max(map(len, long)) < 200


def test_a_run_that_makes_no_sense_does_not_stop_the_others(tiny):
    wanted = sweep.grid(["method=vanilla,dpa", "tune.start_from=target,proxy"])
    refused = {r.name: r.refused for r in sweep.plan(harness.TINY_CONFIG, wanted, {})}
    assert len(refused) == 4
    assert "needs a stage proxy" in refused.pop("method=vanilla,tune.start_from=proxy")
    assert set(refused.values()) == {""}


@pytest.mark.parametrize("suffix", ["yaml", "json", "py"])
def test_a_list_of_runs_is_read(suffix, tmp_path):
    file = tmp_path / f"runs.{suffix}"
    file.write_text(
        {
            "yaml": "runs:\n  - {method: vanilla}\n  - {method: dpa, proxy.lora.r: 8}\n",
            "json": '{"runs": [{"method": "vanilla"}, {"method": "dpa", "proxy.lora.r": 8}]}',
            "py": "runs = [dict(method='vanilla'), {'method': 'dpa', 'proxy.lora.r': 8}]\n",
        }[suffix]
    )
    assert sweep.read_list(str(file)) == [
        {"method": "vanilla"},
        {"method": "dpa", "proxy.lora.r": "8"},
    ]


@pytest.mark.parametrize("content", ["a: 1", "runs: {method: dpa}", "runs: [{loss: {type: a}}]"])
def test_a_file_without_a_list_is_refused_with_an_example(content, tmp_path):
    file = tmp_path / "runs.yaml"
    file.write_text(content)
    with pytest.raises(DPAError, match=r"runs:\n  - \{method: vanilla\}"):
        sweep.read_list(str(file))


def write_stage(folder: Path, measured: dict, *logged: dict) -> None:
    log = folder / "20260101_000000/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(line) + "\n" for line in logged) + '{"cross_ent')
    (folder / "stage.json").write_text(json.dumps({"measured": measured}))


def test_the_table_holds_what_each_run_measured(tmp_path):
    runs = {
        "a": sweep.SweepRun("a", {"method": "dpa", "proxy.lora.r": "8", "align.lr": "1"}, "", ""),
        "b": sweep.SweepRun("b", {"method": "vanilla", "align.lr": "1"}, "", ""),
        "c": sweep.SweepRun("c", {"method": "cmo", "align.lr": "1"}, "", "no"),
    }
    for name, status in {"a": "finished", "b": "failed (exit code 1)", "c": "refused"}.items():
        sweep.write_status(tmp_path, runs[name], status)
    write_stage(tmp_path / "a/proxy", {"original": 4.0, "floor": 0.5}, {"loss": 1, "step": 2})
    write_stage(tmp_path / "a/align", {"floor": 0.5, "leakage": 2.5}, {"loss": 1, "step": 2})
    write_stage(
        tmp_path / "a/tune",
        {},
        {"cross_entropy": 2.5, "step": 10},
        {"cross_entropy": 1.25, "step": 20},
        {"held_out/align": 3.0, "step": 20},
    )
    (tmp_path / "a/scores.json").write_text('{"mmbench": 61.5, "mmvp": {"pairs": 30, "n": "300"}}')
    markdown = sweep.save_table(tmp_path)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines()]
    assert cells[0] == [
        "method", "proxy.lora.r", "status", "original", "floor", "leakage", "tune cross_entropy",
        "mmbench", "mmvp.pairs",
    ]  # fmt: skip
    assert set("".join(cells[1])) == {"-", ":"}
    assert cells[2] == ["dpa", "8", "finished", "4", "0.5", "2.5", "1.25", "61.5", "30"]
    assert cells[3] == ["vanilla", "-", "failed (exit code 1)", *"------"]
    assert cells[4][2] == "refused"
    with open(tmp_path / "sweep.csv") as file:
        first = next(csv.DictReader(file))
    assert float(first["tune cross_entropy"]) == 1.25 and first["proxy.lora.r"] == "8"
    assert (tmp_path / "sweep.md").read_text() == markdown + "\n"


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """A sweep of a run that finishes, one that fails and one that is refused, run twice."""
    work_dir = tmp_path_factory.mktemp("sweep") / "sweep"
    arguments = ("--grid", "method=vanilla,mystery", "align.batch_size=2,3")
    arguments += ("--work-dir", work_dir, "--cfg-options", "align.max_steps=2", "tune.max_steps=2")
    return work_dir, run(*arguments), run(*arguments)


def test_a_failure_stops_neither_the_others_nor_the_table(swept):
    work_dir, first, _ = swept
    assert first.returncode == 1
    assert "'mystery' is not a known method" in first.stderr
    assert "not a multiple of align.batch_size=3" in first.stderr
    found = {row["method"] + row["align.batch_size"]: row for row in sweep.rows(work_dir)}
    assert found["vanilla2"]["status"] == "finished"
    assert found["vanilla3"]["status"] == "failed (exit code 1)"
    assert found["mystery2"]["status"] == found["mystery3"]["status"] == "refused"
    stage = json.loads(
        (work_dir / "method=vanilla,align.batch_size=2/align/stage.json").read_text()
    )
    assert stage["steps"] == 2  # the settings of all runs
    for name in ("align", "leakage"):
        assert found["vanilla2"][name] == stage["measured"][name]


def test_a_restart_runs_what_is_not_finished(swept):
    _, first, second = swept
    assert first.stdout.count("\nRun ") == 2
    assert second.stdout.count("\nRun ") == 1
    assert "Run 2 of 4: method=vanilla,align.batch_size=3" in second.stdout
    assert "| vanilla" in second.stdout and second.returncode == 1
