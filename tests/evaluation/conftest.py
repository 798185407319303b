"""Tiny models and benchmark files."""

import pytest
from support.run_eval import accept_any_file
from support.tiny_folder import rows, write_data, write_folder

from dpa_xtuner.evaluation.benchmarks import BENCHMARKS


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny LLaVA folder, to be read."""
    return write_folder(tmp_path_factory.mktemp("llava") / "tiny")


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another one."""
    return write_folder(tmp_path_factory.mktemp("llava") / "other", seed=1)


@pytest.fixture
def data(tmp_path):
    """Six questions of AI2D and four of MMVP, to be changed."""
    write_data(tmp_path / "data", "AI2D_TEST", rows("AI2D_TEST", 6))
    return write_data(tmp_path / "data", "MMVP", rows("MMVP", 4))


@pytest.fixture
def any_file():
    """Benchmarks without the md5 of their published files; those that are added are taken away."""
    before = dict(BENCHMARKS)
    accept_any_file()
    yield
    BENCHMARKS.clear()
    BENCHMARKS.update(before)
