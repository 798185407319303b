"""Draws the curves of runs: each stage's logged figures, several runs in one picture."""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import move_into_place, prepare_to_write, read_json
from dpa_xtuner.layout import ALIGN, STAGE_NAMES, STATE_FILE

CURVES_FILE = "curves.png"
"""In a run's folder: its curves, drawn at the end of each stage."""

_SPEED = "tokens_per_second"
_PANELS = {
    "loss": ("loss",),
    "cross entropy\n(nats per token)": ("cross_entropy",),
    "learning rate": ("lr",),
    "mean weight": ("mean_weight",),
    "held-out captions\n(nats per token)": (
        f"held_out/{ALIGN}", "held_out/floor", "held_out/original",
    ),
    "supervised tokens\nper second": (_SPEED,),
}  # fmt: skip
"""A row of the picture: its label, and the figures in it, each with a line style of its own."""

_STYLES = ("-o", "--s", ":^")


class Curve(NamedTuple):
    """A figure of a stage by optimizer step.

    Attributes:
        steps: optimizer steps, rising.
        values: the figure at each step.
    """

    steps: list[float]
    values: list[float]


def read_curves(stage: Path) -> dict[str, Curve]:
    """Read what a stage has logged, of all processes that trained it, by the figure's name.

    Where a run was interrupted, a step that was trained again counts as the last process logged it.

    Args:
        stage: folder of the stage.

    Raises:
        DPAError: a file is broken.
    """
    state = read_json(stage / STATE_FILE, "Remove that folder to train the stage again.")
    found: dict[str, dict[float, float]] = {}
    for file in sorted(stage.glob("*/vis_data/scalars.json")):
        for line in _lines(file):
            step, iterations = line.pop("step"), line.pop("iter", None)
            if iterations is not None:  # MMEngine's own hook counts micro-batches
                counts = _micro_batches(stage, state)
                step = iterations / counts
                if line.get("time") and "supervised_tokens" in line:
                    line[_SPEED] = line["supervised_tokens"] / (line["time"] * counts)
            for name, value in line.items():
                found.setdefault(name, {})[step] = value
    return {
        name: Curve(*map(list, zip(*sorted(points.items()), strict=True)))
        for name, points in found.items()
    }


def _lines(file: Path) -> list[dict]:
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        found = [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise DPAError(f"{file} is broken ({error}). Move it away to draw the rest.") from None
    with suppress(json.JSONDecodeError):  # a killed process may have left it incomplete
        found += [json.loads(line) for line in lines[-1:]]
    return found


def _micro_batches(stage: Path, state: dict) -> float:
    """Count the micro-batches of an optimizer step on one process."""
    if "run" not in state:
        raise DPAError(f"{stage / STATE_FILE}, which says how large its batches are, is missing.")
    run = state["run"]
    batch = state["origin"]["settings"]["global_batch_size"]
    return batch / (run["processes"] * run["batch_size"])


def draw_curves(runs: list[Path], out: Path) -> Path:
    """Draw the curves of runs: stages side by side, a colour for each run.

    Args:
        runs: work dirs of runs.
        out: the picture to write.

    Returns:
        ``out``.

    Raises:
        DPAError: a folder has no logged figures, or a file is broken.
    """
    # pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    found = {
        run: {stage: curves for stage in STAGE_NAMES if (curves := read_curves(run / stage))}
        for run in runs
    }
    for run, stages in found.items():
        if not stages:
            raise DPAError(
                f"{run} has no figures to draw. Expected the work dir of a run, whose stages have "
                f"logged to STAGE/*/vis_data/scalars.json."
            )
    shown = [stage for stage in STAGE_NAMES if any(stage in each for each in found.values())]
    size = (0.6 + 3.6 * len(shown), 0.6 + 1.8 * len(_PANELS))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(_PANELS), len(shown), squeeze=False, sharex="col")
    for column, stage in enumerate(shown):
        for row, (label, names) in enumerate(_PANELS.items()):
            panel = axes[row][column]
            for number, stages in enumerate(found.values()):
                _draw(panel, stages.get(stage, {}), names, f"C{number}")
            if not panel.lines:
                panel.set_axis_off()
            panel.grid(alpha=0.3)
            if column == 0 or not axes[row][0].lines:
                panel.set_ylabel(label)
        axes[0][column].set_title(stage)
        axes[-1][column].set_xlabel("optimizer step")
    _legend(figure, runs)
    prepare_to_write(out)
    partial = out.with_name(f".{out.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    move_into_place(partial, out)
    return out


def _draw(panel, curves: dict[str, Curve], names: tuple[str, ...], colour: str) -> None:
    """Draw one run's figures into a panel."""
    for name, style in zip(names, _STYLES, strict=False):
        if name not in curves:
            continue
        steps, values = curves[name]
        size = 3 if len(steps) < 20 else 0
        label = name.rpartition("/")[2]
        panel.plot(steps, values, style, color=colour, markersize=size, label=label)
    if len(names) > 1 and panel.lines:
        by_label = {line.get_label(): line for line in reversed(panel.lines)}
        panel.legend(by_label.values(), by_label.keys(), fontsize="small")


def _legend(figure, runs: list[Path]) -> None:
    from matplotlib.lines import Line2D

    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    lines = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    figure.legend(lines, names, loc="outside upper center", ncols=min(3, len(runs)))
