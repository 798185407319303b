"""The cached contrast pass is the computed one, and a stale cache is refused."""

import json

import numpy as np
import pytest
from support import harness
from support.harness import Layout

PLAIN = Layout()


@pytest.fixture(scope="module")
def aligned(reference, tmp_path_factory):
    """Runs align behind the reference's proxy, with a cache: work dir and output."""
    folder = tmp_path_factory.mktemp("aligned")

    def run(name: str, cache, *options: str, **how):
        work_dir = folder / name
        harness.copy_stage(reference(PLAIN).work_dir, work_dir, "proxy")
        return work_dir, *harness.run(
            "align", work_dir, f"align.contrast_cache={cache}", *options, **how
        )

    return run


@pytest.fixture(scope="module")
def cache(aligned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "p_wo"
    work_dir, code, output = aligned("first", folder)
    assert code == 0, output[-3000:]
    return folder, work_dir


def losses(work_dir) -> list[float]:
    (file,) = work_dir.glob("align/*/vis_data/scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["mean_p_difference"] for line in lines if "mean_p_difference" in line]


def test_it_is_read_the_second_time_and_gives_the_same_bits(cache, aligned):
    folder, first = cache
    before = (folder / "scores.npy").stat().st_mtime_ns
    second, code, output = aligned("second", folder)
    assert code == 0, output[-3000:]
    assert "Computing what the LLM says" not in output
    assert (folder / "scores.npy").stat().st_mtime_ns == before
    assert harness.differing(harness.weights(first), harness.weights(second)) == []


def test_its_scores_are_those_of_the_pass(cache, reference):
    # bfloat16 and other company in the batch: some hundredths of a nat.
    _, work_dir = cache
    computed, read = losses(reference(PLAIN).work_dir), losses(work_dir)
    assert len(read) == len(computed) > 0
    assert np.allclose(computed, read, atol=2e-3)


def test_two_ranks_write_the_cache_of_one(cache, aligned, tmp_path):
    folder, _ = cache
    _, code, output = aligned("ranks", tmp_path / "p_wo", ranks=2)
    assert code == 0, output[-3000:]
    for name in ("offsets", "scores"):
        one, two = np.load(folder / f"{name}.npy"), np.load(tmp_path / "p_wo" / f"{name}.npy")
        assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("option", "named"), [("align.max_length=30", "max_length"), ("captions.held_out=2", "samples")]
)
def test_a_stale_cache_is_refused(cache, aligned, option, named):
    folder, _ = cache
    _, code, output = aligned(f"stale-{named}", folder, option)
    assert code == 1
    assert "was computed from something else" in output and f"  {named}: cached for" in output
    assert "Remove the folder" in output and "Traceback" not in output


def test_a_folder_that_is_no_cache_is_refused(aligned, tmp_path):
    _, code, output = aligned("none", tmp_path)
    assert code == 1 and "can't be read" in output and "Traceback" not in output


def test_a_scheme_without_a_contrast_pass_has_nothing_to_cache(aligned, tmp_path):
    _, code, output = aligned("uniform", tmp_path / "p_wo", "align.loss=uniform")
    assert code == 1 and "runs no contrast pass" in output
