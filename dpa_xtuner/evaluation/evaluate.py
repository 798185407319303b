"""One evaluation: models by benchmarks, from OpenCompass's results to a report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpa_xtuner.evaluation.benchmarks import Benchmark
from dpa_xtuner.evaluation.report import Details, Report, Result
from dpa_xtuner.evaluation.run import run
from dpa_xtuner.evaluation.text_benchmarks import TextBenchmark

DataSets = Mapping[str, dict]
"""A benchmark's data sets: their names, and OpenCompass's configs of them."""

_LISTED = 3


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
        limit: the number of questions or groups to ask of each data set; None for all.
        gpus: number of GPUs that answer at a time; 0 for the CPU.
        batch_size: samples in a batch.
        fresh: whether to ask questions again that have an answer.
        left_out: lines for :class:`Report`.
        other_files: lines for :class:`Report`.
    """

    limit: int | None = None
    gpus: int = 0
    batch_size: int = 8
    fresh: bool = False
    left_out: Iterable[str] = ()
    other_files: Iterable[str] = ()

    @property
    def device(self) -> str:
        """The device's type."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        label: its row in the table.
        folder: folder of the model.
        config: OpenCompass's config; its ``abbr`` holds a cache key.
        reference: label of the model that it is compared to; empty for the first.
        note: a note for readers of the table.
    """

    label: str
    folder: Path
    config: dict
    reference: str = ""
    note: str = ""


def evaluate(
    models: Sequence[Model],
    asked: Mapping[Benchmark, DataSets] | Mapping[TextBenchmark, DataSets],
    work_dir: Path,
    options: Options,
) -> tuple[Report, Details]:
    """Evaluate models on benchmarks whose files exist.

    Args:
        models: the table's rows, from ``visual`` or ``text``.
        asked: the table's columns and their data sets, from the same module.
        work_dir: folder of all files; a rerun continues there.
        options: how to evaluate.

    Returns:
        The report; and the samples, see ``BenchmarkEvaluator.score``.
    """
    unique = {model.config["abbr"]: model.config for model in models}
    configs = [config for data_sets in asked.values() for config in data_sets.values()]
    workers = max(options.gpus, 1)
    outcome = run(list(unique.values()), configs, work_dir, workers, options.fresh)
    table: dict[str, dict[str, Result]] = {model.label: {} for model in models}
    details: Details = {}
    for model in models:
        for benchmark, data_sets in asked.items():
            found = {n: outcome[model.config["abbr"], c["abbr"]] for n, c in data_sets.items()}
            table[model.label][benchmark.name] = result_of(benchmark, found)
            for name, result in found.items():
                if isinstance(result, dict):
                    details[model.label, name] = result["details"]
    report = Report(
        table,
        list(asked),
        options.limit,
        list(options.left_out),
        list(options.other_files),
        [f"{model.label} {model.note}" for model in models if model.note],
        {m.label: {"folder": str(m.folder), "abbr": m.config["abbr"]} for m in models},
        {m.label: m.reference for m in models if m.reference},
    )
    return report, details


def result_of(benchmark: Benchmark | TextBenchmark, found: Mapping[str, dict | str]) -> Result:
    """Sum up a benchmark's data sets.

    Args:
        benchmark: the benchmark.
        found: for each data set the evaluator's result, or where it failed.
    """
    errors = [f"failed, see {error}" for error in found.values() if isinstance(error, str)]
    results = {name: result for name, result in found.items() if isinstance(result, dict)}
    mute = [name for name, result in results.items() if len(result["failed"]) == result["samples"]]
    # A limit may leave one question of each of MMLU's 57 data sets; then a single failure is a
    # whole data set.
    if mute and (isinstance(benchmark, Benchmark) or len(mute) == len(results)):
        failed = results[mute[0]]["failed"]
        reason = failed[0]["reason"] if failed else "there are none"
        errors.append(f"no sample of {', '.join(mute)} could be answered ({reason})")
    errors = list(dict.fromkeys(errors))
    more = [f"{len(errors) - _LISTED} more"] if len(errors) > _LISTED else []
    scores = {name: result["score"] for name, result in results.items()}
    return Result(
        benchmark.score(scores) if len(results) == len(found) else None,
        sum(result["samples"] for result in results.values()),
        [{"dataset": name, **f} for name, result in results.items() for f in result["failed"]],
        {name: result["metrics"] for name, result in results.items()},
        " and ".join([*errors[:_LISTED], *more]),
    )


def opencompass_model(kind: str, abbr: str, folder: Path, options: Options, **more: object) -> dict:
    """Make OpenCompass's config of a model.

    Args:
        kind: dotted name of its class.
        abbr: OpenCompass's name of the model.
        folder: folder of the model.
        options: how to evaluate.
        more: further arguments of the class.
    """
    return {
        "type": f"dpa_xtuner.evaluation.{kind}",
        "abbr": abbr,
        "path": str(folder.resolve()),
        "device": options.device,
        "batch_size": options.batch_size,
        "run_cfg": {"num_gpus": min(options.gpus, 1)},
        **more,
    }
