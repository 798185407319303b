"""What tools/conflict.py does: the conflict as a table, a JSON file and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpa_xtuner.analysis.conflict import WORTH, Asked, Conflict, measure
from dpa_xtuner.analysis.fit import NEAR, Fit, recommend
from dpa_xtuner.analysis.words import CLASSES
from dpa_xtuner.errors import check_installed
from dpa_xtuner.files import prepare_to_write, write_json
from dpa_xtuner.layout import ALIGN
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.tables import markdown

Ranks = Mapping[float, Mapping[int, Fit]]
"""Fits by share and rank."""

REPORT_FILE = "conflict.json"
_PICTURES = ("without_picture", "own_picture", "other_picture", "blank_picture")
_COLUMNS = ("LLM", "captions", "held out", "original", "proxy", "conflict", "per caption")


def compare(
    config: Path,
    options: dict,
    captions: Sequence[str],
    llm: Sequence[str],
    samples: int,
    steps: int,
    ranks: Sequence[int],
    shares: Sequence[float],
    out: Path | None,
    work_dir: Path | None,
) -> str:
    """Measure the conflict and, of given ranks, the floor; add what a finished run has measured.

    Args:
        config: a DPA config.
        options: as of ``--cfg-options``.
        captions: files in place of the config's.
        llm: LLMs in place of the config's.
        samples: held-out captions to measure.
        steps: of a quick fit, at most.
        ranks: to compare.
        shares: of the captions, for each of the ranks; none for all captions.
        out: folder of the report; None for ``conflict`` in the work dir.
        work_dir: work dir of the run; None for ``work_dirs/<config's name>``.

    Returns:
        The tables, in Markdown.

    Raises:
        DPAError: settings, models or data can't be used, or matplotlib is missing.
    """
    check_installed("demo", "matplotlib")
    base = work_dir or Path(f"work_dirs/{config.stem}")
    out = out or base / "conflict"
    prepare_to_write(out / REPORT_FILE)
    asked = Asked(config, options, samples, steps, base)
    conflicts, floors = measure(asked, llm, captions, ranks, shares or [1.0])
    measured = {} if llm or captions else read_state(base / ALIGN).get("measured", {})
    return _write(out, conflicts, floors, measured if "leakage" in measured else {})


def _write(
    out: Path, conflicts: Sequence[Conflict], ranks: Ranks, leakage: Mapping[str, float]
) -> str:
    """Write ``conflict.json`` and ``conflict.png``; return the tables."""
    facts: dict[str, Any] = {"conflicts": [each.facts() for each in conflicts]}
    if ranks:
        facts["ranks"] = {str(share): _ranks(fits) for share, fits in ranks.items()}
    if leakage:
        facts["leakage"] = {name: leakage[name] for name in (*_PICTURES, "leakage")}
    write_json(out / REPORT_FILE, facts)
    draw(conflicts, ranks, out / "conflict.png")
    parts = [_conflicts(conflicts), _classes(conflicts)]
    parts += [_ranks_table(ranks, conflicts[0])] if ranks else []
    parts += [_leakage(leakage)] if leakage else []
    return "\n\n".join([*parts, f"Written: {out}/conflict.json, {out}/conflict.png"])


def _conflicts(conflicts: Sequence[Conflict]) -> str:
    rows = [
        (each.llm, each.captions, str(each.original.captions), *(f"{value:.3f}" for value in (
            each.original.per_token, each.proxy.per_token, each.per_token)),
         f"{each.per_caption:.1f}")
        for each in conflicts
    ]  # fmt: skip
    notes = [f"- {each.llm}, {each.captions}: {each.how}.{_advice(each)}" for each in conflicts]
    head = "Nats per token of held-out captions, text only\n\n"
    return head + markdown(_COLUMNS, rows) + "\n\n" + "\n".join(notes)


def _advice(conflict: Conflict) -> str:
    if conflict.per_token >= WORTH or (conflict.fitted and not conflict.fitted.converged):
        return ""
    return (
        f" The LLM writes like these captions already (less than {WORTH} nats per token): a proxy "
        f"has next to nothing to learn."
    )


def _classes(conflicts: Sequence[Conflict]) -> str:
    found = [each.facts()["classes"] for each in conflicts]
    kinds = [kind for kind in CLASSES if any(kind in one for one in found)]
    rows = [
        (kind, *(_of_class(one[kind]) if kind in one else "-" for one in found)) for kind in kinds
    ]
    names = _names(conflicts)
    head = "By word class: original - proxy = conflict, and tokens\n\n"
    return head + markdown(["class", *names], rows)


def _names(conflicts: Sequence[Conflict]) -> list[str]:
    """Name each by its LLM and captions: without folders, unless that is no name of its own."""
    llms = _without_folders([each.llm for each in conflicts])
    captions = _without_folders([each.captions for each in conflicts])
    return [f"{llm}, {files}" for llm, files in zip(llms, captions, strict=True)]


def _without_folders(names: list[str]) -> list[str]:
    short = [", ".join(Path(file).name for file in name.split(", ")) for name in names]
    return short if len(set(short)) == len(set(names)) else names


def _of_class(one: dict) -> str:
    difference = f"{one['original']:.2f} - {one['proxy']:.2f} = {one['conflict']:.2f}"
    return f"{difference} ({one['tokens']})"


def _ranks(fits: Mapping[int, Fit]) -> dict[str, Any]:
    each = {
        str(rank): {"floor": one.floor, "verdict": one.verdict, "curve": one.curve}
        for rank, one in fits.items()
    }
    return {"ranks": each, "recommended": recommend(fits)}


def _ranks_table(ranks: Ranks, of: Conflict) -> str:
    every = sorted({rank for fits in ranks.values() for rank in fits})
    rows = [
        (f"{share:g}", *(f"{fits[rank].floor:.3f}" for rank in every), str(recommend(fits)))
        for share, fits in ranks.items()
    ]
    notes = [
        f"- share {share:g}, rank {rank}: {one.verdict}"
        for share, fits in ranks.items()
        for rank, one in fits.items()
        if one.over_fits or not one.converged
    ]
    head = (
        f"The floor (held-out nats per token of the best step) by rank: {of.llm}, {of.captions}. "
        f"Recommended: the smallest rank within {NEAR:.0%} of the best\n\n"
    )
    table = markdown(["share", *map(str, every), "recommended"], rows)
    return head + table + "".join(f"\n{line}" for line in ["", *notes] if notes)


def _leakage(measured: Mapping[str, float]) -> str:
    rows = [(name.replace("_", " "), f"{measured[name]:.3f}") for name in _PICTURES]
    none, right, other, blank = (measured[name] for name in _PICTURES)
    return (
        "After align, as the run logged it: held-out captions under the original LLM\n\n"
        + markdown(["", "nats per token"], rows)
        + f"\n\nStyle leakage: another picture takes {none - other:.3f} nats off, a blank one "
        f"{none - blank:.3f}; the right one {other - right:.3f} more than another."
    )


def draw(conflicts: Sequence[Conflict], ranks: Ranks, file: Path) -> None:
    """Plot each conflict by word class and its fit's curve, and the floors by rank.

    Args:
        conflicts: a row each.
        ranks: a row below them; may be empty.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(conflicts) + bool(ranks)
    figure = Figure(figsize=(12, 3.6 * count), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, 2, squeeze=False)
    for (left, right), one, name in zip(grid, conflicts, _names(conflicts), strict=False):
        _draw_classes(left, one, name)
        _draw_curve(right, one)
    if ranks:
        _draw_ranks(grid[-1, 0], grid[-1, 1], ranks)
    figure.savefig(file, dpi=110)


def _draw_classes(axes, one: Conflict, name: str) -> None:
    before, after = one.original.by_class(), one.proxy.by_class()
    places = np.arange(len(before))
    axes.bar(places - 0.2, before.values(), 0.4, label="original LLM", color="#b0b0b0")
    axes.bar(places + 0.2, after.values(), 0.4, label="proxy", color="#e15a00")
    names = [f"{kind}\n{one.original.tokens[kind]}".replace(" ", "\n") for kind in before]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_ylabel("nats per token")
    axes.set_title(
        f"{name}: {one.original.per_token:.2f} - {one.proxy.per_token:.2f} = {one.per_token:.2f}",
        fontsize=10,
    )
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(frameon=False, ncols=2, loc="upper right")


def _draw_curve(axes, one: Conflict) -> None:
    if one.fitted is None:
        axes.axis("off")
        axes.text(0.5, 0.5, one.how, ha="center", wrap=True)
        return
    curve = one.fitted.curve
    axes.plot(list(curve), list(curve.values()), "o-", color="#e15a00")
    axes.set_ylim(0, 1.05 * max(curve.values()))
    axes.set_xlabel("steps of the fit")
    axes.set_ylabel("held-out nats per token")
    axes.set_title(one.how, fontsize=10)


def _draw_ranks(left, right, ranks: Ranks) -> None:
    for share, fits in ranks.items():
        places = sorted(fits)
        floors = [fits[rank].floor for rank in places]
        left.plot(places, floors, "o-", label=f"share {share:g}: rank {recommend(fits)}")
    left.set_xscale("log", base=2)
    every = sorted({rank for fits in ranks.values() for rank in fits})
    left.set_xticks(every, [str(rank) for rank in every])
    left.set_xlabel("rank")
    left.set_ylabel("floor, nats per token")
    left.legend(frameon=False, title="recommended")
    largest = max(ranks)
    for rank, one in ranks[largest].items():
        right.plot(list(one.curve), list(one.curve.values()), ".-", label=f"rank {rank}")
    right.set_xlabel("steps of the fit")
    right.set_ylabel("held-out nats per token")
    right.set_title(f"share {largest:g}", fontsize=10)
    right.legend(frameon=False)
