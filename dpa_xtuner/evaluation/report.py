"""The table: models by benchmarks in the paper's column order, means, and the paper's own rows."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpa_xtuner import tables
from dpa_xtuner.evaluation.benchmarks import KINDS, PAPER, Benchmark
from dpa_xtuner.evaluation.text_benchmarks import TEXT_KINDS, TextBenchmark
from dpa_xtuner.files import read_json, write_json, write_text

PAPER_MEANS = {
    "Qwen2.5-7B": {"vanilla": 49.0, "CAL": 51.0, "DPA": 51.7},
    "Llama-3.1-8B": {"vanilla": 47.0, "CAL": 46.0, "DPA": 49.9},
    "Gemma-2-9B": {"vanilla": 48.2, "CAL": 47.4, "DPA": 50.0},
}
"""Means over the seven benchmarks as reported (arXiv 2509.14735), captions from ShareGPT4V-PT."""

OWN_METRIC = "its metric"
"""Says that a benchmark is scored without a judge model anyway."""

Details = dict[tuple[str, str], list[dict]]
"""(model's label, data set) -> samples, as the evaluators list them."""

LISTED = 20
"""Failed samples of a benchmark that the Markdown lists; the JSON has all."""


@dataclass(frozen=True)
class Result:
    """What a model got on a benchmark.

    Attributes:
        score: 0 - 100; None where a task failed.
        samples: How many were asked.
        failed: Those that could not be answered, and count as wrong: ``dataset``, ``index`` and
            ``reason`` of each.
        metrics: The evaluator's numbers by data set.
        error: What should make the command fail: tasks that failed, with their log files, and
            data sets of which no sample could be answered.
    """

    score: float | None
    samples: int = 0
    failed: list[dict] = field(default_factory=list)
    metrics: dict[str, dict] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Report:
    """An evaluation of models.

    Attributes:
        models: Label -> benchmark's name -> result.
        benchmarks: The columns, in order.
        limit: Questions or groups asked of each data set at most; None for all.
        left_out: Lines on benchmarks that were asked for and have no files.
        other_files: Lines on data files that are not the published ones.
        notes: Other lines for who reads the table.
        sources: Label -> ``folder``, and ``abbr``, OpenCompass's name of it.
        compared: Label -> label of the model that it is compared to; else the first.
    """

    models: dict[str, dict[str, Result]]
    benchmarks: Sequence[Benchmark | TextBenchmark]
    limit: int | None = None
    left_out: list[str] = field(default_factory=list)
    other_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    compared: dict[str, str] = field(default_factory=dict)

    def columns(self) -> list[tuple[str, list[str]]]:
        """Titles and the benchmarks whose scores' mean each shows: one, a kind's, or all.

        Answers and likelihoods have no common mean: their difference is what they are asked for.
        """
        columns = []
        for kind in (*KINDS, *TEXT_KINDS):
            of_kind = [b for b in self.benchmarks if b.kind == kind]
            columns += [(b.title, [b.name]) for b in of_kind]
            if len(of_kind) > 1:
                columns.append((f"{kind} ({len(of_kind)})", [b.name for b in of_kind]))
        if {b.kind for b in self.benchmarks} == set(KINDS):
            names = [b.name for b in self.benchmarks]
            columns.append((f"all ({len(names)})", names))
        return columns

    def is_papers(self) -> bool:
        """Whether the paper's means are means of the same benchmarks, asked in full."""
        whole = self.limit is None and not self.other_files
        return whole and {b.name for b in self.benchmarks} == set(PAPER)

    def scores(self, label: str) -> list[float | None]:
        """A model's scores, one for each of the columns."""
        results = self.models[label]
        return [mean([results[name].score for name in names]) for _, names in self.columns()]

    def reference(self, label: str) -> str | None:
        """The model that another is compared to; None if it is that one itself."""
        reference = self.compared.get(label, next(iter(self.models)))
        return None if reference == label else reference

    def failures(self) -> list[str]:
        """What should make the command fail: a line for each model and benchmark in trouble."""
        lines = []
        for label, results in self.models.items():
            for name, result in results.items():
                if result.error:
                    lines.append(f"{label}, {name}: {result.error}")
        return lines


def mean(scores: Sequence[float | None]) -> float | None:
    """The mean; None where a score is missing."""
    return None if None in scores else sum(scores) / len(scores)


def markdown(report: Report) -> str:
    """The report as Markdown, for the screen and for a file."""
    columns = report.columns()
    header = ["", *(title for title, _ in columns)]
    rows = []
    for label in report.models:
        scores = report.scores(label)
        rows.append([label, *map(_number, scores)])
        if reference := report.reference(label):
            pairs = zip(scores, report.scores(reference), strict=True)
            rows.append(["difference", *(_difference(*pair) for pair in pairs)])
    chance = {benchmark.name: benchmark.chance for benchmark in report.benchmarks}
    if None not in chance.values():
        means = [mean([chance[name] for name in names]) for _, names in columns]
        rows.append(["chance", *map(_number, means)])
    if report.is_papers():
        for llm, means in PAPER_MEANS.items():
            empty = [""] * (len(columns) - 1)
            rows += [[f"paper: {llm}, {method}", *empty, f"{m:.1f}"] for method, m in means.items()]
    parts = [
        tables.markdown(header, rows),
        tables.markdown(*_asked(report)),
        "\n".join(_lines(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _asked(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what was asked: a row for each benchmark."""
    rows = []
    for benchmark in report.benchmarks:
        found = [results[benchmark.name] for results in report.models.values()]
        failed = ["" if r.score is None else str(len(r.failed)) for r in found]
        samples = str(max(result.samples for result in found))
        rows.append([benchmark.title, samples, benchmark.judge or OWN_METRIC, *failed])
    return ["", "samples", "scored by", *(f"failed: {label}" for label in report.models)], rows


def _lines(report: Report) -> list[str]:
    lines = []
    if report.limit is not None:
        lines.append(f"- Of each data set {report.limit} questions or groups at most were asked.")
    if any(benchmark.judge for benchmark in report.benchmarks):
        lines.append(
            "- No judge model is asked: where VLMEvalKit would ask one to find the chosen option "
            "in an answer, only what its exact matching finds counts."
        )
    if report.is_papers():
        lines.append(
            "- paper: means as reported (arXiv 2509.14735), captions from ShareGPT4V-PT; its "
            "scores of single benchmarks are not listed here."
        )
    lines += [f"- Left out: {line}" for line in report.left_out]
    lines += [f"- {line}" for line in (*report.other_files, *report.notes)]
    lines += [f"- Failed: {line}" for line in report.failures()]
    for label, results in report.models.items():
        for name, result in results.items():
            lines += [
                f"- Sample without an answer: {label}, {f['dataset']} {f['index']}: {f['reason']}"
                for f in result.failed[:LISTED]
            ]
            if (more := len(result.failed) - LISTED) > 0:
                lines.append(f"- {more} more of them are listed in the JSON: {label}, {name}")
    return lines


def _number(score: float | None) -> str:
    return "failed" if score is None else f"{score:.1f}"


def _difference(score: float | None, first: float | None) -> str:
    return "" if score is None or first is None else f"{score - first:+.1f}"


def rows(report: Report) -> list[dict[str, Any]]:
    """A row for each model and column: model, benchmark, score, difference, samples, ..."""
    found = []
    for label, results in report.models.items():
        scores, reference = report.scores(label), report.reference(label)
        bases = report.scores(reference) if reference else [None] * len(scores)
        for (title, names), score, base in zip(report.columns(), scores, bases, strict=True):
            found.append(
                {
                    "model": label,
                    "benchmark": names[0] if len(names) == 1 else title,
                    "score": score,
                    "difference": None if None in (score, base) else score - base,
                    "samples": sum(results[name].samples for name in names),
                    "failed": sum(len(results[name].failed) for name in names),
                    "limit": report.limit,
                    "scored_by": _judges(report.benchmarks, names),
                }
            )
    return found


def _judges(benchmarks: Sequence[Benchmark | TextBenchmark], names: list[str]) -> str:
    found = [b.judge or OWN_METRIC for b in benchmarks if b.name in names]
    return ", ".join(dict.fromkeys(found))


def save(report: Report, folder: Path, name: str = "table") -> str:
    """Write ``<name>.md``, ``<name>.csv`` and ``<name>.json``; returns the Markdown."""
    text = markdown(report)
    write_text(folder / f"{name}.md", text)
    table = io.StringIO()
    found = rows(report)
    writer = csv.DictWriter(table, list(found[0]) if found else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(folder / f"{name}.csv", table.getvalue())
    results = {
        label: {name: vars(result) for name, result in results.items()}
        for label, results in report.models.items()
    }
    content = {
        "rows": found,
        "results": results,
        "sources": report.sources,
        "compared": report.compared,
        "limit": report.limit,
        "left_out": report.left_out,
        "other_files": report.other_files,
        "notes": report.notes,
        "failures": report.failures(),
    }
    if report.is_papers():
        content["paper_means"] = PAPER_MEANS
    write_json(folder / f"{name}.json", content)
    return text


def run_of_export(folder: Path) -> Path | None:
    """The run whose export a folder is, ``<run>/<stage>/hf``; None for any other folder."""
    for place in (Path(os.path.abspath(folder)), folder.resolve()):  # it may be a link
        if place.name == "hf" and (place.parent / "stage.json").is_file():
            return place.parents[1]
    return None


def save_beside_runs(report: Report) -> None:
    """Write ``scores.json`` in each run whose export was evaluated: tools/sweep.py reads it.

    Of other folders nothing is written. Scores of the same model on benchmarks that were not asked
    this time stay.
    """
    for label, source in report.sources.items():
        if run := run_of_export(Path(source["folder"])):
            file, results = run / "scores.json", report.models[label]
            before = read_json(file, "Remove it.")
            kept = before if before.get("model") == source["abbr"] else {"model": source["abbr"]}
            scores = kept | {name: result.score for name, result in results.items()}
            write_json(file, {name: s for name, s in scores.items() if s is not None})
