"""One call of OpenCompass for models and benchmarks, in a folder in which a rerun goes on.

Nothing is answered from a stale cache, since the names under which OpenCompass keeps its files hold
a hash of all that they depend on: a model's of what is read of its folder, a data set's of its
file, of the limit and of the code that makes prompts and scores; both of the versions of what runs
them.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from dpa_xtuner import __version__
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import Benchmark
from dpa_xtuner.evaluation.folder import files_read, pads_pictures
from dpa_xtuner.evaluation.report import Details, Report, Result
from dpa_xtuner.evaluation.text_benchmarks import TextBenchmark
from dpa_xtuner.files import acquire_lock, write_json, write_text

RUN = "results"
"""OpenCompass's folder below the work dir: always the same, so that reruns go on in it."""

PARTS = 8
"""Parts that a data set is cut into for several GPUs: the same for any number of them, since
OpenCompass would join parts of one cut with parts of another."""

_HERE = Path(__file__).parent
_OBJECTS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "chat_template.json", "dpa.json",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        label: What the table calls it.
        folder: Hugging Face LLaVA folder.
        abbr: Label and hash: OpenCompass's name of it.
    """

    label: str
    folder: Path
    abbr: str


@dataclass(frozen=True)
class Outcome:
    """What OpenCompass left for pairs of a model's and a data set's abbr.

    Attributes:
        results: What the evaluator found.
        failures: Where there is none: the log file, and its last line.
    """

    results: dict[tuple[str, str], dict]
    failures: dict[tuple[str, str], str]


def check_folder(folder: Path) -> None:
    """Refuse a folder that transformers could not open as a LLaVA, before anything is loaded.

    Raises:
        DPAError: The folder is not there or is no LLaVA; the message says what it lacks.
    """
    expected = "expected the folder of a LlavaForConditionalGeneration and its processor"
    if not (folder / "config.json").is_file():
        raise DPAError(
            f"{folder} has no config.json; {expected}. A run of ours becomes one by: python "
            f"tools/export.py CONFIG"
        )
    config = _object(folder / "config.json")
    parts = {name: config.get(name) or {} for name in ("vision_config", "text_config")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise DPAError(f"{folder / 'config.json'} is broken ({name} is no object).")
    vision = parts["vision_config"].get("model_type")
    if config.get("model_type") != "llava" or vision == "pixtral":  # its pictures vary in size
        kind = f"{config.get('model_type')!r}{' with Pixtral' * (vision == 'pixtral')}"
        raise DPAError(f"{folder} is a model of type {kind}; {expected}.")
    for wanted in ("preprocessor_config.json", "tokenizer_config.json", "*.safetensors|*.bin"):
        if not any(path for name in wanted.split("|") for path in folder.glob(name)):
            raise DPAError(f"{folder} has no {wanted.replace('|', ' or ')}; {expected}.")
    for name in _OBJECTS:  # transformers goes on without a broken generation config, and says less
        if (folder / name).is_file():
            _object(folder / name)


def _object(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DPAError(f"{file} is broken ({error}).") from None
    if not isinstance(found, dict):
        raise DPAError(f"{file} is broken (no object in it).")
    return found


def content_hash(paths: Iterable[Path], *settings: object) -> str:
    """Eight hexadecimal digits (of xxh3) over names and contents of files, and over settings."""
    import xxhash

    digest = xxhash.xxh3_64()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    versions = [version(name) for name in ("opencompass", "ms-vlmeval", "transformers")]
    digest.update(json.dumps([*settings, __version__, *versions]).encode())
    return digest.hexdigest()[:8]


def describe_models(folders: list[Path]) -> list[Model]:
    """Name models by their folders, and hash these.

    The abbr does not depend on the other models: in another company a model's answers are found
    again.
    """
    found = []
    for folder, label in zip(folders, labels(folders), strict=True):
        digest = content_hash([*files_read(folder), _HERE / "model.py"], pads_pictures(folder))
        found.append(Model(label, folder, f"{labels([folder])[0]}-{digest}"))
    return found


def labels(folders: list[Path]) -> list[str]:
    """Short names of folders, all different: as many last parts of the paths as tell them apart.

    ``hf``, the name of an exported folder, does not count as a part, and a stage's is not enough.
    """
    parts = [[p for p in Path(os.path.abspath(folder)).parts if p != "hf"] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["-".join(names[-length:]) for names in parts]
        stage_alone = any(label in ("proxy", "align", "tune") for label in short)
        if len(set(short)) == len(short) and not stage_alone:
            break
    found: list[str] = []
    for label in (re.sub(r"[^\w.-]", "_", label) for label in short):
        others = (f"{label}-{number}" for number in itertools.count(2))  # x and x/hf, "a b" and a_b
        found.append(next(n for n in itertools.chain([label], others) if n not in found))
    return found


def model_config(model: Model, batch_size: int, gpus: int) -> dict:
    """OpenCompass's config of a model."""
    return dict(
        type="dpa_xtuner.evaluation.model.LlavaFolder",
        abbr=model.abbr,
        path=str(model.folder.resolve()),
        device="cuda" if gpus else "cpu",
        batch_size=batch_size,
        run_cfg=dict(num_gpus=min(gpus, 1)),
    )


def dataset_config(
    benchmark: Benchmark, name: str, data: Path, work_dir: Path, limit: int | None
) -> dict:
    """OpenCompass's config of a data set.

    VLMEvalKit keeps decoded pictures beside the file and does not see that it changed. So the file
    gets a folder of its own, named by its content.

    Args:
        benchmark: The benchmark.
        name: VLMEvalKit's name of one of its data sets.
        data: Folder of the benchmarks' files.
        work_dir: Where the evaluation goes.
        limit: Questions or groups to ask, evenly spread; None for all.
    """
    file = (data / f"{name}.tsv").resolve()
    folder = work_dir.resolve() / "data" / f"{name}-{content_hash([file])}"
    link = folder / f"{name}.tsv"
    if not link.is_symlink() or link.readlink() != file:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{os.getpid()}.partial"  # another evaluation may be at it as well
        partial.unlink(missing_ok=True)
        partial.symlink_to(file)
        os.replace(partial, link)
    config = benchmark.config(name, folder, limit)
    settings = {**config, "data_root": None, "eval_cfg": None}
    digest = content_hash(
        _own_code(benchmark.module), _scoring_hash(), folder.name, settings, benchmark.metric,
        benchmark.scale,
    )  # fmt: skip
    return dict(config, abbr=f"{name}-{digest}")


@functools.cache
def _scoring_hash() -> str:
    """Of the code that makes prompts and scores; found without an import, which takes seconds."""
    vlmeval, opencompass = (
        Path(find_spec(name).origin).parent for name in ("vlmeval", "opencompass")
    )
    folders = [vlmeval / "dataset", vlmeval / "smp", opencompass / "datasets/vlmevalkit"]
    ours = [_HERE / "dataset.py", _HERE / "evaluator.py", _HERE.parent / "compat.py"]
    theirs = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return content_hash([*ours, *theirs, opencompass / "evaluator/vlmevalkit.py"])


def _own_code(module: str | None) -> list[Path]:
    """The file of a benchmark's own module; all files of a package."""
    spec = find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return []
    folders = map(Path, spec.submodule_search_locations or ())
    inside = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return inside or [Path(spec.origin)]


def evaluate(
    folders: list[Path],
    benchmarks: list[Benchmark],
    data: Path,
    work_dir: Path,
    *,
    limit: int | None = None,
    gpus: int = 0,
    batch_size: int = 8,
    left_out: Iterable[str] = (),
    other_files: Iterable[str] = (),
) -> tuple[Report, Details]:
    """Evaluate models on benchmarks whose files are there.

    Args:
        folders: Hugging Face LLaVA folders.
        benchmarks: The table's columns.
        data: Folder of the benchmarks' files.
        work_dir: Where everything goes, and a rerun goes on.
        limit: See `dataset_config`.
        gpus: How many answer at a time; 0 for the CPU.
        batch_size: Samples in a batch.
        left_out: Lines for the report, see there.
        other_files: Lines for the report, see there.

    Returns:
        The report; and the samples, see `BenchmarkEvaluator.score`.
    """
    models = describe_models(list({folder.resolve(): folder for folder in folders}.values()))
    datasets = {
        benchmark.name: {
            name: dataset_config(benchmark, name, data, work_dir, limit)
            for name in benchmark.datasets
        }
        for benchmark in benchmarks
    }
    configs = {model.abbr: model_config(model, batch_size, gpus) for model in models}
    asked = [config for found in datasets.values() for config in found.values()]
    outcome = run(list(configs.values()), asked, work_dir, workers=max(gpus, 1))
    abbrs = {model.label: model.abbr for model in models}
    table, details = results_of(abbrs, benchmarks, datasets, outcome)
    notes = [
        f"{model.label} has no chat template: it is asked in that of LLaVA-1.5."
        for model in models
        if not _has_template(model.folder)
    ]
    sources = {
        model.label: {"folder": str(model.folder.resolve()), "abbr": model.abbr} for model in models
    }
    report = Report(table, benchmarks, limit, list(left_out), list(other_files), notes, sources)
    return report, details


def results_of(
    models: Mapping[str, str],
    benchmarks: Sequence[Benchmark | TextBenchmark],
    datasets: Mapping[str, Mapping[str, dict]],
    outcome: Outcome,
) -> tuple[dict[str, dict[str, Result]], Details]:
    """Sort what OpenCompass left by what a report shows.

    Args:
        models: Label -> abbr.
        benchmarks: The columns.
        datasets: Benchmark's name -> data set's name -> OpenCompass's config of it.
        outcome: From `run`.

    Returns:
        Label -> benchmark's name -> result; and the samples.
    """
    table: dict[str, dict[str, Result]] = {}
    details: Details = {}
    for label, abbr in models.items():
        table[label] = {}
        for benchmark in benchmarks:
            pairs = {d: (abbr, config["abbr"]) for d, config in datasets[benchmark.name].items()}
            table[label][benchmark.name] = _result(benchmark, pairs, outcome)
            for name, pair in pairs.items():
                if pair in outcome.results:
                    details[label, name] = outcome.results[pair]["details"]
    return table, details


def _result(
    benchmark: Benchmark | TextBenchmark, pairs: dict[str, tuple[str, str]], outcome: Outcome
) -> Result:
    failures = [outcome.failures[pair] for pair in pairs.values() if pair in outcome.failures]
    errors = [f"failed, see {failure}" for failure in failures]
    found = {name: outcome.results[p] for name, p in pairs.items() if p in outcome.results}
    mute = [name for name, result in found.items() if len(result["failed"]) == result["samples"]]
    # Of MMLU's 57 a limit may leave one question each, which a single failure would take away.
    if mute and (isinstance(benchmark, Benchmark) or len(mute) == len(found)):
        failed = found[mute[0]]["failed"]
        reason = failed[0]["reason"] if failed else "there are none"
        errors.append(f"no sample of {', '.join(mute)} could be answered ({reason})")
    complete = len(found) == len(pairs)
    return Result(
        benchmark.score({n: r["score"] for n, r in found.items()}) if complete else None,
        sum(result["samples"] for result in found.values()),
        [{"dataset": name, **f} for name, result in found.items() for f in result["failed"]],
        {name: result["metrics"] for name, result in found.items()},
        _shortened(list(dict.fromkeys(errors))),
    )


def _shortened(errors: list[str], most: int = 3) -> str:
    more = len(errors) - most
    return " and ".join([*errors[:most], *([f"{more} more"] if more > 0 else [])])


def _has_template(folder: Path) -> bool:
    if any((folder / f"chat_template.{kind}").is_file() for kind in ("json", "jinja")):
        return True
    return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")


def run(models: list[dict], datasets: list[dict], work_dir: Path, workers: int = 1) -> Outcome:
    """Let OpenCompass do what is missing.

    Args:
        models: OpenCompass's configs of models, each with an abbr that holds a hash.
        datasets: The same of data sets.
        work_dir: Where everything goes; one evaluation at a time.
        workers: Processes that answer at a time, each with a GPU of its own; with 1 all happens
            in this process.

    Raises:
        DPAError: Another evaluation is writing to the work dir.
    """
    folder = work_dir.resolve() / RUN
    pairs = [(m["abbr"], d["abbr"]) for m in models for d in datasets]
    lock = acquire_lock(
        work_dir / ".lock",
        f"Another evaluation is writing to {work_dir}: wait for it, or give --work-dir.",
    )
    try:
        for pair in pairs:
            _remove_useless(folder, *pair)
        missing = [pair for pair in pairs if not _result_file(folder, *pair).is_file()]
        trouble = ""
        if missing:
            for pair in missing:
                for log in _logs(folder, *pair):
                    log.unlink()
            trouble = _call_opencompass(models, datasets, work_dir.resolve(), workers)
    finally:
        lock.release()
    outcome = Outcome({}, {})
    for pair in pairs:
        file = _result_file(folder, *pair)
        if file.is_file():
            outcome.results[pair] = json.loads(file.read_text(encoding="utf-8"))
        else:
            log = _telling_log(folder, *pair)
            where = f"no log of its own in {folder / 'logs'}"
            if log:
                where = f"{log} ({_last_line(log)})"
            outcome.failures[pair] = f"{where}{trouble and f'; OpenCompass: {trouble}'}"
    return outcome


def _call_opencompass(
    models: list[dict], datasets: list[dict], work_dir: Path, workers: int
) -> str:
    """Run OpenCompass's command in this process; returns what it died of, or nothing."""
    ours = "dpa_xtuner.evaluation.runner"
    partitioner = dict(type="opencompass.partitioners.NaivePartitioner", n=1)
    in_process = dict(type=f"{ours}.InProcessRunner")
    infer_task = dict(type="opencompass.tasks.OpenICLInferTask")
    eval_task = dict(type="opencompass.tasks.OpenICLEvalTask")
    infer = dict(partitioner=partitioner, runner=dict(in_process, task=infer_task))
    if workers > 1:
        infer = dict(
            partitioner=dict(type=f"{ours}.PartsPartitioner", num_worker=workers, num_split=PARTS),
            runner=dict(
                type="opencompass.runners.LocalRunner", max_num_workers=workers, task=infer_task
            ),
        )
    config = dict(
        models=models,
        datasets=datasets,
        infer=infer,
        eval=dict(partitioner=partitioner, runner=dict(in_process, task=eval_task)),
    )
    write_json(work_dir / "opencompass.json", config)
    arguments = [str(work_dir / "opencompass.json"), "-w", str(work_dir), "-r", RUN]
    with _called_in(work_dir, arguments):
        from opencompass.cli.main import main

        try:
            main()
        except Exception as error:  # its summary, or a partitioner; what is done is done
            import traceback

            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _called_in(folder: Path, arguments: list[str]) -> Iterator[None]:
    """OpenCompass reads sys.argv, and writes to the current folder, .cache/ and two of no use."""
    before = Path.cwd(), sys.argv, os.environ.get("PYTHONPATH")
    package = str(_HERE.parents[1])
    others = [os.path.abspath(path) for path in (before[2] or "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *others])
    os.chdir(folder)
    sys.argv = ["opencompass", *arguments]
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        os.environ.pop("PYTHONPATH")
        if before[2] is not None:
            os.environ["PYTHONPATH"] = before[2]
        for name in ("tmp", "icl_inference_output"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _result_file(folder: Path, model: str, dataset: str) -> Path:
    return folder / "results" / model / f"{dataset}.json"


def _logs(folder: Path, model: str, dataset: str) -> list[Path]:
    """Log files of a pair, the last one that was written last."""
    names = (f"{dataset}.out", f"{dataset}_[0-9]*.out")
    found = [p for name in names for p in (folder / "logs").glob(f"*/{model}/{name}")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _telling_log(folder: Path, model: str, dataset: str) -> Path | None:
    """The log that says why there is no result: that of the answers, where these are missing.

    Scoring then fails as well, and its log says no more than that there are no answers.
    """
    logs = _logs(folder, model, dataset)
    answers = folder / "predictions" / model
    unanswered = [
        log for log in logs
        if log.parts[-3] == "infer" and not (answers / f"{log.stem}.json").is_file()
    ]  # fmt: skip
    return next(iter(unanswered + logs[::-1]), None)


def _last_line(log: Path) -> str:
    """Of a traceback the line that says what is wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it is empty"


def _remove_useless(folder: Path, model: str, dataset: str) -> None:
    """Remove what a killed run has half written, since OpenCompass trusts what is there.

    So are answers of which each one failed: what is wrong then is not the samples. Of the answers
    to an unfinished data set OpenCompass would drop all if one line can't be read, such as the
    last one, or one with a line separator of Unicode: the lines before stay.
    """
    answers = folder / "predictions" / model
    whole = [*answers.glob(f"{dataset}.json"), *answers.glob(f"{dataset}_[0-9]*.json")]
    result = _result_file(folder, model, dataset)
    for file in [*whole, result]:
        if file.is_file() and _read(file) is None:
            file.unlink()
    found = _read(result) if result.is_file() else None
    if found is not None and len(found["failed"]) == found["samples"]:
        for file in [result, *whole]:
            file.unlink(missing_ok=True)
    for file in answers.glob(f"tmp_{dataset}*.jsonl"):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        good = itertools.takewhile(lambda line: line is not None, map(_parsed, lines))
        write_text(file, "".join(json.dumps(line) + "\n" for line in good))


def _read(file: Path) -> dict | None:
    return _parsed(file.read_text(encoding="utf-8", errors="replace"))


def _parsed(text: str) -> dict | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
