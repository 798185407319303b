"""The curves of runs: what is read of their logs, and what the picture shows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpa_xtuner.curves import draw_curves, read_curves
from dpa_xtuner.errors import DPAError

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def logged(stage: Path, process: str, *lines: dict, end: str = "\n") -> None:
    """Write figures as MMEngine's LocalVisBackend does, and the stage's batches."""
    folder = stage / process / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("\n".join(map(json.dumps, lines)) + end)
    state = {
        "origin": {"settings": {"global_batch_size": 32}},
        "run": {"processes": 2, "batch_size": 4, "zero": None},
    }
    (stage / "stage.json").write_text(json.dumps(state))


def of_micro_batches(iteration: int, **figures: float) -> dict:
    return {**figures, "iter": iteration, "step": iteration}


def run(folder: Path, loss: float = 2.0) -> Path:
    for stage in ("align", "tune"):
        steps = [of_micro_batches(4 * i, loss=loss / i, cross_entropy=1.0) for i in (1, 2, 3)]
        logged(folder / stage, "20260101_000000", *steps)
    return folder


def test_steps_are_the_optimizers_and_tokens_are_counted_by_the_second(tmp_path):
    # 32 samples a step, on 2 processes, 4 at a time: 4 micro-batches of 0.5 s; 60 tokens in 2 s.
    line = of_micro_batches(8, time=0.5, supervised_tokens=60.0, loss=3.0)
    logged(tmp_path, "a", {"held_out/floor": 1.5, "step": 5}, line)
    curves = read_curves(tmp_path)
    assert curves["loss"] == ([2.0], [3.0])
    assert curves["tokens_per_second"] == ([2.0], [30.0])
    assert curves["held_out/floor"] == ([5], [1.5])  # counted in steps already


def test_a_resumed_run_replaces_the_steps_that_it_trained_again(tmp_path):
    first = [of_micro_batches(4 * i, loss=float(i)) for i in (1, 2, 3)]
    again = [of_micro_batches(4 * i, loss=10.0 * i) for i in (3, 4)]
    logged(tmp_path, "20260101_120000", *again)
    logged(tmp_path, "20260101_000000", *first)
    assert read_curves(tmp_path)["loss"] == ([1, 2, 3, 4], [1, 2, 30, 40])


def test_a_killed_processs_last_line_may_be_incomplete_and_no_other(tmp_path):
    line = of_micro_batches(4, loss=1.0)
    logged(tmp_path / "killed", "a", line, end='\n{"loss": 2.')
    assert read_curves(tmp_path / "killed")["loss"] == ([1], [1.0])
    logged(tmp_path / "broken", "a", line, line)
    file = tmp_path / "broken" / "a" / "vis_data" / "scalars.json"
    file.write_text("{" + file.read_text())
    with pytest.raises(DPAError, match=r"scalars\.json is broken"):
        read_curves(tmp_path / "broken")


def test_a_stage_without_its_state_file_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "tune" / "stage.json").unlink()
    with pytest.raises(DPAError, match=r"tune/stage\.json, which says how large its batches are"):
        draw_curves([tmp_path], tmp_path / "curves.png")


def colours(picture: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    return set(map(tuple, pixels.tolist()))


def test_each_run_has_a_colour_of_its_own(tmp_path):
    runs = [run(tmp_path / "one"), run(tmp_path / "two", loss=math.nan)]
    one = draw_curves(runs[:1], tmp_path / "one.png")
    both = draw_curves(runs, tmp_path / "both.png")
    assert BLUE in colours(one) and ORANGE not in colours(one)
    assert {BLUE, ORANGE} <= colours(both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "one", "one.png", "two"]


def test_stages_stand_side_by_side(tmp_path):
    folder = run(tmp_path / "run")
    two = Image.open(draw_curves([folder], tmp_path / "two.png")).width
    logged(folder / "proxy", "a", of_micro_batches(4, loss=1.0))
    assert Image.open(draw_curves([folder], tmp_path / "three.png")).width > two


def test_a_folder_without_figures_is_named(tmp_path):
    with pytest.raises(DPAError, match=f"{tmp_path} has no figures to draw"):
        draw_curves([tmp_path], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
