"""What `python -m dpa_xtuner.check` says of an installation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from dpa_xtuner import check, compat
from dpa_xtuner.precision import choose_precision

ROOT = Path(__file__).parents[1]


def run(first_on_path: Path, cwd: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(first_on_path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "dpa_xtuner.check"],
        env=os.environ | {"PYTHONPATH": path}, cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def installed(folder: Path, name: str, version: str, *needs: str) -> None:
    """Write what pip writes about an installed package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n")


def test_missing_and_unfit_packages_are_named_with_what_to_do(tmp_path):
    needs = ("first>=2", "absent>=1,<3", "headed", "not-here; extra == 'more'", "bitsandbytes")
    installed(tmp_path, "dpa_xtuner", "7.0", *needs)
    installed(tmp_path, "first", "1.5")
    installed(tmp_path, "headed", "4", "opencv-python>=3", "deeper")
    installed(tmp_path, "opencv_python_headless", "4.9")
    result = run(tmp_path, tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert [line for line in lines if line.startswith("WRONG")] == [
        "WRONG  first 1.5: dpa_xtuner needs >=2",
        "WRONG  absent<3,>=1 is not installed",
        "WRONG  deeper is not installed",
    ]
    assert lines[1] == "ok     dpa_xtuner 7.0" and "ok     headed 4" in lines
    assert lines.count(f"       -> {check._BRING}") == 3
    assert not any("rehearsal" in line for line in lines)


def test_an_environment_without_the_package_is_no_traceback(tmp_path):
    installed(tmp_path, "dpa_xtuner", "7.0", "headed (is no requirement")
    result = run(tmp_path, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "WRONG  packages: InvalidRequirement: " in result.stdout


@pytest.mark.parametrize("version", ["4.57.6", "5.24.0"])
def test_unmended_files_matter_to_transformers_5(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(compat, "files_to_mend", lambda: {Path("xtuner/tools/chat.py"): ""})
    todo = [finding.todo for finding in check.xtuner() if finding.todo]
    assert todo == (["python -m dpa_xtuner.compat"] if version[0] == "5" else [])
    monkeypatch.setattr(compat, "files_to_mend", dict)
    assert not any(finding.todo for finding in check.xtuner())


def test_another_xtuner_is_answered_with_the_command(monkeypatch):
    monkeypatch.setattr(check.importlib.metadata, "version", lambda name: "0.3.0")
    assert list(check.xtuner()) == [("xtuner 0.3.0", compat.XTUNER_COMMAND)]


def test_the_device_comes_with_the_precision_of_a_run(monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose_precision("auto", kind)
    found = list(check.device())
    assert f"precision {chosen.name}: {chosen.reason}" in [text for text, _ in found]
    assert "flash_attn not found: attention is computed by PyTorch" in [text for text, _ in found]
    assert not any(todo for _, todo in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds the GPU")
def test_a_gpu_that_torch_cannot_use_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/usr/bin/{name}")
    text, todo = next(check.device())
    assert "torch for CUDA 13.0 finds no GPU" in text and "driver" in todo


@pytest.mark.slow
def test_a_rehearsal_that_fails_keeps_its_log(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{check._CONFIG}.py").write_text("1 / 0\n")
    monkeypatch.setattr(check, "shipped", tmp_path.joinpath)
    monkeypatch.setattr(check.tempfile, "mkdtemp", lambda prefix: tmp_path)
    (finding,) = check.rehearsal()
    assert "ZeroDivisionError" in finding.text and str(tmp_path / "log.txt") in finding.todo
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_this_environment_passes(tmp_path):
    result = run(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"ok +rehearsal of .*: proxy, align and tune in \d+ s", last)


def test_the_page_names_every_wheel_to_bring():
    pinned = (ROOT / "constraints" / "offline.txt").read_text()
    names = re.findall(r"^([\w-]+)==", pinned, re.MULTILINE)
    table = (ROOT / "docs" / "install.md").read_text().split("| for |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"([a-z][\w-]+) \d+\.\d", table)) == sorted(names)
