"""One thread, no hub, and the tiny models and data that the tests share."""

import functools
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support import harness

import dpa_xtuner.plugin  # noqa: F401  # before all that imports XTuner
from dpa_xtuner.planning import rehearsal
from dpa_xtuner.stages.run import Run

# Tests of what needs an extra that is not installed, as on transformers 5, are left out.
_NEED = {
    "opencompass": ["evaluation", "demo/test_demo_benchmarks.py"],
    "mmpretrain": ["model/test_mmpretrain.py", "stages/test_encoder_stages.py"],
}
_MISSING = [package for package in _NEED if find_spec(package) is None]
collect_ignore = [path for package in _MISSING for path in _NEED[package]]

torch.set_num_threads(1)
# transformers 5 loads weights in threads, which wait for ever in a forked child, or fail.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# XTuner sets it to true when it is imported; forked children, as the harness makes them, would
# then wait for threads that their parent has and they have not.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_report_header() -> list[str]:
    return [f"left out, for want of {name}: {', '.join(_NEED[name])}" for name in _MISSING]


@pytest.hookimpl(tryfirst=True)  # before the fixtures, some of which train
def pytest_runtest_setup() -> None:
    """Undo what importing VLMEvalKit does to the whole process: it turns gradients off."""
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with llm, visual_encoder, captions.json, instructions.json and images."""
    folder = tmp_path_factory.mktemp("tiny")
    os.environ.update(DPA_TINY=str(folder), DPA_CACHE=str(folder / "cache"))

    def write() -> None:
        cfg = Config.fromfile(harness.TINY_CONFIG)
        rehearsal.make_inputs(Run.of(cfg, rehearsal.PRECISION), folder)

    harness.forked(write, folder / "inputs.log")
    return folder


@pytest.fixture(scope="session")
def reference(tiny, tmp_path_factory):
    """Gives a finished pipeline of a layout, run once for all tests."""

    @functools.cache
    def make(layout: harness.Layout) -> harness.Reference:
        return harness.reference(tmp_path_factory.mktemp("reference") / str(layout), layout)

    return make


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """Gives a SentencePiece file, with a space before a text or without."""
    from support import small_tokenizers

    folder = tmp_path_factory.mktemp("pieces")
    files = {
        prefixed: small_tokenizers.train_pieces(folder / f"{prefixed}.model", prefixed)
        for prefixed in (True, False)
    }
    return files.__getitem__
