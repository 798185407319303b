"""Models that see: Hugging Face LLaVA folders, and the data sets of questions about pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dpa_xtuner.evaluation.benchmarks import Benchmark
from dpa_xtuner.evaluation.cache_key import cache_key, file_digest, module_files
from dpa_xtuner.evaluation.evaluate import Model, Options, opencompass_model
from dpa_xtuner.evaluation.evaluate import evaluate as evaluate_models
from dpa_xtuner.evaluation.folder import (
    check_llava,
    computing_dtype,
    files_read,
    has_chat_template,
    labels,
    pads_pictures,
)
from dpa_xtuner.evaluation.report import Details, Report


def evaluate(
    folders: Iterable[Path],
    benchmarks: list[Benchmark],
    data: Path,
    work_dir: Path,
    options: Options,
) -> tuple[Report, Details]:
    """Evaluate LLaVA folders; see `dpa_xtuner.evaluation.evaluate.evaluate`.

    Args:
        folders: Hugging Face LLaVA folders.
        benchmarks: the table's columns, whose files are there.
        data: folder of their files.
        work_dir: where everything goes.
        options: see there.

    Raises:
        DPAError: a folder holds no LLaVA.
    """
    for folder in (folders := list(folders)):
        check_llava(folder)
    models = llavas(folders, options)
    asked = {
        benchmark: {
            name: data_set(benchmark, name, data, work_dir, options.limit)
            for name in benchmark.datasets
        }
        for benchmark in benchmarks
    }
    notes = [
        f"{model.label} has no chat template: it is asked in that of LLaVA-1.5."
        for model in models
        if not has_chat_template(model.folder)
    ]
    return evaluate_models(models, asked, work_dir, options, notes)


def llavas(folders: Iterable[Path], options: Options) -> list[Model]:
    """Describe the models of folders, each folder once.

    OpenCompass's name of a model depends on its own folder alone, so that its answers are found
    again beside other models.
    """
    own = list({folder.resolve(): folder for folder in folders}.values())
    models = []
    for folder, label in zip(own, labels(own), strict=True):
        dtype = computing_dtype(folder, options.device)
        key = cache_key(files_read(folder), pads_pictures(folder), str(dtype))
        abbr = f"{labels([folder])[0]}-{key}"
        config = opencompass_model("model.LlavaFolder", abbr, folder, options)
        models.append(Model(label, folder.resolve(), config))
    return models


def data_set(
    benchmark: Benchmark, name: str, data: Path, work_dir: Path, limit: int | None
) -> dict:
    """Make OpenCompass's config of a data set.

    Its pictures are unpacked into a folder that is named by the file's content, since they would
    otherwise stay when the file changes.

    Args:
        benchmark: the benchmark.
        name: VLMEvalKit's name of one of its data sets.
        data: folder of the benchmarks' files.
        work_dir: where the evaluation goes.
        limit: the number of questions or groups to ask, evenly spread; None for all.
    """
    file = (data / f"{name}.tsv").resolve()
    folder = work_dir.resolve() / "data" / f"{name}-{file_digest(file)[:8]}"
    link = folder / file.name
    if not link.is_symlink() or link.readlink() != file:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{os.getpid()}.partial"  # another evaluation may be at it as well
        partial.unlink(missing_ok=True)
        partial.symlink_to(file)
        os.replace(partial, link)
    config = benchmark.config(name, folder, limit)
    key = cache_key(module_files(benchmark.module), {**config, "data_root": folder.name})
    return {**config, "abbr": f"{name}-{key}"}
