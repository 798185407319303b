"""The pictures of docs/results.md."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studies.analysis import (
    DRAWINGS,
    OTHERS,
    Results,
    gains_of_variants,
    number,
    vanilla_of,
)
from studies.openmoji.plan import Run
from studies.openmoji.styles import STYLES
from studies.plan import METHODS, SEEDS, Cell

COLOURS = dict(zip(METHODS, ("#777777", "#1f77b4", "#e15a00", "#7b3294", "#2a9d4a"), strict=True))


def draw(results: Results, drawn: dict[str, dict[Run, dict]], folder: Path) -> None:
    """Write one picture per question into a folder; ``drawn`` is that of :func:`drawn_runs`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def write(name: str, panels: Sequence[Callable[[Any], None]]) -> None:
        """Draw panels side by side into a file; without panels, none is written."""
        if not panels:
            return
        made = Figure(figsize=(4 * len(panels) + 0.8, 3.6), layout="constrained")
        FigureCanvasAgg(made)
        axes = made.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            panel(axis)
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(frameon=False, fontsize=8)
        made.savefig(folder / f"results_{name}.png", dpi=110)

    def by_level(panel: Callable[..., None], levels: list[int]) -> list[Callable[[Any], None]]:
        return [partial(panel, results, level) for level in levels]

    measures = ("after align", "over tune", "leakage")
    every = results.levels(share=1.0, variant="")
    write("gains", [partial(_draw_gains, results, measure) for measure in measures])
    ways = {
        "rate 5e-4, batches of 32 (all seeds)": ({"pmo": "", "dpa": ""}, None),
        "rate 2e-4, batches of 8 (seeds 60 - 69)": (
            {"pmo": "gentle_small_batches", "dpa": "gentle_small_batches_dpa"},
            [*SEEDS["gentle"]],
        ),
    }
    if results.levels(variant="gentle_small_batches_dpa"):
        write(
            "gentle", [partial(_draw_gentle, results, *way, title) for title, way in ways.items()]
        )
    write("curves", by_level(_draw_curves, every))
    write("mechanism", by_level(_draw_mechanism, every))
    # Without a conflict only a control was run.
    varied = sorted({cell.level for cell in results.runs if cell.variant and cell.level})
    write("variants", by_level(_draw_variants, varied))
    write("shares", by_level(_draw_shares, results.levels(share=0.5)))
    for name, runs in drawn.items():
        found = {run.style for run in runs}
        panels = [partial(_draw_answers, runs, style) for style in STYLES if style in found]
        write(f"openmoji_{name}", panels)


def _draw_gains(results: Results, measure: str, axis) -> None:
    levels = results.levels(method="vanilla", share=1.0, variant="")
    cells = {method: [Cell(level, method, 0) for level in levels] for method in OTHERS}
    _draw_difference(results, axis, measure, cells)
    conflict = [results.mean(Cell(level, "pmo", 0), "conflict per caption") for level in levels]
    named = zip(levels, conflict, strict=True)
    axis.set_xticks(range(len(levels)), [f"{level}\n{number(nats)}" for level, nats in named])
    axis.set_xlabel("level, and conflict in nats per caption")
    what = "leakage, nats per token" if measure == "leakage" else f"accuracy {measure}"
    axis.set_title(f"{what}: minus vanilla", fontsize=10)


def _draw_gentle(
    results: Results, variants: dict[str, str], among: list[int] | None, title: str, axis
) -> None:
    """Draw what PMO and DPA gain when they are trained in one way, over all seeds or some."""
    levels = results.levels(variant="gentle_small_batches")
    cells = {
        method: [Cell(level, method, 0, variant=name) for level in levels]
        for method, name in variants.items()
    }
    _draw_difference(results, axis, "over tune", cells, among)
    axis.set_xticks(range(len(levels)), levels)
    axis.set(xlabel="level", ylim=(-0.2, 0.2))
    axis.set_title(f"accuracy over tune, minus vanilla:\n{title}", fontsize=10)


def _draw_difference(
    results: Results,
    axis,
    measure: str,
    cells: dict[str, list[Cell]],
    among: list[int] | None = None,
) -> None:
    """Draw what the cells of each method gain over their vanilla, one beside the other."""
    axis.axhline(0, color="#777777", linewidth=1)
    for shift, (method, wanted) in enumerate(cells.items()):
        found = [
            (i, gain)
            for i, cell in enumerate(wanted)
            if (gain := results.gain(cell, vanilla_of(cell), measure, among))
        ]
        if found:
            axis.errorbar(
                [i + (shift - (len(cells) - 1) / 2) * 0.08 for i, _ in found],
                [gain.mean for _, gain in found],
                [np.nan_to_num(gain.half) for _, gain in found],
                fmt="o-", markersize=4, capsize=3, label=method, color=COLOURS[method],
            )  # fmt: skip


def _draw_curves(results: Results, level: int, axis) -> None:
    for method in METHODS:
        if results.seeds(cell := Cell(level, method, 0)):
            axis.plot(*results.curve(cell, "accuracy"), label=method, color=COLOURS[method])
    axis.set(title=f"level {level}", xlabel="steps of tune", ylabel="accuracy", ylim=(0, 1.02))


def _draw_mechanism(results: Results, level: int, axis) -> None:
    for method in ("cmo", "dpa"):
        if not results.seeds(cell := Cell(level, method, 0)):
            continue
        for key, style in (("d_learned", "-"), ("d_unlearned", ":")):
            steps, means = results.curve(cell, key)
            axis.plot(
                steps, means, style, color=COLOURS[method], label=f"{method}, {key[2:]} tokens"
            )
    for bound in (0.05, 0.5):
        axis.axhline(bound, color="#bbbbbb", linewidth=1)
    axis.set(title=f"level {level}", xlabel="steps of tune", ylim=(-0.05, 1))
    axis.set_ylabel("p_w - p_wo of answers")


def _draw_variants(results: Results, level: int, axis) -> None:
    axis.axvline(0, color="#777777", linewidth=1)
    gains = gains_of_variants(results, level)
    for i, (name, gain) in enumerate(gains.items()):
        axis.errorbar(
            gain.mean, i, xerr=np.nan_to_num(gain.half), fmt="o", markersize=4, capsize=3,
            color=COLOURS.get(name, "#333333"),
        )  # fmt: skip
    axis.set_yticks(range(len(gains)), gains, fontsize=8)
    axis.set_title(f"level {level}: accuracy over tune, minus vanilla", fontsize=10)


def _draw_shares(results: Results, level: int, axis) -> None:
    shares = sorted({cell.share for cell in results.runs if not cell.variant})
    cells = {method: [Cell(level, method, 0, share) for share in shares] for method in OTHERS}
    _draw_difference(results, axis, "over tune", cells)
    axis.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axis.set_xlabel("share of the captions")
    axis.set_title(f"level {level}: accuracy over tune, minus vanilla", fontsize=10)


def _draw_answers(runs: dict[Run, dict], style: str, axis) -> None:
    """Draw each seed's accuracy by method, a seed's runs joined by a line."""
    for seed in sorted({run.seed for run in runs}):
        found = [
            (x, DRAWINGS["accuracy"](runs[run]))
            for x, method in enumerate(METHODS)
            if (run := Run(style, method, seed)) in runs
        ]
        places, accuracies = [x for x, _ in found], [y for _, y in found]
        # Also of a seed without runs here: the first panel's legend is for all, and so are colours.
        axis.plot(places, accuracies, "o-", markersize=5, label=f"seed {seed}")
    chance = next(iter(runs.values()))["answers"]["all"]["chance"]
    axis.axhline(chance, color="#777777", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(METHODS)), METHODS)
    top = max(DRAWINGS["accuracy"](run) for run in runs.values())
    axis.set(xlim=(-0.3, len(METHODS) - 0.7), ylim=(0, 1.7 * top))
    axis.set_title(f"{style} captions: accuracy of answers (dashed: chance)", fontsize=10)
