"""The table: models by benchmarks in the paper's order, their means, and the paper's own rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dpa_xtuner import tables
from dpa_xtuner.evaluation.benchmarks import BENCHMARK_KINDS, PAPER, Benchmark
from dpa_xtuner.evaluation.folder import run_of_export
from dpa_xtuner.evaluation.text_benchmarks import TEXT_KINDS, TextBenchmark
from dpa_xtuner.files import read_json, write_json, write_text
from dpa_xtuner.model_card import write_card

PAPER_MEANS = {
    "Qwen2.5-7B": {"vanilla": 49.0, "CAL": 51.0, "DPA": 51.7},
    "Llama-3.1-8B": {"vanilla": 47.0, "CAL": 46.0, "DPA": 49.9},
    "Gemma-2-9B": {"vanilla": 48.2, "CAL": 47.4, "DPA": 50.0},
}
"""Means over the seven benchmarks as reported (arXiv 2509.14735), captions from ShareGPT4V-PT."""

OWN_METRIC = "its metric"
"""Replaces the judge of a benchmark that needs none."""

Details = dict[tuple[str, str], list[dict]]
"""(model's label, data set) -> samples, as the evaluators list them."""

LISTED = 20
"""Failed samples of a benchmark that the Markdown lists at most; the JSON has all."""


@dataclass(frozen=True)
class Result:
    """A model's result on a benchmark.

    Attributes:
        score: 0 - 100; None if a task failed.
        samples: number of samples asked.
        failed: samples without an answer, which count as wrong: ``dataset``, ``index`` and
            ``reason`` of each.
        metrics: the evaluator's numbers by data set.
        error: why the command should fail: tasks that failed, with their log files, and data sets
            of which no sample could be answered.
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
        models: label -> benchmark's name -> result.
        benchmarks: the columns, in order.
        limit: the number of questions or groups asked of each data set; None for all.
        left_out: lines on wanted benchmarks that have no files.
        other_files: lines on data files that are not the published ones.
        notes: other lines for readers of the table.
        sources: label -> ``folder``, and ``abbr``, OpenCompass's name of the model.
        compared: label -> label of the model that it is compared to; the first by default.
    """

    models: dict[str, dict[str, Result]]
    benchmarks: Sequence[Benchmark | TextBenchmark]
    limit: int | None = None
    left_out: list[str] = field(default_factory=list)
    other_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    compared: dict[str, str] = field(default_factory=dict)

    def columns(self) -> dict[str, list[Benchmark | TextBenchmark]]:
        """Return titles, and the benchmarks whose mean each shows: one, those of a kind, or all.

        Answers and likelihoods have no common mean: their difference is what matters.
        """
        columns: dict[str, list[Benchmark | TextBenchmark]] = {}
        for kind in (*BENCHMARK_KINDS, *TEXT_KINDS):
            of_kind = [b for b in self.benchmarks if b.kind == kind]
            columns |= {b.title: [b] for b in of_kind}
            if len(of_kind) > 1:
                columns[f"{kind} ({len(of_kind)})"] = of_kind
        if {b.kind for b in self.benchmarks} == set(BENCHMARK_KINDS):
            columns[f"all ({len(self.benchmarks)})"] = list(self.benchmarks)
        return columns

    def is_papers(self) -> bool:
        """Tell whether the paper's means are of the same benchmarks, asked in full."""
        whole = self.limit is None and not self.other_files
        return whole and {b.name for b in self.benchmarks} == set(PAPER)

    def reference(self, label: str) -> str:
        """Return the model that a model is compared to; it may be itself."""
        return self.compared.get(label, next(iter(self.models)))

    def results(self) -> Iterable[tuple[str, str, Result]]:
        """Return label, benchmark's name and result of each cell."""
        return (
            (label, name, result)
            for label, results in self.models.items()
            for name, result in results.items()
        )

    def failures(self) -> list[str]:
        """Return why the command should fail: a line for each model and benchmark that failed."""
        found = self.results()
        return [f"{label}, {name}: {result.error}" for label, name, result in found if result.error]


def mean(scores: Iterable[float | None]) -> float | None:
    """Return the mean; None if a score is missing."""
    scores = list(scores)
    known = [score for score in scores if score is not None]
    return sum(known) / len(scores) if len(known) == len(scores) else None


def report_rows(report: Report) -> list[dict[str, Any]]:
    """Return a row for each model and column: model, benchmark, score, difference, samples, ..."""
    found = []
    for label, results in report.models.items():
        others = report.models[report.reference(label)]
        for title, benchmarks in report.columns().items():
            cells = [results[benchmark.name] for benchmark in benchmarks]
            score = mean(cell.score for cell in cells)
            base = mean(others[benchmark.name].score for benchmark in benchmarks)
            difference = None
            if others is not results and score is not None and base is not None:
                difference = score - base
            judges = dict.fromkeys(b.judge or OWN_METRIC for b in benchmarks)
            found.append(
                {
                    "model": label,
                    "benchmark": benchmarks[0].name if len(benchmarks) == 1 else title,
                    "score": score,
                    "difference": difference,
                    "samples": sum(cell.samples for cell in cells),
                    "failed": sum(len(cell.failed) for cell in cells),
                    "limit": report.limit,
                    "scored_by": ", ".join(judges),
                }
            )
    return found


def report_markdown(report: Report) -> str:
    """Return the report as Markdown, for the screen and for a file."""
    columns = report.columns()
    table, found = [], report_rows(report)
    for label in report.models:
        cells = [row for row in found if row["model"] == label]
        table.append([label, *(_shown(cell["score"], "failed") for cell in cells)])
        if report.reference(label) != label:
            table.append(["difference", *(_shown(cell["difference"], "", "+") for cell in cells)])
    if all(benchmark.chance is not None for benchmark in report.benchmarks):
        chances = [mean(benchmark.chance for benchmark in asked) for asked in columns.values()]
        table.append(["chance", *(_shown(chance, "") for chance in chances)])
    if report.is_papers():
        empty = [""] * (len(columns) - 1)
        for llm, means in PAPER_MEANS.items():
            table += [[f"paper: {llm}, {how}", *empty, _shown(m, "")] for how, m in means.items()]
    return (
        f"{tables.markdown(['', *columns], table)}\n\n{_asked(report)}\n\n"
        + "\n".join(f"- {line}" for line in _lines(report))
    ).rstrip() + "\n"


def _shown(number: float | None, missing: str, sign: str = "") -> str:
    return missing if number is None else f"{number:{sign}.1f}"


def _asked(report: Report) -> str:
    """Make the table of the samples asked: a row for each benchmark."""
    table = []
    for benchmark in report.benchmarks:
        found = [results[benchmark.name] for results in report.models.values()]
        failed = ["" if r.score is None else str(len(r.failed)) for r in found]
        samples = str(max(result.samples for result in found))
        table.append([benchmark.title, samples, benchmark.judge or OWN_METRIC, *failed])
    header = ["", "samples", "scored by", *(f"failed: {label}" for label in report.models)]
    return tables.markdown(header, table)


def _lines(report: Report) -> list[str]:
    lines = []
    if report.limit is not None:
        lines.append(f"At most {report.limit} questions or groups of each data set were asked.")
        if any(benchmark.kind in TEXT_KINDS for benchmark in report.benchmarks):
            lines.append("They are the first ones; MMLU has at least one of each subject.")
    if any(benchmark.judge for benchmark in report.benchmarks):
        lines.append(
            "No judge model is asked. VLMEvalKit would ask one to find the chosen option in an "
            "answer; here only its exact matching counts."
        )
    if report.is_papers():
        lines.append(
            "paper: means as reported (arXiv 2509.14735), captions from ShareGPT4V-PT; its "
            "scores of single benchmarks are not listed here."
        )
    lines += [f"Left out: {line}" for line in report.left_out]
    lines += [*report.other_files, *report.notes]
    lines += [f"Failed: {line}" for line in report.failures()]
    for label, name, result in report.results():
        lines += [
            f"Sample without an answer: {label}, {f['dataset']} {f['index']}: {f['reason']}"
            for f in result.failed[:LISTED]
        ]
        if (more := len(result.failed) - LISTED) > 0:
            lines.append(f"{more} more of them are listed in the JSON: {label}, {name}")
    return lines


def save_report(report: Report, folder: Path, name: str = "table") -> str:
    """Write ``<name>.md``, ``<name>.csv`` and ``<name>.json``, and return the Markdown."""
    text, found = report_markdown(report), report_rows(report)
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.csv", pd.DataFrame(found).to_csv(index=False))
    results: Mapping[str, dict] = {label: {} for label in report.models}
    for label, benchmark, result in report.results():
        results[label][benchmark] = vars(result)
    copied = ("sources", "compared", "limit", "left_out", "other_files", "notes")
    content = {"rows": found, "results": results}
    content |= {key: getattr(report, key) for key in copied}
    content |= {"failures": report.failures()}
    content |= {"paper_means": PAPER_MEANS} if report.is_papers() else {}
    write_json(folder / f"{name}.json", content)
    return text


def save_beside_runs(report: Report) -> None:
    """Write ``scores.json`` in each run whose export was evaluated: tools/sweep.py reads it.

    The file keeps scores of the same model on benchmarks that were not asked this time. The model
    card of an export gets the scores of this evaluation. Nothing is written for other folders.
    """
    titles = {benchmark.name: benchmark.title for benchmark in report.benchmarks}
    for label, source in report.sources.items():
        asked = report.models[label].items()
        shown = {titles.get(name, name): r.score for name, r in asked if r.score is not None}
        write_card(Path(source["folder"]), shown, report.limit)
        if run := run_of_export(Path(source["folder"])):
            file, results = run / "scores.json", report.models[label]
            before = read_json(file, "Remove it.")
            kept = before if before.get("model") == source["abbr"] else {"model": source["abbr"]}
            scores = kept | {name: result.score for name, result in results.items()}
            write_json(file, {name: s for name, s in scores.items() if s is not None})
