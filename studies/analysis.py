"""What the runs say: their measures, and how they differ, seed by seed."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import t as student

from studies.openmoji.plan import BUDGETS, Run, load
from studies.plan import BASE, METHODS, VARIANTS, Cell, read_runs

OTHERS = METHODS[1:]
"""The methods but vanilla, which all are compared with."""


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

    def extra_gain(
        self,
        first: tuple[Cell, Cell],
        second: tuple[Cell, Cell],
        among: Sequence[int] | None = None,
    ) -> Interval | None:
        """Tell how much more a cell gains over another than in a second pair, seed by seed."""
        cells = [*first, *second]
        shared = set.intersection(*(set(self.seeds(cell)) for cell in cells))
        if not (seeds := sorted(shared if among is None else shared & set(among))):
            return None
        a, b, c, d = (np.array(self.values(each, "over tune", seeds)) for each in cells)
        return Interval.of((a - b) - (c - d))

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


def number(value: float | None) -> str:
    """Write a value with two decimals; a dash where there is none."""
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def vanilla_of(cell: Cell) -> Cell:
    """Return the run of vanilla that another run is compared with."""
    return replace(cell, method="vanilla", variant=BASE.get(cell.variant, ""))


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
        if set(among) <= set(results.seeds(cell, vanilla_of(cell)))
        if (gain := results.gain(cell, vanilla_of(cell), "over tune", among))
    }
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


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
