"""Make the tables and pictures of docs/results.md from results files.

    python -m studies.report                      # studies/results/*.jsonl into docs/results.md
    python -m studies.report --results DIR --page PAGE.md --study smallest

A block of the page, between `<!-- NAME -->` and `<!-- end -->`, is replaced by the table NAME.
"""

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import t as student

from dpa_xtuner.files import write_text
from dpa_xtuner.tables import markdown
from studies.openmoji.plan import ADDED_SEEDS, ADDED_STYLES, BUDGETS, Run, load, planned
from studies.openmoji.plan import SEEDS as FIRST_SEEDS
from studies.openmoji.styles import STYLES
from studies.plan import BASE, FINDINGS, METHODS, SEEDS, STUDIES, VARIANTS, Cell, read_runs

ROOT = Path(__file__).resolve().parents[1]
OTHERS = METHODS[1:]
"""The methods but vanilla, which all are compared with."""
COLOURS = dict(zip(METHODS, ("#777777", "#1f77b4", "#e15a00", "#7b3294", "#2a9d4a"), strict=True))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval":
        """Compute it; with a single value the interval has no width to be told."""
        found = np.array(list(values), float)
        n = len(found)
        half = student.ppf(0.975, n - 1) * found.std(ddof=1) / n**0.5 if n > 1 else float("nan")
        return cls(float(found.mean()), float(half), n)

    def __str__(self) -> str:
        width = f" ± {self.half:.3f}" if self.seeds > 1 else ""
        return f"{self.mean:+.3f}{width} ({self.seeds})"

    @property
    def clear(self) -> bool:
        """Whether it is of three seeds or more, and leaves out 0."""
        return self.seeds > 2 and abs(self.mean) > self.half


class Results:
    """The measured runs of a protocol, by cell.

    Args:
        folder: of the results files; all are merged.
        protocol: hash of the protocol; lines of others are left out.

    Raises:
        SystemExit: runs of a seed have different worlds.
    """

    def __init__(self, folder: Path, protocol: str):
        self.runs = read_runs(folder, protocol)
        worlds: dict[int, dict[str, str]] = {}
        for cell, line in self.runs.items():
            worlds.setdefault(cell.seed, {})[line.get("world", "")] = line["file"]
        for seed, files in worlds.items():
            if len(files) > 1:
                raise SystemExit(
                    f"{folder}: the runs of seed {seed} have different LLMs or encoders, so they "
                    f"can't be compared. Keep those of one: see {', '.join(files.values())}."
                )

    def seeds(self, cell: Cell, other: Cell | None = None) -> list[int]:
        """List the seeds for which a cell, and another, were run."""
        wanted = [cell] if other is None else [cell, other]
        every = sorted({known.seed for known in self.runs})
        return [s for s in every if all(replace(each, seed=s) in self.runs for each in wanted)]

    def values(self, cell: Cell, measure: str, seeds: list[int]) -> list[float]:
        """Return a measure of a cell for each of some seeds."""
        return [MEASURES[measure](self.runs[replace(cell, seed=s)]) for s in seeds]

    def mean(self, cell: Cell, measure: str) -> float | None:
        """Average a measure over all seeds; None where there are none."""
        seeds = self.seeds(cell)
        return float(np.mean(self.values(cell, measure, seeds))) if seeds else None

    def gain(
        self, cell: Cell, base: Cell, measure: str, among: list[int] | None = None
    ) -> Interval | None:
        """Compare a cell with another, seed by seed, among all seeds or some."""
        seeds = [s for s in self.seeds(cell, base) if among is None or s in among]
        if not seeds:
            return None
        pairs = zip(
            self.values(cell, measure, seeds), self.values(base, measure, seeds), strict=True
        )
        return Interval.of(a - b for a, b in pairs)

    def curve(self, cell: Cell, key: str) -> tuple[list[int], list[float]]:
        """Average what was seen over the steps of `tune`: steps, and a mean for each."""
        runs = [self.runs[replace(cell, seed=s)]["tune"] for s in self.seeds(cell)]
        looks = [[look[key] for look in run["looks"]] for run in runs]
        means = [
            float(np.mean(known)) if (known := [v for v in at if v is not None]) else float("nan")
            for at in zip(*looks, strict=True)
        ]
        return runs[0]["steps"], means

    def levels(self, **how) -> list[int]:
        """List the levels that were run with some settings."""
        cells = [c for c in self.runs if all(getattr(c, k) == v for k, v in how.items())]
        return sorted({cell.level for cell in cells})


def _accuracies(run: dict) -> list[float]:
    return [look["accuracy"] for look in run["tune"]["looks"]]


def _area(run: dict) -> float:
    steps = run["tune"]["steps"]
    return float(trapezoid(_accuracies(run), steps) / (steps[-1] - steps[0]))


MEASURES: dict[str, Callable[[dict], float]] = {
    "after align": lambda run: _accuracies(run)[0],
    "over tune": _area,
    "at the end": lambda run: _accuracies(run)[-1],
    "leakage": lambda run: run["measured"]["leakage"],
    "picture": lambda run: run["measured"]["other_picture"] - run["measured"]["own_picture"],
    "conflict": lambda run: run["measured"]["original"] - run["measured"]["floor"],
    "conflict per caption": lambda run: MEASURES["conflict"](run) * (run["caption_tokens"] - 1),
    "original": lambda run: run["measured"]["original"],
    "floor": lambda run: run["measured"]["floor"],
    "below the floor": lambda run: run["measured"]["floor"] - run["measured"]["align"],
    "reads": lambda run: run["measured"]["proxy_reads"],
}
"""What a run is judged by. *over tune* is the area under the curve of accuracy over the steps."""


def tables(results: Results) -> dict[str, str]:
    """Make all tables, by the name of their block."""
    return {
        "runs": _runs(results),
        "claim": _claim(results),
        "replication": _findings(results, FINDINGS["replication"], *SETS[:2]),
        "gentle": _findings(results, FINDINGS["gentle"], *SETS[1:]),
        "conflict": _conflict(results),
        "gains": _gains(results, "over tune"),
        "gains after align": _gains(results, "after align"),
        "gains at the end": _gains(results, "at the end"),
        "accuracy": _accuracy(results),
        "leakage": _leakage(results),
        "proxies": _proxies(results),
        "variants": _variants(results),
        "batches": _batches(results),
        "shares": _shares(results),
        "mechanism": _mechanism(results),
    }


def _runs(results: Results) -> str:
    rows = [
        (level, *(len(results.seeds(Cell(level, method, 0))) for method in METHODS))
        for level in results.levels(share=1.0, variant="")
    ]
    seconds = [run["seconds"] for run in results.runs.values()]
    llm = min(run["llm_accuracy"] for run in results.runs.values())
    machines = "; ".join(sorted({run["machine"] for run in results.runs.values()}))
    return (
        f"{len(results.runs)} runs of {np.median(seconds):.0f} s (median), on {machines}. The "
        f"original LLMs get at least {llm:.1%} of the words right that a description tells.\n\n"
        + _table(["level", *(f"seeds of {method}" for method in METHODS)], rows)
    )


def _claim(results: Results) -> str:
    """Tell what a method gains without a conflict and with the strongest one, by set of seeds."""
    levels = results.levels(method="vanilla", share=1.0, variant="")
    weak, strong = levels[0], levels[-1]
    groups: dict[str, list[int] | None] = {**_named(*SETS[:2]), "all": None}
    rows = []
    for method, level in itertools.product(OTHERS, (weak, strong)):
        cell, base = Cell(level, method, 0), Cell(level, "vanilla", 0)
        gains = [results.gain(cell, base, "over tune", group) for group in groups.values()]
        less = _pair(replace(cell, level=weak))
        more = _more(results, _pair(cell), less) if level == strong else None
        rows.append((method, level, *map(_gain, gains), _gain(more)))
    return _table(["method", "level", *groups, f"level {strong} minus level {weak}"], rows)


SETS = ([*SEEDS["planned"], *SEEDS["added"]], [*SEEDS["replication"]], [*SEEDS["gentle"]])
"""Seeds that were run together."""


def _named(*sets: Sequence[int]) -> dict[str, list[int]]:
    return {f"seeds {seeds[0]} - {seeds[-1]}": [*seeds] for seeds in sets}


def _findings(
    results: Results, findings: dict[str, tuple[Cell, Cell]], first: list[int], second: list[int]
) -> str:
    """Tell which findings of the first seeds the second show again."""
    rows = []
    for name, (ahead, behind) in findings.items():
        gains = [results.gain(ahead, behind, "over tune", seeds) for seeds in (first, second)]
        again, wanted = gains[1], len(second)
        shown = "not run" if again is None else f"{again.seeds} of {wanted} seeds"
        if again and again.seeds == wanted:
            shown = "yes" if again.clear and again.mean > 0 else "no"
        named = f"{ahead.variant or ahead.method} - {behind.variant or behind.method}"
        control = replace(ahead, level=0), replace(behind, level=0)
        more = _more(results, (ahead, behind), control, second) if ahead.level else None
        rows.append((name, ahead.level, named, *map(_gain, gains), shown, _gain(more)))
    head = ["", "level", "difference", *_named(first, second), "shown", "minus level 0"]
    return _table(head, rows)


def _more(
    results: Results,
    first: tuple[Cell, Cell],
    second: tuple[Cell, Cell],
    among: Sequence[int] | None = None,
) -> Interval | None:
    """Tell how much more a cell gains over another than in a second pair, seed by seed."""
    cells = [*first, *second]
    shared = set.intersection(*(set(results.seeds(cell)) for cell in cells))
    if not (seeds := sorted(shared if among is None else shared & set(among))):
        return None
    a, b, c, d = (np.array(results.values(each, "over tune", seeds)) for each in cells)
    return Interval.of((a - b) - (c - d))


def _conflict(results: Results) -> str:
    rows = []
    for level in results.levels(method="pmo", share=1.0, variant=""):
        names = ("original", "floor", "conflict", "conflict per caption", "reads")
        rows.append((level, *(_number(results.mean(Cell(level, "pmo", 0), n)) for n in names)))
    head = [
        "level",
        "original LLM",
        "proxy (floor)",
        "conflict",
        "conflict per caption",
        "proxy reads",
    ]
    return _table(head, rows)


def _gains(results: Results, measure: str) -> str:
    rows = []
    for level in results.levels(method="vanilla", share=1.0, variant=""):
        base = Cell(level, "vanilla", 0)
        gains = [_gain(results.gain(Cell(level, m, 0), base, measure)) for m in OTHERS]
        gains.append(_gain(results.gain(Cell(level, "dpa", 0), Cell(level, "pmo", 0), measure)))
        rows.append((level, _number(results.mean(base, measure)), *gains))
    return _table(["level", "vanilla", *(f"{m} - vanilla" for m in OTHERS), "dpa - pmo"], rows)


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    return markdown(head, [[str(cell) for cell in row] for row in rows])


def _gain(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"**{found}**" if found.clear else str(found)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def _accuracy(results: Results) -> str:
    rows = []
    for level in results.levels(share=1.0, variant=""):
        for method in METHODS:
            if results.seeds(cell := Cell(level, method, 0)):
                steps, means = results.curve(cell, "accuracy")
                rows.append((level, method, len(results.seeds(cell)), *map(_number, means)))
    if not rows:
        return "Not run."
    return _table(["level", "method", "seeds", *map(str, steps)], rows)


def _leakage(results: Results) -> str:
    rows = []
    for level in results.levels(share=1.0, variant=""):
        for method in METHODS:
            cell = Cell(level, method, 0)
            found = [results.mean(cell, name) for name in ("leakage", "picture", "after align")]
            if found[0] is not None:
                rows.append((level, method, *map(_number, found)))
    return _table(["level", "method", "leakage", "picture", "accuracy after align"], rows)


def _variants(results: Results) -> str:
    rows = []
    for name, (method, _) in VARIANTS.items():
        for level in results.levels(variant=name):
            cell, plain = Cell(level, method, 0, 1.0, name), Cell(level, method, 0)
            base = _base(cell)
            rows.append((
                name, level, _number(results.mean(cell, "over tune")),
                _gain(results.gain(cell, base, "over tune")),
                "-" if base.variant else _gain(results.gain(cell, plain, "over tune")), method,
                _gain(results.gain(cell, replace(plain, method="pmo"), "over tune"))
                if method == "dpa" else "-",
                _number(results.mean(cell, "at the end")),
                _gain(results.gain(cell, base, "at the end")),
            ))  # fmt: skip
    if not rows:
        return "Not run."
    head = ["variant", "level", "over tune", "- vanilla", "- its method", "its method", "- pmo",
            "at the end", "at the end - vanilla"]  # fmt: skip
    return _table(head, rows)


def _base(cell: Cell) -> Cell:
    """Return the run of vanilla that another run is compared with."""
    return replace(cell, method="vanilla", variant=BASE.get(cell.variant, ""))


def _pair(cell: Cell) -> tuple[Cell, Cell]:
    return cell, _base(cell)


def _proxies(results: Results) -> str:
    rows = []
    for level in results.levels(variant="gentle_proxy"):
        seeds = results.seeds(Cell(level, "pmo", 0, 1.0, "gentle_proxy"), Cell(level, "pmo", 0))
        for name in ("gentle_proxy", "", "forgetful_proxy"):
            cell, base = Cell(level, "pmo", 0, 1.0, name), Cell(level, "vanilla", 0)
            if shared := [seed for seed in seeds if seed in results.seeds(cell, base)]:
                measures = ("floor", "reads", "picture", "over tune")
                means = [float(np.mean(results.values(cell, m, shared))) for m in measures]
                gain = _gain(results.gain(cell, base, "over tune", shared))
                rows.append((level, name or "pmo", *map(_number, means), gain))
    if not rows:
        return "Not run."
    head = ["level", "run", "floor", "proxy reads", "picture", "over tune", "- vanilla"]
    return _table(head, rows)


def _batches(results: Results) -> str:
    rows = []
    for level in results.levels(variant="small_batches"):
        plain = Cell(level, "pmo", 0)
        seeds = results.seeds(replace(plain, variant="small_batches"), plain)
        for name in ("", "small_batches", "gentle_small_batches"):
            cell = replace(plain, variant=name)
            base = _base(cell)
            if shared := [seed for seed in seeds if seed in results.seeds(cell, base)]:
                below = np.mean(results.values(cell, "below the floor", shared))
                means = [np.mean(results.values(c, "over tune", shared)) for c in (cell, base)]
                known = map(_number, map(float, (below, *means)))
                gain = results.gain(cell, base, "over tune", shared)
                more = _more(results, _pair(cell), _pair(plain)) if name else None
                rows.append((level, name or "pmo", *known, _gain(gain), _gain(more)))
    if not rows:
        return "Not run."
    head = ["level", "run", "below the floor", "over tune", "its vanilla", "- its vanilla",
            "more than pmo's gain"]  # fmt: skip
    return _table(head, rows)


def _shares(results: Results) -> str:
    rows = []
    shares = sorted({cell.share for cell in results.runs if not cell.variant})
    levels = results.levels(share=shares[0]) if len(shares) > 1 else []
    for level in levels:
        for share in shares:
            base = Cell(level, "vanilla", 0, share)
            if (value := results.mean(base, "over tune")) is not None:
                gains = [results.gain(Cell(level, m, 0, share), base, "over tune") for m in OTHERS]
                rows.append((level, f"{share:.0%}", _number(value), *map(_gain, gains)))
    if not rows:
        return "Not run."
    return _table(["level", "share", "vanilla", *(f"{m} - vanilla" for m in OTHERS)], rows)


def _mechanism(results: Results) -> str:
    rows = []
    for level in results.levels(share=1.0, variant=""):
        for method in METHODS:
            if not results.seeds(cell := Cell(level, method, 0)):
                continue
            for key in ("learned", "d_learned", "d_unlearned"):
                steps, means = results.curve(cell, key)
                rows.append((level, method, key, *map(_number, means)))
    return _table(["level", "method", "", *map(str, steps)], rows) if rows else "Not run."


DRAWINGS: dict[str, Callable[[dict], float]] = {
    **{name: MEASURES[name] for name in ("conflict", "floor")},
    "align": lambda run: run["measured"]["align"],
    **{name: MEASURES[name] for name in ("leakage", "picture")},
    "accuracy": lambda run: run["answers"]["all"]["accuracy"],
    "nats": lambda run: run["answers"]["all"]["with_picture"],
}
"""What a run with SmolLM2 and drawings is judged by."""


def drawn_runs(folder: Path) -> dict[str, dict[Run, dict]]:
    """Read the runs of the study with drawings, by budget."""
    return {name: load(folder, BUDGETS[name].protocol) for name in ("large", "small")}


def drawings(folder: Path) -> dict[str, str]:
    """Make the tables of the study with drawings: one for each budget, and one of the seeds."""
    found = drawn_runs(folder)
    made = {f"openmoji {name}": _drawings(found[name], planned(name)) for name in found}
    return made | {"openmoji seeds": _drawn_seeds(found["small"])}


def _drawings(every: dict[Run, dict], plan: list[Run]) -> str:
    runs = {run: every[run] for run in plan if run in every}
    others = ", ".join(sorted(run.name for run in every if run not in runs))
    left_out = [f"Left out, since not planned: {others}."] if others else []
    if not runs:
        return "\n\n".join(["Not run.", *left_out])
    rows = []
    for style, method in dict.fromkeys((run.style, run.method) for run in plan):
        mine = {run.seed: runs[run] for run in runs if (run.style, run.method) == (style, method)}
        wanted = [run.seed for run in plan if (run.style, run.method) == (style, method)]
        absent = [seed for seed in wanted if seed not in mine]
        means = [
            f"{np.mean([value(run) for run in mine.values()]):.3f}" if mine else "-"
            for value in DRAWINGS.values()
        ]
        gains = [
            "-" if method == "vanilla"
            else _drawn_gain(runs, style, (method, "vanilla"), name, wanted)
            for name in ("accuracy", "nats")
        ]  # fmt: skip
        listed = [", ".join(map(str, sorted(seeds))) for seeds in (mine, absent)]
        rows.append((style, method, *listed, *means, *gains))
    head = ["captions", "method", "seeds", "missing", *DRAWINGS]
    head += ["accuracy - vanilla", "nats - vanilla"]
    where: dict[str, list[str]] = {}
    for run, known in sorted(runs.items(), key=lambda item: item[0].name):
        where.setdefault(known["machine"], []).append(run.name)
    seconds = np.median([sum(known["seconds"].values()) for known in runs.values()])
    return "\n\n".join([
        f"{len(runs)} runs of {seconds:.0f} s (median, with the proxy's); "
        f"{len(plan) - len(runs)} are missing.",
        _table(head, rows),
        *(f"Ran on {machine}: {', '.join(names)}." for machine, names in where.items()),
        *left_out,
    ])  # fmt: skip


def _drawn_gain(
    runs: dict[Run, dict], style: str, pair: tuple[str, str], measure: str, seeds: Iterable[int]
) -> str:
    """Compare two methods with drawings, seed by seed."""
    value, found = DRAWINGS[measure], []
    for seed in seeds:
        first, second = (runs.get(Run(style, method, seed)) for method in pair)
        if first and second:
            found.append(value(first) - value(second))
    return _gain(Interval.of(found) if found else None)


def _drawn_seeds(runs: dict[Run, dict]) -> str:
    """Tell what the first seeds gave, and those added later."""
    sets = _named(FIRST_SEEDS, ADDED_SEEDS) | {"all": [*FIRST_SEEDS, *ADDED_SEEDS]}
    pairs = (("pmo", "vanilla"), ("dpa", "vanilla"), ("dpa", "pmo"))
    rows = [
        (style, measure, " - ".join(pair), *(_drawn_gain(runs, style, pair, measure, seeds)
                                             for seeds in sets.values()))
        for style, measure, pair in itertools.product(ADDED_STYLES, ("accuracy", "nats"), pairs)
    ]  # fmt: skip
    return _table(["captions", "measure", "difference", *sets], rows)


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
        "rate 5e-4, batches of 32": {"pmo": "", "dpa": ""},
        "rate 2e-4, batches of 8": {
            "pmo": "gentle_small_batches",
            "dpa": "gentle_small_batches_dpa",
        },
    }
    if results.levels(variant="gentle_small_batches_dpa"):
        write("gentle", [partial(_draw_gentle, results, way, title) for title, way in ways.items()])
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
    axis.set_xticks(range(len(levels)), [f"{level}\n{_number(nats)}" for level, nats in named])
    axis.set_xlabel("level, and conflict in nats per caption")
    what = "leakage, nats per token" if measure == "leakage" else f"accuracy {measure}"
    axis.set_title(f"{what}: minus vanilla", fontsize=10)


def _draw_gentle(results: Results, variants: dict[str, str], title: str, axis) -> None:
    """Draw what PMO and DPA gain when they are trained in one way."""
    levels = results.levels(variant="gentle_small_batches")
    cells = {
        method: [Cell(level, method, 0, variant=name) for level in levels]
        for method, name in variants.items()
    }
    _draw_difference(results, axis, "over tune", cells)
    axis.set_xticks(range(len(levels)), levels)
    axis.set(xlabel="level", ylim=(-0.2, 0.2))
    axis.set_title(f"{title}: accuracy over tune, minus vanilla", fontsize=9)


def _draw_difference(results: Results, axis, measure: str, cells: dict[str, list[Cell]]) -> None:
    """Draw what the cells of each method gain over their vanilla, one beside the other."""
    axis.axhline(0, color="#777777", linewidth=1)
    for shift, (method, wanted) in enumerate(cells.items()):
        found = [
            (i, gain)
            for i, cell in enumerate(wanted)
            if (gain := results.gain(cell, _base(cell), measure))
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


def gains_of_variants(results: Results, level: int) -> dict[str, Interval]:
    """Compare methods and variants with vanilla, over `tune`; the smallest gain comes first.

    Only seeds count that most variants of the level were run with. Variants that lack one of them
    are left out.
    """
    varied = {
        replace(cell, seed=0) for cell in results.runs if cell.variant and cell.level == level
    }
    counts = Counter(seed for cell in varied for seed in results.seeds(cell))
    among = sorted(seed for seed, count in counts.items() if 2 * count > len(varied))
    cells = {method: Cell(level, method, 0) for method in OTHERS}
    cells |= {
        name: Cell(level, method, 0, 1.0, name)
        for name, (method, _) in VARIANTS.items()
        if name not in BASE.values()
    }
    found = {
        name: gain
        for name, cell in cells.items()
        if set(among) <= set(results.seeds(cell, _base(cell)))
        if (gain := results.gain(cell, _base(cell), "over tune", among))
    }
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


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
        if found:
            axis.plot(*zip(*found, strict=True), "o-", markersize=5, label=f"seed {seed}")
    chance = next(iter(runs.values()))["answers"]["all"]["chance"]
    axis.axhline(chance, color="#777777", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(METHODS)), METHODS)
    top = max(DRAWINGS["accuracy"](run) for run in runs.values())
    axis.set(xlim=(-0.3, len(METHODS) - 0.7), ylim=(0, 1.45 * top))
    axis.set_title(f"{style} captions: accuracy of answers (dashed: chance)", fontsize=10)


def fill(page: str, made: dict[str, str]) -> str:
    """Replace the blocks of a page by tables of their names."""
    for name, table in made.items():
        block = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if found := block.search(page):
            page = f"{page[: found.end(1)]}\n{table}\n\n{page[found.start(2) :]}"
    return page


def main() -> None:
    """Write tables and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "studies" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--study", choices=STUDIES, default="full")
    given = parser.parse_args()
    results = Results(given.results, STUDIES[given.study].sizes.protocol)
    if not results.runs:
        raise SystemExit(f"No results of {given.study} in {given.results}: run it first.")
    made = tables(results) | drawings(given.results)
    write_text(given.page, fill(given.page.read_text(encoding="utf-8"), made))
    draw(results, drawn_runs(given.results), given.page.parent)
    print("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()))


if __name__ == "__main__":
    main()
