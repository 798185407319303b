"""What a wheel holds: an installation without a checkout trains like one with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    for name in listed:
        shutil.copy(ROOT / name, folder)
    for name in ("dpa_xtuner", "configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder / "out"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run(installation: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dpa_xtuner", *arguments],
        env=os.environ | {"PYTHONPATH": str(installation)} | environment,
        cwd=installation, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package_the_configs_and_the_tools(installation):
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {str(p.relative_to(folder)) for p in found if "__pycache__" not in p.parts}

    assert files(installation / "dpa_xtuner") == files(ROOT / "dpa_xtuner") | {
        f"{name}/{file}" for name in ("configs", "tools") for file in files(ROOT / name)
    }


@pytest.mark.slow
def test_an_installations_tools_find_its_configs(installation):
    listed = run(installation, "list_configs", "internlm2_7b")
    assert listed.stdout == "dpa_internlm2_7b\ndpa_internlm2_7b_qlora\n"
    path = str(installation / "dpa_xtuner" / "configs" / "dpa_internlm2_7b.py")
    assert f"xtuner train {path}" in listed.stderr
    assert Config.fromfile(path).method == "dpa"  # from its _base_
    unknown = run(installation, "trian")
    assert unknown.returncode == 1 and "did you mean 'train'?" in unknown.stderr


@pytest.mark.slow
def test_an_installation_trains(installation, tmp_path):
    environment = {"DPA_REHEARSE": "1", "HF_HUB_OFFLINE": "1", "DPA_DATA": "nowhere"}
    arguments = ("train", "dpa_qwen2_5_1_5b", "--work-dir", str(tmp_path / "run"))
    done = run(installation, *arguments, **environment)
    (tmp_path / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run-rehearsal" / "curves.png").is_file()
