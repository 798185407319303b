"""The tables of docs/results.md."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dpa_xtuner.tables import markdown
from studies.analysis import (
    DRAWINGS,
    OTHERS,
    Interval,
    Results,
    drawn_runs,
    number,
    vanilla_of,
)
from studies.openmoji.plan import ADDED, Run, planned
from studies.openmoji.plan import SEEDS as FIRST_SEEDS
from studies.plan import FINDINGS, METHODS, SEEDS, VARIANTS, Cell


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


SETS = ([*SEEDS["planned"], *SEEDS["added"]], [*SEEDS["replication"]], [*SEEDS["gentle"]])
"""Seeds that were run together."""


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
        less = replace(cell, level=weak), replace(base, level=weak)
        more = results.extra_gain((cell, base), less) if level == strong else None
        rows.append((method, level, *map(_gain, gains), _gain(more)))
    return _table(["method", "level", *groups, f"level {strong} minus level {weak}"], rows)


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
        more = results.extra_gain((ahead, behind), control, second) if ahead.level else None
        rows.append((name, ahead.level, named, *map(_gain, gains), shown, _gain(more)))
    head = ["", "level", "difference", *_named(first, second), "shown", "minus level 0"]
    return _table(head, rows)


def _conflict(results: Results) -> str:
    rows = []
    for level in results.levels(method="pmo", share=1.0, variant=""):
        names = ("original", "floor", "conflict", "conflict per caption", "reads")
        rows.append((level, *(number(results.mean(Cell(level, "pmo", 0), n)) for n in names)))
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
        rows.append((level, number(results.mean(base, measure)), *gains))
    return _table(["level", "vanilla", *(f"{m} - vanilla" for m in OTHERS), "dpa - pmo"], rows)


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    return markdown(head, [[str(cell) for cell in row] for row in rows])


def _gain(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"**{found}**" if found.clear else str(found)


def _accuracy(results: Results) -> str:
    rows = []
    for level in results.levels(share=1.0, variant=""):
        for method in METHODS:
            if results.seeds(cell := Cell(level, method, 0)):
                steps, means = results.curve(cell, "accuracy")
                rows.append((level, method, len(results.seeds(cell)), *map(number, means)))
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
                rows.append((level, method, *map(number, found)))
    return _table(["level", "method", "leakage", "picture", "accuracy after align"], rows)


def _variants(results: Results) -> str:
    rows = []
    for name, (method, _) in VARIANTS.items():
        for level in results.levels(variant=name):
            cell, plain = Cell(level, method, 0, 1.0, name), Cell(level, method, 0)
            base = vanilla_of(cell)
            rows.append((
                name, level, number(results.mean(cell, "over tune")),
                _gain(results.gain(cell, base, "over tune")),
                "-" if base.variant else _gain(results.gain(cell, plain, "over tune")), method,
                _gain(results.gain(cell, replace(plain, method="pmo"), "over tune"))
                if method == "dpa" else "-",
                number(results.mean(cell, "at the end")),
                _gain(results.gain(cell, base, "at the end")),
            ))  # fmt: skip
    if not rows:
        return "Not run."
    head = ["variant", "level", "over tune", "- vanilla", "- its method", "its method", "- pmo",
            "at the end", "at the end - vanilla"]  # fmt: skip
    return _table(head, rows)


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
                rows.append((level, name or "pmo", *map(number, means), gain))
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
            base = vanilla_of(cell)
            if shared := [seed for seed in seeds if seed in results.seeds(cell, base)]:
                below = np.mean(results.values(cell, "below the floor", shared))
                means = [np.mean(results.values(c, "over tune", shared)) for c in (cell, base)]
                known = map(number, map(float, (below, *means)))
                gain = results.gain(cell, base, "over tune", shared)
                more = (
                    results.extra_gain((cell, base), (plain, vanilla_of(plain))) if name else None
                )
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
                rows.append((level, f"{share:.0%}", number(value), *map(_gain, gains)))
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
                rows.append((level, method, key, *map(number, means)))
    return _table(["level", "method", "", *map(str, steps)], rows) if rows else "Not run."


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
    pairs = (("pmo", "vanilla"), ("dpa", "vanilla"), ("dpa", "pmo"))
    rows = []
    for (style, (_, added)), measure in itertools.product(ADDED.items(), ("accuracy", "nats")):
        for pair in pairs:
            first, alone, both = (
                _drawn_gain(runs, style, pair, measure, seeds)
                for seeds in (FIRST_SEEDS, added, (*FIRST_SEEDS, *added))
            )
            rows.append((style, measure, " - ".join(pair), first, *_named(added), alone, both))
    head = ["captions", "measure", "difference", *_named(FIRST_SEEDS), "added", "these alone"]
    return _table([*head, "all"], rows)
