"""Text-only data sets of OpenCompass: what alignment did to the LLM's own abilities.

The original LLM, the proxy and the tuned LLM answer the same questions, in the same chat template.
Two kinds of data sets are told apart, since an LLM that was trained on captions may still know
what it no longer says: in those of kind ``answer`` the LLM writes an answer, in those of kind
``likelihood`` the candidate that it finds most probable counts as its answer.
"""

from __future__ import annotations

import copy
import csv
import importlib
import io
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpa_xtuner import tables
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import file_md5
from dpa_xtuner.evaluation.report import LISTED
from dpa_xtuner.evaluation.run import content_hash, run
from dpa_xtuner.files import move_into_place, write_json, write_text

ANSWER_TOKENS = 128
"""Longest answer in tokens, where a data set's config does not say it; ours."""


@dataclass(frozen=True)
class TextBenchmark:
    """A data set that OpenCompass reads from local files.

    Attributes:
        name: on the command line and in file names.
        title: the table's column.
        kind: ``answer`` or ``likelihood``.
        config: OpenCompass's own, below ``opencompass.configs.datasets``. MMLU's holds 57 data
            sets, a subject each; its score is their unweighted mean, as in OpenCompass's summaries.
        path: what it is read from, below the data folder, where OpenCompass's archives have it.
        files: those that must be there: below ``path``, ``{name}`` being the data set's own; empty
            where ``path`` is the file.
        chance: what guessing scores, 0 - 100.
    """

    name: str
    title: str
    kind: str
    config: str
    path: str
    files: tuple[str, ...]
    chance: float


_PIQA = ("train.jsonl", "train-labels.lst", "dev.jsonl", "dev-labels.lst")
_ARC = "ARC/ARC-c/ARC-Challenge-Dev.jsonl"

TEXT_BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        TextBenchmark("mmlu", "MMLU", "answer", "mmlu.mmlu_gen_4d595a",
                      "mmlu", ("dev/{name}_dev.csv", "test/{name}_test.csv"), 25.0),
        TextBenchmark("arc", "ARC-c", "answer", "ARC_c.ARC_c_gen_1e0de5", _ARC, (), 25.0),
        TextBenchmark("boolq", "BoolQ", "answer",
                      "SuperGLUE_BoolQ.SuperGLUE_BoolQ_gen_883d50",
                      "SuperGLUE/BoolQ/val.jsonl", (), 50.0),
        TextBenchmark("gsm8k", "GSM8K", "answer", "gsm8k.gsm8k_gen_1d7fe4",
                      "gsm8k", ("train.jsonl", "test.jsonl"), 0.0),
        TextBenchmark("arc_likelihood", "ARC-c", "likelihood", "ARC_c.ARC_c_ppl_a450bd",
                      _ARC, (), 25.0),
        TextBenchmark("hellaswag", "HellaSwag", "likelihood",
                      "hellaswag.hellaswag_ppl_47bff9", "hellaswag/hellaswag.jsonl", (), 25.0),
        TextBenchmark("piqa", "PIQA", "likelihood", "piqa.piqa_ppl_1cf9f0", "piqa", _PIQA, 50.0),
    )
}  # fmt: skip
"""By name, in the table's order. None needs a judge."""


@dataclass(frozen=True)
class Archive:
    """A zip of OpenCompass's that holds a folder of data sets.

    Attributes:
        folder: in the archive, and below the data folder once it is unpacked.
        md5: of the archive.
    """

    folder: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.folder}.zip"

    @property
    def url(self) -> str:
        """Where it can be fetched."""
        return f"http://opencompass.oss-cn-shanghai.aliyuncs.com/datasets/data/{self.name}"


ARCHIVES = {
    archive.folder: archive
    for archive in (
        Archive("mmlu", "761310671509a239e41c4b717f7fab9c"),
        Archive("ARC", "d720629b69f1a51cfe78bf65b00b44f6"),
        Archive("SuperGLUE", "b60904915b0b61d1a04ea52280169936"),
        Archive("gsm8k", "901e5dc93a2889789a469da9850cdca8"),
        Archive("hellaswag", "2b700a02ffb58571c7df8d8d0619256f"),
        Archive("piqa", "39374924aec45f2f7efdffb1977ce2ba"),
    )
}
"""By folder: those of OpenCompass 0.5.4 (``opencompass.utils.datasets_info``; a test compares)."""


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


def llms_of_config(config: Path, exported: Path) -> list[TextLLM]:
    """The LLMs of a finished run: the original one, the proxy if there was one, the tuned one.

    All are asked in the chat template that the run was tuned in, so that they see the same tokens.

    Args:
        config: the run's.
        exported: its tuned model as a LLaVA folder, ``<work dir>/tune/hf``.

    Raises:
        DPAError: the original LLM is neither a folder nor in the hub cache.
    """
    from mmengine.config import Config

    run, proxy = config.stem, exported.parents[1] / "proxy"
    base = local_folder(Config.fromfile(config).llm_name_or_path)
    found: dict[str, tuple[Path, Path | None]] = {"original": (base, None)}
    if (proxy / "llm_adapter").is_dir():
        found["proxy"] = base, proxy / "llm_adapter"
    elif (proxy / "llm").is_dir():  # proxy.train_llm=full
        found["proxy"] = proxy / "llm", None
    found["tuned"] = exported, None
    return [
        TextLLM(f"{run}: {role} LLM", run, role, llm, exported, adapter)
        for role, (llm, adapter) in found.items()
    ]


def llm_of_folder(folder: Path) -> TextLLM:
    """The LLM of a folder that is an LLM's own, or a LLaVA's.

    Raises:
        DPAError: it is neither.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise DPAError(
                f"{folder} has no {name}: give the folder of an LLM or of a LLaVA, with its "
                f"tokenizer."
            )
    return TextLLM(str(folder), "", "given", folder, folder)


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


def choose(names: list[str]) -> tuple[list[TextBenchmark], list[str]]:
    """The text benchmarks among names, ``text`` being all of them; and the names left."""
    chosen = [b for b in TEXT_BENCHMARKS.values() if b.name in names or "text" in names]
    return chosen, [name for name in names if name not in {"text", *TEXT_BENCHMARKS}]


def with_files(
    benchmarks: list[TextBenchmark], root: Path
) -> tuple[list[TextBenchmark], list[str]]:
    """Those whose files are there; and a line for each other, see :func:`left_out`."""
    missing = {benchmark: missing_files(benchmark, root) for benchmark in benchmarks}
    lines = [left_out(benchmark, lacking) for benchmark, lacking in missing.items() if lacking]
    return [benchmark for benchmark, lacking in missing.items() if not lacking], lines


def configs(benchmark: TextBenchmark) -> list[dict]:
    """OpenCompass's own configs of a benchmark's data sets, to be changed freely."""
    module = importlib.import_module(f"opencompass.configs.datasets.{benchmark.config}")
    (found,) = (value for name, value in vars(module).items() if name.endswith("_datasets"))
    return copy.deepcopy(found)


def files(benchmark: TextBenchmark, config: dict, root: Path) -> list[Path]:
    """What one of :func:`configs` is read from, below the data folder ``root``."""
    path = root / benchmark.path
    named = [path / file.format(name=config.get("name")) for file in benchmark.files]
    return named or [path]


def missing_files(benchmark: TextBenchmark, root: Path) -> list[Path]:
    """Files of a benchmark that are not below ``root``."""
    needed = [file for config in configs(benchmark) for file in files(benchmark, config, root)]
    return [file for file in dict.fromkeys(needed) if not file.is_file()]


def left_out(benchmark: TextBenchmark, missing: list[Path]) -> str:
    """A line that says what is missing and how to get it."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{benchmark.title} ({benchmark.name}): {missing[0]}{more} not there; get it with: python "
        f"tools/get_benchmarks.py {benchmark.name}"
    )


def archives(benchmarks: list[TextBenchmark], root: Path) -> dict[Archive, list[Path]]:
    """The archives that benchmarks' files come in, with those of the files that are not there."""
    found: dict[Archive, list[Path]] = {}
    for benchmark in benchmarks:
        archive = ARCHIVES[benchmark.path.partition("/")[0]]
        found.setdefault(archive, []).extend(missing_files(benchmark, root))
    return {archive: list(dict.fromkeys(files)) for archive, files in found.items()}


def unpack(archive: Archive, root: Path) -> None:
    """Unpack an archive that is in the data folder; its folder appears whole or not at all.

    Raises:
        DPAError: the archive is another one or does not hold its folder.
    """
    packed = root / archive.name
    if (found := file_md5(packed)) != archive.md5:
        raise DPAError(
            f"its md5 is {found}, expected {archive.md5}: cut short, or another version. Move it "
            f"away and get it again."
        )
    partial = root / f".{archive.folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        shutil.unpack_archive(packed, partial)
        if not (partial / archive.folder).is_dir():
            raise DPAError(f"it holds no folder {archive.folder}.")
        move_into_place(partial / archive.folder, root / archive.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def data_sets(benchmark: TextBenchmark, root: Path, limit: int | None) -> list[dict]:
    """OpenCompass's configs for a run of ours: from local files, scored 0 - 100, named by hash.

    Args:
        benchmark: one whose files are there.
        root: the data folder.
        limit: how many questions, the first ones; of MMLU that many over all subjects, and at
            least one of each. None for all.
    """
    found = configs(benchmark)
    return [_data_set(benchmark, config, root, limit, len(found)) for config in found]


def _data_set(
    benchmark: TextBenchmark, config: dict, root: Path, limit: int | None, parts: int
) -> dict:
    name = benchmark.name if parts == 1 else f"{benchmark.name}_{config['name']}"
    del config["abbr"], config["path"]
    if limit is not None:
        config["reader_cfg"] = {
            **config["reader_cfg"],
            "test_range": f"[:{math.ceil(limit / parts)}]",
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
    read = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]
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


@dataclass(frozen=True)
class Row:
    """An LLM's scores.

    Attributes:
        label: see :class:`TextLLM`.
        group: see :class:`TextLLM`.
        scores: benchmark name -> score, 0 - 100.
        samples: benchmark name -> how many questions.
        failed: those that could not be answered, and count as wrong: ``dataset``, ``index`` and
            ``reason`` of each.
    """

    label: str
    group: str
    scores: dict[str, float]
    samples: dict[str, int]
    failed: list[dict]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        benchmarks: those that were run.
        rows: one for each LLM.
        trouble: a line for each part that has no result: which, and where its log is.
    """

    benchmarks: list[TextBenchmark]
    rows: list[Row]
    trouble: list[str]


def evaluate(
    llms: list[TextLLM],
    benchmarks: list[TextBenchmark],
    root: Path,
    work_dir: Path,
    limit: int | None = None,
    batch_size: int = 8,
    gpus: int = 0,
) -> Evaluated:
    """Let OpenCompass ask LLMs the questions of benchmarks whose files are there.

    Args:
        llms: to be asked.
        benchmarks: to ask.
        root: folder of their files.
        work_dir: where all goes; what is there already is not done again.
        limit: see :func:`data_sets`.
        batch_size: questions at a time.
        gpus: each answers a part of the questions; 0 and 1 answer in this process.
    """
    models = [model_config(llm, batch_size, gpus) for llm in llms]
    sets = {b.name: data_sets(b, root, limit) for b in benchmarks}
    unique = list({model["abbr"]: model for model in models}.values())
    outcome = run(unique, [c for found in sets.values() for c in found], work_dir, max(1, gpus))
    trouble = [f"{m} on {d}: {reason}" for (m, d), reason in outcome.failures.items()]
    rows = []
    for llm, model in zip(llms, models, strict=True):
        scores, samples, failed = {}, {}, []
        for name, found in sets.items():
            pairs = [(model["abbr"], config["abbr"]) for config in found]
            if all(pair in outcome.results for pair in pairs):
                results = [outcome.results[pair] for pair in pairs]
                scores[name] = sum(result["score"] for result in results) / len(results)
                samples[name] = sum(result["samples"] for result in results)
                own = [
                    {"dataset": config["abbr"].rpartition("-")[0], **f}
                    for config, result in zip(found, results, strict=True)
                    for f in result["failed"]
                ]
                failed += own
                if len(own) == samples[name]:
                    reason = own[0]["reason"]
                    trouble.append(f"{llm.label} on {name}: nothing was answered ({reason})")
        rows.append(Row(llm.label, llm.group, scores, samples, failed))
    return Evaluated(benchmarks, rows, trouble)


def cells(evaluated: Evaluated) -> list[list[str]]:
    """The table's cells: a header, chance, and a row for each LLM.

    Behind a score stands its difference to the first LLM of the same group; a mean is that of the
    benchmarks of its kind, where all have a score.
    """
    kinds = list(dict.fromkeys(b.kind for b in evaluated.benchmarks))
    groups = {kind: [b for b in evaluated.benchmarks if b.kind == kind] for kind in kinds}
    header = ["LLM"]
    for kind, group in groups.items():
        header += [f"{b.title}, {kind}" for b in group] + [f"mean, {kind}"]

    def values(scores: dict[str, float]) -> list[float | None]:
        found: list[float | None] = []
        for group in groups.values():
            own = [scores.get(b.name) for b in group]
            found += [*own, None if None in own else sum(own) / len(own)]
        return found

    chance = values({b.name: b.chance for b in evaluated.benchmarks})
    table = [header, ["chance", *(f"{value:.1f}" for value in chance)]]
    first: dict[str, list[float | None]] = {}
    for row in evaluated.rows:
        own = values(row.scores)
        reference = first.setdefault(row.group, own)
        shown = [row.label]
        for value, other in zip(own, reference, strict=True):
            text = "-" if value is None else f"{value:.1f}"
            if reference is not own and value is not None and other is not None:
                text += f" ({value - other:+.1f})"
            shown.append(text)
        table.append(shown)
    return table


def save(evaluated: Evaluated, folder: Path, limit: int | None, without: list[str]) -> str:
    """Write the table as ``text.md``, ``text.csv`` and ``text.json``.

    Args:
        evaluated: what was found.
        folder: where to.
        limit: that was set.
        without: lines on benchmarks that were left out.

    Returns:
        The table as Markdown, and what a reader must know beside it.
    """
    table = cells(evaluated)
    lines = [tables.markdown(table[0], table[1:]), ""]
    if limit is not None:
        lines.append(f"- Of each data set {limit} questions were asked, the first ones.")
    lines += [f"- Left out: {line}" for line in without]
    for row in evaluated.rows:
        lines += [
            f"- Sample without an answer: {row.label}, {f['dataset']} {f['index']}: {f['reason']}"
            for f in row.failed[:LISTED]
        ]
        if (more := len(row.failed) - LISTED) > 0:
            lines.append(f"- {more} more of them are listed in text.json: {row.label}")
    lines += [f"- Failed: {line}" for line in evaluated.trouble]
    markdown = "\n".join(lines).rstrip()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "text.md", markdown + "\n")
    with io.StringIO() as text:
        csv.writer(text, lineterminator="\n").writerows(table)
        write_text(folder / "text.csv", text.getvalue())
    content = {"limit": limit, "left_out": without, "trouble": evaluated.trouble}
    write_json(folder / "text.json", {"llms": [asdict(row) for row in evaluated.rows], **content})
    return markdown
