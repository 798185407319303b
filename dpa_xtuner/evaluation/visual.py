"""Models that see: Hugging Face LLaVA folders, and data sets of questions about pictures."""

from collections.abc import Iterable
from pathlib import Path

from dpa_xtuner.evaluation.benchmarks import Benchmark
from dpa_xtuner.evaluation.cache_key import cache_key, file_digest, module_files
from dpa_xtuner.evaluation.evaluate import Model, Options, opencompass_model
from dpa_xtuner.evaluation.folder import (
    check_llava,
    computing_dtype,
    files_read,
    has_chat_template,
    labels,
    pictures_in_training,
)

_NO_TEMPLATE = "has no chat template: it is asked in LLaVA-1.5's."


def models_of(folders: Iterable[Path], options: Options) -> list[Model]:
    """Describe the models of folders, each folder once.

    OpenCompass's name of a model depends on its own folder only, so that its answers are found
    again in an evaluation with other models.

    Raises:
        DPAError: a folder is not a LLaVA.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    for folder in unique:
        check_llava(folder)
    models = []
    for folder, label in zip(unique, labels(unique), strict=True):
        dtype = computing_dtype(folder, options.device)
        key = cache_key(files_read(folder), pictures_in_training(folder), str(dtype))
        abbr = f"{labels([folder])[0]}-{key}"
        config = opencompass_model("model.LlavaFolder", abbr, folder, options)
        note = "" if has_chat_template(folder) else _NO_TEMPLATE
        models.append(Model(label, folder.resolve(), config, note=note))
    return models


def data_sets_of(
    benchmark: Benchmark, data: Path, work_dir: Path, limit: int | None
) -> dict[str, dict]:
    """Make OpenCompass's configs of a benchmark's data sets, by VLMEvalKit's names.

    Args:
        benchmark: a benchmark whose files exist.
        data: folder of the benchmarks' files.
        work_dir: folder of the evaluation; pictures are unpacked there, into a folder named by the
            file's content.
        limit: the number of questions or groups to ask, evenly spread; None for all.
    """
    found = {}
    for name in benchmark.datasets:
        content = f"{name}-{file_digest(data / f'{name}.tsv')[:8]}"
        images = work_dir.resolve() / "data" / content
        config = benchmark.config(name, data.resolve(), limit, images)
        settings = {**config, "data_root": None, "images": content}
        key = cache_key(module_files(benchmark.module), settings)
        found[name] = {**config, "abbr": f"{name}-{key}"}
    return found
