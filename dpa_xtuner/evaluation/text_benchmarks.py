"""The text-only data sets of OpenCompass: their files, and where these come from."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import file_md5
from dpa_xtuner.files import move_into_place

TEXT_KINDS = ("answer", "likelihood")
"""The LLM writes an answer, or the candidate that it finds most probable counts as its answer."""


@dataclass(frozen=True)
class TextBenchmark:
    """A data set that OpenCompass reads from local files.

    Attributes:
        name: on the command line and in file names.
        title: the table's column.
        kind: one of `TEXT_KINDS`.
        config: OpenCompass's own, below ``opencompass.configs.datasets``. MMLU's holds 57 data
            sets, a subject each; its score is their unweighted mean, as in OpenCompass's summaries.
        path: what it is read from, below the data folder, where OpenCompass's archives have it.
        files: those that must be there: below ``path``, ``{name}`` being the data set's own; empty
            where ``path`` is the file.
        chance: what guessing scores, 0 - 100.
        judge: none is needed, see `dpa_xtuner.evaluation.benchmarks.Benchmark`.
    """

    name: str
    title: str
    kind: str
    config: str
    path: str
    files: tuple[str, ...]
    chance: float
    judge: str = ""

    def score(self, scores: Mapping[str, float]) -> float:
        """Make the benchmark's score of its data sets' scores: their mean."""
        return sum(scores.values()) / len(scores)


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
        TextBenchmark("arc_likelihood", "ARC-c likelihood", "likelihood", "ARC_c.ARC_c_ppl_a450bd",
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
    """Files of a benchmark that are not below ``root``, or empty."""
    needed = [file for config in configs(benchmark) for file in files(benchmark, config, root)]
    return [f for f in dict.fromkeys(needed) if not f.is_file() or not f.stat().st_size]


def left_out(benchmark: TextBenchmark, missing: list[Path]) -> str:
    """A line that says what is missing and how to get it."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{benchmark.title} ({benchmark.name}): {missing[0]}{more} not there, or empty; get "
        f"it with: python tools/get_benchmarks.py {benchmark.name}"
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
