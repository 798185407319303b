"""What the tools print, and their exit codes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import harness

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[1] / "tools"


def run(tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *map(str, arguments)],
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_configs_are_listed_by_name_and_pattern():
    assert "dpa_internlm2_7b\ndpa_internlm2_7b_qlora\n" in run("list_configs.py").stdout
    found = run("list_configs.py", "qwen2_5_7b").stdout
    assert found.split("\n\n")[0] == "dpa_qwen2_5_7b\ndpa_qwen2_5_7b_qlora"
    nothing = run("list_configs.py", "gpt")
    assert nothing.returncode == 1 and "No config's name contains 'gpt'" in nothing.stdout


@pytest.mark.parametrize("tool", ["train.py", "check_data.py"])
def test_an_unknown_config_is_answered_with_the_nearest(tool):
    result = run(tool, "dpa_internlm_7b")
    assert result.returncode == 1 and "Did you mean dpa_internlm2_7b or " in result.stdout
    assert "dpa_vicuna_7b" not in result.stdout  # only the nearest ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat.py", "work_dirs/nothing"), "is not there: expected a run's folder, its config's"),
        (("chat.py", "x", "--port", "70000"), "invalid whole number (1 to 65535) value: '70000'"),
        (("chat.py", "x", "--max-new-tokens", "0"), "whole number (1 or more) value: '0'"),
        (("conflict.py", "x", "--shares", "0.5"), "--shares is read with --ranks alone"),
        (("export.py", "."), "'.' is a folder: expected a config's file or its name."),
        (("plot_run.py", __file__), "has no figures to draw"),
        (("plot_run.py", ".", "--out", "."), "has no figures to draw"),
    ],
    ids=str,
)
def test_what_was_expected_is_said(arguments, message):
    result = run(*arguments)
    assert result.returncode and message in result.stdout and "Traceback" not in result.stdout


def test_training_that_fails_says_so_by_its_exit_code(tiny, tmp_path):
    arguments = ("--work-dir", tmp_path / "run", "--cfg-options", "proxy.lr=-1")
    result = run("train.py", harness.TINY_CONFIG, *arguments)
    assert result.returncode == 1
    assert "proxy.lr: Input should be greater than 0" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("finished", "shown"),
    [
        ([], []),
        (["proxy"], ["proxy", "align", "tune"]),
        (["align"], ["align", "tune"]),  # of a method without a proxy
        (["proxy", "align", "tune"], ["proxy", "align", "tune"]),
    ],
    ids=str,
)
def test_the_summary_has_the_stages_of_the_method(finished, shown, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    summary = importlib.import_module("train").summary
    for stage in finished:
        (tmp_path / stage).mkdir()
        state = {"status": "finished", "steps": 7, "seconds": 1.5, "writes": {"x": f"{stage}/x"}}
        (tmp_path / stage / "stage.json").write_text(json.dumps(state))
    lines = summary(tmp_path).splitlines()
    if not shown:
        assert lines == ["No stage has begun."]
        return
    assert [line.split()[0] for line in lines[1:]] == shown
    for line, stage in zip(lines[1:], shown, strict=True):
        assert line.split()[1:] == (
            ["finished", "7", "1.5", f"{stage}/x"] if stage in finished else ["-"] * 3
        )


def test_broken_and_missing_images_are_found_with_their_records(tiny, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    good = run("check_data.py", harness.TINY_CONFIG, DPA_TINY=str(data))
    assert good.returncode == 0 and good.stdout.count("0  problems") == 2, good.stdout
    records = json.loads((data / "captions.json").read_text())
    (data / "images" / records[3]["image"][0]).write_bytes(b"no picture")
    (data / "images" / records[7]["image"][0]).unlink()
    bad = run("check_data.py", harness.TINY_CONFIG, DPA_TINY=str(data))
    assert bad.returncode == 1
    assert f": {records[3]['id']}\n" in bad.stdout and f": {records[7]['id']}\n" in bad.stdout


def test_the_check_writes_a_report_and_a_page(tiny, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    file = data / "captions.json"
    records = json.loads(file.read_text())
    (data / "images" / records[3]["image"][0]).write_bytes(b"no picture")
    records[5]["conversations"] = []
    file.write_text(json.dumps(records))
    written = ("--report", tmp_path / "report.jsonl", "--html", tmp_path / "page.html")
    result = run("check_data.py", harness.TINY_CONFIG, *written, DPA_TINY=str(data))
    assert result.returncode == 1
    assert (
        f"{file}: JSON array" in result.stdout and "letters of the answers: latin" in result.stdout
    )
    found = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    told = {
        each["record"]: (each["file"], each["id"], each["reason"].partition(":")[0])
        for each in found
        if each["stage"] == "align"  # tune may show the same picture
    }
    assert told == {
        3: (str(file), records[3]["id"], "broken image"),
        5: (str(file), records[5]["id"], "no conversations"),
    }
    page = (tmp_path / "page.html").read_text()
    assert "Stage align" in page and "Stage tune" in page and "data:image/png;base64" in page


def test_a_file_without_usable_records_is_reported_too(tiny, tmp_path):
    file = tmp_path / "no_marks.json"
    file.write_text(json.dumps([{"image": "a.png", "messages": [
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red"}
    ]}]))  # fmt: skip
    report = tmp_path / "new" / "report.jsonl"
    options = ("--report", report, "--cfg-options", f"captions.data_path={file}")
    result = run("check_data.py", harness.TINY_CONFIG, *options, DPA_TINY=str(tiny))
    assert result.returncode == 1 and "has no usable sample" in result.stdout
    assert "Stage tune" in result.stdout  # is checked all the same
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line["stage"] == "align" and line["reason"].startswith("wrong number of <image>: 0 in")


def test_a_report_that_cannot_be_written_is_told_before_the_check(tiny, tmp_path):
    result = run("check_data.py", harness.TINY_CONFIG, "--report", tmp_path, DPA_TINY=str(tiny))
    assert (
        result.returncode == 1 and f"{tmp_path} can't be written: it is a folder" in result.stdout
    )
    assert "Stage" not in result.stdout


@pytest.mark.parametrize("number", ["0", "-3", "x"])
def test_a_check_of_no_samples_is_refused(number):
    result = run("check_data.py", harness.TINY_CONFIG, f"--sample={number}")
    assert result.returncode == 2
    assert f"argument --sample: invalid whole number (1 or more) value: {number!r}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg-options", "foo"], "--cfg-options foo: expected SETTING=VALUE"),
        (["--cfg-options", "align.lr=1", "=3"], "--cfg-options =3: expected SETTING=VALUE"),
        (["--cfg-options=foo"], "--cfg-options foo: expected SETTING=VALUE"),
        (["--cfg-options", "a=[1,2"], "its brackets don't close"),
    ],
)
@pytest.mark.parametrize("tool", ["train.py", "sweep.py"])
def test_an_option_that_is_none_is_told(tool, arguments, message):
    result = run(tool, harness.TINY_CONFIG, *arguments)
    assert result.returncode == 1 and message in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("tool", ["check_data.py", "export.py", "memory.py"])
def test_an_option_that_is_none_is_told_by_the_tools_that_import_mmengine(tool):
    result = run(tool, harness.TINY_CONFIG, "--cfg-options", "foo")
    assert result.returncode == 1 and "--cfg-options foo: expected" in result.stdout
    assert "Traceback" not in result.stdout


def test_an_unknown_deepspeed_configuration_is_told():
    result = run("train.py", harness.TINY_CONFIG, "--deepspeed", "zero9")
    assert result.returncode == 1 and "--deepspeed zero9 is neither a file nor" in result.stdout
    assert "zero2" in result.stdout and "Traceback" not in result.stdout


def test_an_option_that_does_not_fit_into_the_config_is_told(tiny, tmp_path):
    options = ("--work-dir", tmp_path / "run", "--cfg-options", "proxy.lr.x=3")
    result = run("train.py", harness.TINY_CONFIG, *options)
    assert result.returncode == 1 and "lr is a dict in the child config" in result.stdout
    assert "\ndpa_xtuner: --cfg-options" in result.stdout and "Traceback" not in result.stdout
