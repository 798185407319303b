"""Check an installation before a training: ``python -m dpa_xtuner.check``.

Each line of the report says ``ok``, or what is wrong and what to do.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NamedTuple

from dpa_xtuner.layout import shipped

_CONFIG = "dpa_qwen2_5_1_5b"
_BRING = "install it, or bring its wheel: docs/install.md"
_OPTIONAL = {
    "flash_attn": "attention is computed by PyTorch",
    "deepspeed": "needed for --deepspeed alone",
    "bitsandbytes": "needed for the *_qlora configs alone",
}
_INSTEAD = {"opencv-python": "opencv-python-headless"}
_GIVEN = ("torch", "torchvision", "transformers", "peft", "tokenizers", "safetensors")
"""Packages of a GPU image, whose own needs are the image's affair."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        text: what was looked at, and what was found.
        todo: what to do; empty if all is well.
    """

    text: str
    todo: str = ""


def packages() -> Iterator[Finding]:
    """Compare the installed versions with those that this package and its needs ask for."""
    yield Finding(f"Python {platform.python_version()}")
    ours, version = _installed("dpa_xtuner")
    yield Finding(f"{ours} {version or 'is not installed'}", "" if version else _BRING)
    waiting, seen = [ours] if version else [], {*_OPTIONAL}
    for name in waiting:  # grows while it is read
        direct = name == ours
        for needed, wanted in _requirements(name):
            if needed in seen:
                continue
            seen.add(needed)
            needed, found = _installed(needed)
            if found is None:
                yield Finding(f"{needed}{wanted} is not installed", _BRING)
                continue
            if not wanted.contains(found, prereleases=True):
                yield Finding(f"{needed} {found}: {name} needs {wanted}", _BRING)
            elif direct:
                yield Finding(f"{needed} {found}{f' (needs {wanted})' if wanted else ''}")
            if needed not in _GIVEN:
                waiting.append(needed)


def _requirements(package: str) -> Iterator[tuple]:
    """Yield the name and the versions of what a package needs here, without its extras."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(package) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name, requirement.specifier


def _installed(package: str) -> tuple[str, str | None]:
    for name in (package, _INSTEAD.get(package, package)):
        try:
            return name, importlib.metadata.version(name)
        except PackageNotFoundError:
            continue
    return package, None


def xtuner() -> Iterator[Finding]:
    """Look for XTuner, whose metadata nothing asks for, and whether transformers 5 can use it."""
    import transformers

    from dpa_xtuner import compat

    _, found = _installed("xtuner")
    if found != compat.XTUNER_COMMAND.rpartition("==")[2]:
        yield Finding(f"xtuner {found or 'is not installed'}", compat.XTUNER_COMMAND)
        return
    yield Finding(f"xtuner {found}")
    if int(transformers.__version__.partition(".")[0]) >= 5:
        unmended = ", ".join(map(str, compat.files_to_mend()))
        todo = "python -m dpa_xtuner.compat" if unmended else ""
        yield Finding(f"XTuner's files with transformers 5: {unmended or 'mended'}", todo)


def device() -> Iterator[Finding]:
    """Name the device, the precision that a run would choose on it, and optional packages."""
    import torch
    from mmengine.device import get_device

    from dpa_xtuner.precision import choose_precision

    kind = get_device()
    if kind == "cuda":
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding(f"device: {names}; torch for CUDA {torch.version.cuda}")
    elif kind == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
        yield Finding(
            f"device: torch for CUDA {torch.version.cuda} finds no GPU, but nvidia-smi is here",
            "compare the driver's CUDA version in nvidia-smi; look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(f"device: {kind.upper()}, {os.cpu_count()} cores")
    precision = choose_precision("auto", kind)
    yield Finding(f"precision {precision.name}: {precision.reason}")
    for name, meaning in _OPTIONAL.items():
        yield Finding(f"{name} {_installed(name)[1] or f'not found: {meaning}'}")


def rehearsal() -> Iterator[Finding]:
    """Train all three stages with tiny models, as ``DPA_REHEARSE=1`` does."""
    folder = Path(tempfile.mkdtemp(prefix="dpa_xtuner_check_"))
    log, began = folder / "log.txt", time.monotonic()
    config = shipped("configs") / f"{_CONFIG}.py"
    command = [sys.executable, "-m", "xtuner.tools.train", str(config), "--work-dir", "run"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DPA_")}
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT,
            env=environment | {"DPA_REHEARSE": "1", "HF_HUB_OFFLINE": "1"},
        ).returncode  # fmt: skip
    if code:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        yield Finding(f"rehearsal of {_CONFIG}: {last}", f"the log says more: {log}")
        return
    shutil.rmtree(folder)
    seconds = time.monotonic() - began
    yield Finding(f"rehearsal of {_CONFIG}: proxy, align and tune in {seconds:.0f} s")


def main() -> int:
    """Print the report, and return the exit code: 1 if anything is wrong."""
    argparse.ArgumentParser(
        prog="python -m dpa_xtuner.check",
        description="Check the installed packages and the device, and rehearse a training.",
    ).parse_args()
    for check in (packages, xtuner, device, rehearsal):
        wrong = sum([_report(finding) for finding in _findings(check)])
        if wrong:  # what comes next would fail of the same cause
            return 1
    return 0


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken package can raise anything
        yield Finding(f"{check.__name__}: {type(error).__name__}: {error}", _BRING)


def _report(finding: Finding) -> bool:
    """Print a line, and tell whether it reports something wrong."""
    if finding.todo:
        print(f"WRONG  {finding.text}\n       -> {finding.todo}", flush=True)
    else:
        print(f"ok     {finding.text}", flush=True)
    return bool(finding.todo)


if __name__ == "__main__":
    sys.exit(main())
