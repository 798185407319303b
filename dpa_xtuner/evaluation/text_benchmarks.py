"""The text-only data sets of OpenCompass, their files and the archives of these."""

import copy
import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import DataFile, Missing
from dpa_xtuner.evaluation.cache_key import file_digest
from dpa_xtuner.files import move_into_place

TEXT_KINDS = ("answer", "likelihood")
"""The LLM writes an answer, or its most probable candidate counts as its answer."""


def _archive(folder: str, md5: str) -> DataFile:
    url = f"http://opencompass.oss-cn-shanghai.aliyuncs.com/datasets/data/{folder}.zip"
    return DataFile(folder, md5, url, "zip")


ARCHIVES = {
    archive.dataset: archive
    for archive in (
        _archive("mmlu", "761310671509a239e41c4b717f7fab9c"),
        _archive("ARC", "d720629b69f1a51cfe78bf65b00b44f6"),
        _archive("SuperGLUE", "b60904915b0b61d1a04ea52280169936"),
        _archive("gsm8k", "901e5dc93a2889789a469da9850cdca8"),
        _archive("hellaswag", "2b700a02ffb58571c7df8d8d0619256f"),
        _archive("piqa", "39374924aec45f2f7efdffb1977ce2ba"),
    )
}
"""By folder: those of OpenCompass 0.5.4 (``opencompass.utils.datasets_info``; a test compares)."""


@dataclass(frozen=True)
class TextBenchmark:
    """A data set that OpenCompass reads from local files.

    Attributes:
        name: its name on the command line and in file names.
        title: its title in the table.
        kind: one of ``TEXT_KINDS``.
        configs_of: OpenCompass's module of configs, below ``opencompass.configs.datasets``. MMLU's
            holds 57 data sets, one for each subject; its score is their unweighted mean, as in
            OpenCompass's summaries.
        path: its file or folder below the data folder, as in OpenCompass's archives.
        parts: required files below ``path``; ``{name}`` is the data set's name. Empty if ``path``
            is the file.
        chance: the score of guessing, 0 - 100.
        judge: empty, see ``dpa_xtuner.evaluation.benchmarks.Benchmark``.
    """

    name: str
    title: str
    kind: str
    configs_of: str
    path: str
    parts: tuple[str, ...]
    chance: float
    judge: str = ""

    @property
    def files(self) -> tuple[DataFile]:
        """The archive that its files come in."""
        return (ARCHIVES[self.path.partition("/")[0]],)

    def score(self, scores: Mapping[str, float]) -> float:
        """Return the benchmark's score: the mean over its data sets."""
        return sum(scores.values()) / len(scores)

    def configs(self) -> list[dict]:
        """Return OpenCompass's configs of its data sets, as copies."""
        module = importlib.import_module(f"opencompass.configs.datasets.{self.configs_of}")
        (found,) = (value for name, value in vars(module).items() if name.endswith("_datasets"))
        return copy.deepcopy(found)

    def paths(self, config: dict, root: Path) -> list[Path]:
        """List the files of one of ``configs``, below the data folder."""
        path = root / self.path
        return [path / part.format(name=config.get("name")) for part in self.parts] or [path]

    def missing(self, root: Path) -> list[Missing]:
        """Report files that are missing or empty: one entry for all of them."""
        needed = [path for config in self.configs() for path in self.paths(config, root)]
        lacking = [p for p in dict.fromkeys(needed) if not p.is_file() or not p.stat().st_size]
        if not lacking:
            return []
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        problem = f"not there, or empty{more}; "
        if (folder := root / self.files[0].dataset).exists():
            problem += f"move {folder} away and "
        problem += f"get it with: python tools/get_benchmarks.py {self.name}"
        return [Missing(self.title, self.files[0], lacking[0], problem)]


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


def split_names(names: list[str]) -> tuple[list[TextBenchmark], list[str]]:
    """Split names into text benchmarks (``text`` means all of them) and other names."""
    chosen = [b for b in TEXT_BENCHMARKS.values() if b.name in names or "text" in names]
    return chosen, [name for name in names if name not in {"text", *TEXT_BENCHMARKS}]


def unpack(archive: DataFile, root: Path) -> None:
    """Unpack an archive in the data folder; its folder appears completely or not at all.

    Raises:
        DPAError: the archive has another md5, or does not hold its folder.
    """
    packed = root / archive.name
    if (found := file_digest(packed)) != archive.md5:
        raise DPAError(
            f"its md5 is {found}, expected {archive.md5}: cut short, or another version. Move it "
            f"away and get it again."
        )
    partial = root / f".{archive.dataset}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        shutil.unpack_archive(packed, partial)
        if not (partial / archive.dataset).is_dir():
            raise DPAError(f"it holds no folder {archive.dataset}.")
        move_into_place(partial / archive.dataset, root / archive.dataset)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
