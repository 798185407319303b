"""Text-only data sets of OpenCompass: what alignment did to the LLM's own abilities.

The original LLM, the proxy and the tuned LLM answer the same questions, in the same chat template.
Two kinds of data sets are told apart, since an LLM that was trained on captions may still know
what it no longer says: in those of kind ``answer`` the LLM writes an answer, in those of kind
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
from dpa_xtuner.evaluation.folder import files_read
from dpa_xtuner.evaluation.report import Details, Report, run_of_export
from dpa_xtuner.evaluation.run import content_hash, labels, results_of, run
from dpa_xtuner.evaluation.text_benchmarks import TextBenchmark, configs, files
from dpa_xtuner.files import read_json

ANSWER_TOKENS = 128
"""Longest answer in tokens, where a data set's config does not say it; ours."""


@dataclass(frozen=True)
class TextLLM:
    """An LLM to be asked.

    Attributes:
        label: the table's row.
        group: the LLMs that are compared, with the first of them.
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


def llms_of(folders: Iterable[Path]) -> list[TextLLM]:
    """The LLMs of folders.

    The export of a finished run, ``<run>/tune/hf``, has three: the original one, the proxy if there
    was one, the tuned one. All are asked in the chat template that the run was tuned in, so that
    they see the same tokens. Another folder, an LLM's own or a LLaVA's, has one.

    Raises:
        DPAError: it is neither, or the original LLM is neither a folder nor in the hub cache.
    """
    own = list({f.resolve(): Path(os.path.abspath(f)) for f in folders}.values())
    runs = [run_of_export(folder) if folder.parent.name == "tune" else None for folder in own]
    names = labels([run or folder for run, folder in zip(runs, own, strict=True)])
    found = []
    for folder, run_folder, name in zip(own, runs, names, strict=True):
        found += _llms_of_run(folder, name) if run_folder else [_llm_of_folder(folder, name)]
    return found


def _llms_of_run(exported: Path, name: str) -> list[TextLLM]:
    origin = read_json(exported / "dpa.json", "Export the run again.")
    if "llm" not in origin:
        raise DPAError(f"{exported} has no dpa.json that names its LLM. Export the run again.")
    base, proxy = local_folder(origin["llm"]), exported.parents[1] / "proxy"
    found: dict[str, tuple[Path, Path | None]] = {"original": (base, None)}
    if (proxy / "llm_adapter").is_dir():
        found["proxy"] = base, proxy / "llm_adapter"
    elif (proxy / "llm").is_dir():  # proxy.train_llm=full
        found["proxy"] = proxy / "llm", None
    found["tuned"] = exported, None
    return [
        TextLLM(f"{name}: {role} LLM", name, role, llm, exported, adapter)
        for role, (llm, adapter) in found.items()
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
    """The folder of a model that is given by folder or hub name.

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


def data_sets(benchmark: TextBenchmark, root: Path, limit: int | None) -> dict[str, dict]:
    """OpenCompass's configs for a run of ours: from local files, scored 0 - 100, named by hash.

    Args:
        benchmark: one whose files are there.
        root: the data folder.
        limit: how many questions, the first ones; of MMLU that many over all subjects, and at
            least one of each. None for all.

    Returns:
        By name: the benchmark's own, or one for each subject.
    """
    found = configs(benchmark)
    names = [f"{benchmark.name}_{config['name']}" for config in found if len(found) > 1]
    names = names or [benchmark.name]
    limit = limit and math.ceil(limit / len(found))
    return {
        name: _data_set(benchmark, config, root, limit, name)
        for name, config in zip(names, found, strict=True)
    }


def _data_set(
    benchmark: TextBenchmark, config: dict, root: Path, limit: int | None, name: str
) -> dict:
    del config["abbr"], config["path"]
    if limit is not None:
        config["reader_cfg"] = {
            **config["reader_cfg"],
            "test_range": f"[:{limit}]",
        }
    if benchmark.kind == "answer":
        config["infer_cfg"]["inferencer"].setdefault("max_out_len", ANSWER_TOKENS)
    else:
        kind = "dpa_xtuner.evaluation.text_model.LikelihoodInferencer"
        config["infer_cfg"]["inferencer"]["type"] = kind
    scoring = config["eval_cfg"]
    evaluator = {
        "type": "dpa_xtuner.evaluation.text_model.TextEvaluator",
        "evaluator": scoring["evaluator"],
        "postprocessor": scoring.get("pred_postprocessor"),
    }
    kept = {key: scoring[key] for key in ("dataset_postprocessor",) if key in scoring}
    config = _name_types({**config, "eval_cfg": {"evaluator": evaluator, **kept}})
    code = [Path(__file__).with_name("text_model.py")]
    digest = content_hash([*files(benchmark, config, root), *code], config)
    return {**config, "path": str((root / benchmark.path).resolve()), "abbr": f"{name}-{digest}"}


_SOURCE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def model_config(llm: TextLLM, batch_size: int, gpus: int) -> dict:
    """OpenCompass's config of an LLM, named by a hash of all files that its answers depend on."""
    folders = [llm.llm] if llm.adapter is None else [llm.llm, llm.adapter]
    read = [file for folder in folders for file in files_read(folder)]
    read += [p for pattern in _SOURCE for p in sorted(llm.source.glob(pattern))]
    code = [Path(__file__).with_name(f"{name}.py") for name in ("model", "text_model")]
    return {
        "type": "dpa_xtuner.evaluation.text_model.LanguageModel",
        "abbr": f"{llm.role}-{content_hash([*read, *code])}",
        "path": str(llm.llm.resolve()),
        "source": str(llm.source.resolve()),
        "adapter": llm.adapter and str(llm.adapter.resolve()),
        "max_seq_len": _positions(llm.llm),
        "device": "cuda" if gpus else "cpu",
        "batch_size": batch_size,
        "run_cfg": {"num_gpus": min(gpus, 1)},
    }


def _positions(folder: Path) -> int:
    """Positions of an LLM, of a LLaVA's LLM too, which writes only what is not the default."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(folder)
    values = values.get("text_config", values)
    if values["model_type"] in CONFIG_MAPPING:
        return CONFIG_MAPPING[values["model_type"]](**values).max_position_embeddings
    return values["max_position_embeddings"]


def _name_types(config: Any) -> Any:
    """Classes and functions of a config by their dotted names, which OpenCompass imports."""
    if isinstance(config, dict):
        return {key: _name_types(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_name_types(value) for value in config]
    if callable(config):
        return f"{config.__module__}.{config.__qualname__}"
    return config


def evaluate(
    llms: list[TextLLM],
    benchmarks: list[TextBenchmark],
    root: Path,
    work_dir: Path,
    *,
    limit: int | None = None,
    gpus: int = 0,
    batch_size: int = 8,
    left_out: Iterable[str] = (),
) -> tuple[Report, Details]:
    """Let OpenCompass ask LLMs the questions of benchmarks whose files are there.

    Args:
        llms: to be asked.
        benchmarks: to ask.
        root: folder of their files.
        work_dir: where all goes; what is there already is not done again.
        limit: see :func:`data_sets`.
        gpus: each answers a part of the questions; 0 and 1 answer in this process.
        batch_size: questions at a time.
        left_out: lines for the report, see there.

    Returns:
        The report, in which an LLM of a run is compared to the run's original one; and the samples.
    """
    models = {llm.label: model_config(llm, batch_size, gpus) for llm in llms}
    sets = {benchmark.name: data_sets(benchmark, root, limit) for benchmark in benchmarks}
    unique = {model["abbr"]: model for model in models.values()}
    asked = [config for found in sets.values() for config in found.values()]
    outcome = run(list(unique.values()), asked, work_dir, workers=max(gpus, 1))
    abbrs = {label: model["abbr"] for label, model in models.items()}
    table, details = results_of(abbrs, benchmarks, sets, outcome)
    first: dict[str, str] = {}
    compared = {llm.label: first.setdefault(llm.group, llm.label) for llm in llms}
    notes = []
    if limit is not None:
        notes.append("These are the first ones; of MMLU one of each subject at least is asked.")
    sources = {
        llm.label: {"folder": str(llm.llm.resolve()), "abbr": abbrs[llm.label]} for llm in llms
    }
    return Report(
        table, benchmarks, limit, list(left_out), notes=notes, sources=sources, compared=compared
    ), details
