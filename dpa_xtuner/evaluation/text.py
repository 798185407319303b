"""Text-only data sets of OpenCompass: what training did to the LLM's own abilities.

The original LLM, the proxy and the tuned LLM answer the same questions, in the same chat template.
There are two kinds of data sets, since an LLM that was trained on captions may still know what it
no longer says. In those of kind ``answer`` the LLM writes an answer. In those of kind
``likelihood`` the candidate that it finds most probable counts as its answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.cache_key import cache_key
from dpa_xtuner.evaluation.evaluate import Model, Options, opencompass_model
from dpa_xtuner.evaluation.folder import computing_dtype, files_read, labels, run_of_export
from dpa_xtuner.evaluation.text_benchmarks import TextBenchmark
from dpa_xtuner.files import read_json
from dpa_xtuner.layout import LLM, LLM_ADAPTER, PROVENANCE_FILE, PROXY, TUNE

_SOURCE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")

ANSWER_TOKENS = 128
"""Our limit for an answer, where OpenCompass's config of a data set has none."""


@dataclass(frozen=True)
class TextLLM:
    """An LLM to evaluate.

    Attributes:
        label: the table's row.
        group: all LLMs of a group are compared to the first one.
        role: ``original``, ``proxy``, ``tuned`` or ``given``; in file names.
        llm: folder of a causal language model, or of a LLaVA, whose language model is taken.
        source: folder of tokenizer, chat template and generation config.
        adapter: PEFT folder, merged into the LLM once it is loaded.
    """

    label: str
    group: str
    role: str
    llm: Path
    source: Path
    adapter: Path | None = None


def models_of(folders: Iterable[Path], options: Options) -> list[Model]:
    """Describe the LLMs of folders; those of a run are compared to its original one."""
    llms = llms_of(folders)
    first: dict[str, str] = {}
    return [describe(llm, options, first.setdefault(llm.group, llm.label)) for llm in llms]


def llms_of(folders: Iterable[Path]) -> list[TextLLM]:
    """Find the LLMs of folders, each folder once.

    The export of a finished run, ``<run>/tune/hf``, has three: the original one, the proxy if there
    was one, the tuned one. All are asked in the chat template that the run was tuned in, so that
    they see the same tokens. Another folder, an LLM's or a LLaVA's, has one.

    Raises:
        DPAError: it is neither, or the original LLM is neither a folder nor in the hub cache.
    """
    own = list({f.resolve(): Path(os.path.abspath(f)) for f in folders}.values())
    runs = [run_of_export(folder) if folder.parent.name == TUNE else None for folder in own]
    names = labels([run or folder for run, folder in zip(runs, own, strict=True)])
    found = []
    for folder, run, name in zip(own, runs, names, strict=True):
        found += _llms_of_run(folder, name) if run else [_llm_of_folder(folder, name)]
    return found


def _llms_of_run(exported: Path, name: str) -> list[TextLLM]:
    file = exported / PROVENANCE_FILE
    provenance = read_json(file, "Export the run again.")
    if LLM not in provenance:
        raise DPAError(f"{file} is missing, or names no LLM. Export the run again.")
    original, proxy = local_folder(provenance[LLM]), exported.parents[1] / PROXY
    found: list[tuple[str, Path, Path | None]] = [("original", original, None)]
    if (proxy / LLM_ADAPTER).is_dir():
        found.append((PROXY, original, proxy / LLM_ADAPTER))
    elif (proxy / LLM).is_dir():  # proxy.train_llm=full
        found.append((PROXY, proxy / LLM, None))
    found.append(("tuned", exported, None))
    return [
        TextLLM(f"{name}: {role} LLM", name, role, llm, exported, adapter)
        for role, llm, adapter in found
    ]


def _llm_of_folder(folder: Path, name: str) -> TextLLM:
    for file in ("config.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            raise DPAError(
                f"{folder} has no {file}: give the folder of an LLM or of a LLaVA, with its "
                f"tokenizer."
            )
    return TextLLM(name, "", "given", folder, folder)


def local_folder(name: str) -> Path:
    """Find the folder of a model that is given by folder or hub name.

    Raises:
        DPAError: there is none on this machine.
    """
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    try:
        return Path(cached_file(name, "config.json", local_files_only=True)).parent
    except OSError:
        raise DPAError(
            f"llm_name_or_path={name!r} is neither a folder nor in the hub cache of this machine. "
            f"Give the folder of the original LLM, or fetch it once where there is a network."
        ) from None


def describe(llm: TextLLM, options: Options, reference: str = "") -> Model:
    """Make the model to evaluate, named by a hash of all that its answers depend on.

    Args:
        llm: the LLM.
        options: see there.
        reference: label of the LLM that it is compared to.
    """
    folders = [llm.llm] if llm.adapter is None else [llm.llm, llm.adapter]
    read = [file for folder in folders for file in files_read(folder)]
    read += [file for pattern in _SOURCE for file in sorted(llm.source.glob(pattern))]
    key = cache_key(read, str(computing_dtype(llm.llm, options.device)))
    config = opencompass_model(
        "text_model.LanguageModel",
        f"{llm.role}-{key}",
        llm.llm,
        options,
        source=str(llm.source.resolve()),
        adapter=llm.adapter and str(llm.adapter.resolve()),
        max_seq_len=_positions(llm.llm),
    )
    return Model(llm.label, llm.llm.resolve(), config, reference)


def _positions(folder: Path) -> int:
    """Read the positions of an LLM or of a LLaVA's LLM, whose config leaves defaults out."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(folder)
    values = values.get("text_config", values)
    if values["model_type"] in CONFIG_MAPPING:
        return CONFIG_MAPPING[values["model_type"]](**values).max_position_embeddings
    return values["max_position_embeddings"]


def data_sets_of(
    benchmark: TextBenchmark, data: Path, work_dir: Path, limit: int | None
) -> dict[str, dict]:
    """Make OpenCompass's configs for our runs: local files, scores 0 - 100, cache keys in names.

    Args:
        benchmark: one whose files are there.
        data: folder of their files.
        work_dir: where the evaluation goes; nothing is written there.
        limit: the number of questions, the first ones; of MMLU that many over all subjects, and at
            least one of each. None for all.

    Returns:
        By name: the benchmark's own, or one for each subject.
    """
    found = benchmark.configs()
    limit = limit and math.ceil(limit / len(found))
    names = [f"{benchmark.name}_{config['name']}" for config in found if len(found) > 1]
    names = names or [benchmark.name]
    return {
        name: _data_set(benchmark, config, data, limit, name)
        for name, config in zip(names, found, strict=True)
    }


def _data_set(
    benchmark: TextBenchmark, config: dict, root: Path, limit: int | None, name: str
) -> dict:
    ours = "dpa_xtuner.evaluation.text_model"
    del config["abbr"], config["path"]
    if limit is not None:
        config["reader_cfg"] = {**config["reader_cfg"], "test_range": f"[:{limit}]"}
    if benchmark.kind == "answer":
        config["infer_cfg"]["inferencer"].setdefault("max_out_len", ANSWER_TOKENS)
    else:
        config["infer_cfg"]["inferencer"]["type"] = f"{ours}.LikelihoodInferencer"
    scoring = config["eval_cfg"]
    evaluator = {
        "type": f"{ours}.TextEvaluator",
        "evaluator": scoring["evaluator"],
        "postprocessor": scoring.get("pred_postprocessor"),
    }
    kept = {key: scoring[key] for key in ("dataset_postprocessor",) if key in scoring}
    config = _name_types({**config, "eval_cfg": {"evaluator": evaluator, **kept}})
    key = cache_key(benchmark.paths(config, root), config)
    return {**config, "path": str((root / benchmark.path).resolve()), "abbr": f"{name}-{key}"}


def _name_types(config: Any) -> Any:
    """Replace classes and functions by their dotted names, which OpenCompass imports."""
    if isinstance(config, dict):
        return {key: _name_types(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_name_types(value) for value in config]
    return f"{config.__module__}.{config.__qualname__}" if callable(config) else config
