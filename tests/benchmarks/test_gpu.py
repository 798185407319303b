"""benchmarks/gpu.py on a CPU, with tiny shapes: so that nothing breaks unseen."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import psutil
import pytest
from support.pretended_gpu import pretended_gpu
from torch.utils.flop_counter import FlopCounterMode

FILE = Path(gpu.__file__)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FILE), "--device", "cpu", "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu_in_three_minutes(tmp_path):
    began = time.monotonic()
    done = run(tmp_path, "--minutes", "3")
    assert time.monotonic() - began < 3 * 60
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    states = {
        name: json.loads(file.read_text())["state"] if file.is_file() else "no time was left"
        for name, file in ((name, tmp_path / f"{name}.json") for name in gpu.PARTS)
    }
    # On a busy machine not all of them have the time, and then they say so.
    report = gpu.report(tmp_path)
    assert report.count("**Not complete** (cut off)") == [*states.values()].count("cut off")
    assert report.count("**Not measured.**") == [*states.values()].count("no time was left")
    late = [name for name, state in states.items() if state != "complete"]
    if late:
        done = run(tmp_path, "--minutes", "10", "--parts", *late)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.PARTS}
    assert {content["state"] for content in found.values()} == {"complete"}
    (precisions,) = found["correctness"]["tables"].values()
    assert [(row["precision"], row["holds"]) for row in precisions] == [
        ("fp32", "yes"), ("bf16", "yes"), ("fp16", "yes"),
    ]  # fmt: skip
    steps = found["steps"]["tables"]["A step of align, tiny, 2 layers"]
    assert len(steps) == 5 * 2 + 3  # with captions of two lengths; and recomputed
    losses = {(row["step"], row["caption"]): row["loss"] for row in steps}
    assert losses["stock", 20] == pytest.approx(losses["uniform", 20], rel=5e-3)
    assert losses["plain", 20] == pytest.approx(losses["cmo", 20], rel=5e-3)
    assert len(found["steps"]["tables"]["A step of tune with LoRA of rank 4, tiny"]) == 3
    assert not any("differ" in note for note in found["steps"]["notes"])
    assert "| stock | 8 | no |" in gpu.report(tmp_path)
    stages = found["stages"]
    assert not stages["notes"]
    (row,) = stages["tables"]["The three stages of a tiny config"]
    assert (row["run"], row["exit_code"]) == ("bf16, killed, resumed", 0)
    (row,) = stages["tables"]["Export of the run `bf16, killed`"]
    assert row["finite"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["correctness", "steps", "head"])
def test_what_a_gpu_would_run_mixes_no_devices(part, tmp_path, monkeypatch):
    """The branches for a GPU, on a pretended one with a CPU's shapes."""
    shapes = gpu.sizes("cpu")
    monkeypatch.setattr(gpu, "sizes", lambda device: shapes)
    monkeypatch.setattr(gpu, "describe", lambda device: {})
    monkeypatch.setattr(gpu, "_matrix_products", lambda results: None)
    results = gpu.Results(tmp_path, part, "cuda", until=time.time() + 80)  # compiles nothing
    with pretended_gpu():
        gpu.PARTS[part].work(results)
    assert results.content["tables"]
    # Kernels that only a GPU has, and what is not installed.
    missing = ("flash", "flex_attention", "liger-kernel", "compiled layers")
    failed = [note for note in results.content["notes"] if not any(m in note for m in missing)]
    assert failed == []


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path, "head", "cpu", until=time.time() + 60)


def test_a_figure_that_fails_is_noted_and_the_next_is_taken(results):
    with results.attempt("one"):
        raise ImportError("no such library\nand more")
    with results.attempt("two"):
        results.add("table", figure=1)
    with results.attempt("three"):
        results.need(1000)
        raise AssertionError("not reached")
    content = json.loads(results.path.read_text())
    assert content["notes"] == [
        "one: not measured (ImportError: no such library)",
        "three: not measured (TimeoutError: no time was left)",
    ]
    assert content["tables"] == {"table": [{"figure": 1}]} and content["state"] == "cut off"
    assert results.cut_off


def test_the_report_says_what_is_missing(results, tmp_path):
    results.add("A table", way="a | b", ms=1.5, of_peak_FLOPs=None)
    report = gpu.report(tmp_path)
    assert "| way | ms | of peak FLOPs |\n|---|---|---|\n| a \\| b | 1.5 |  |" in report
    assert "**Not complete** (cut off)" in report
    assert report.count("**Not measured.**") == len(gpu.PARTS) - 1


def test_parts_end_in_time_and_say_so(tmp_path, monkeypatch, capsys):
    """In processes that stand for the parts: two sleep on, one fails, one has no time left."""
    pretended = tmp_path / "parts.py"
    pretended.write_text(
        "import pathlib, subprocess, sys, time\n"
        "part = sys.argv[2]\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path(sys.argv[-1], part).write_text(str(child.pid))\n"
        "sys.exit(3) if part == 'head' else time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(pretended))
    monkeypatch.setattr(gpu, "MINIMUM", 2)
    monkeypatch.setattr(gpu, "describe", lambda device: {})
    args = SimpleNamespace(out=tmp_path, device="cpu", minutes=(5 + 3) / 60,
                           parts=["correctness", "head", "study", "profile"])  # fmt: skip
    began = time.monotonic()
    assert gpu.run_all(args) == 1
    assert time.monotonic() - began < 5 + 3
    said = capsys.readouterr().out
    for line in ("correctness: 2 s, cut off", "head: 0 s, exit code 3", "study: 1 s, cut off",
                 "profile: no time was left"):  # fmt: skip
        assert line in said
    for part in ("correctness", "head", "study"):
        child = int((tmp_path / part).read_text())
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child)
            while process.status() != "zombie":  # its end takes a moment
                assert time.monotonic() - began < 20, f"{part}'s child goes on"
                time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12)],
)  # fmt: skip
def test_the_peak_of_a_card(name, peak, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: name)
    assert gpu.peak_flops() == peak


def test_the_page_is_that_of_the_results():
    docs = FILE.parents[1] / "docs"
    assert (docs / "gpu.md").read_text() == gpu.report(docs / "gpu") + "\n", (
        "run python benchmarks/gpu.py --report docs/gpu > docs/gpu.md"
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", ["uniform", "cmo"])
def test_a_steps_operations_are_those_that_pytorch_counts(results, row):
    """Up to attention's products and the encoder's embeddings, which are small here."""
    shapes = gpu.sizes("cpu")
    bench = gpu.Bench(shapes.llms["tiny"], shapes, results)
    texts = bench.texts(20, equal=True)
    step = bench.step(row, texts)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == pytest.approx(bench.useful_flops(row, texts), rel=0.1)
