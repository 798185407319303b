"""The table of benchmarks: their data files, and how VLMEvalKit's numbers become one score.

Light: neither OpenCompass nor VLMEvalKit is imported. File names, md5 and URLs are those of
VLMEvalKit (``DATASET_URL`` and ``DATASET_MD5`` of ms-vlmeval 0.0.20; a test compares them).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dpa_xtuner.errors import DPAError, nearest

NO_ANSWER = "\ue0d0" * 3
"""The answer of a sample that has none: characters of Unicode's private use. Nothing in it is an
option, "yes", "no" or a word: no benchmark takes it for right (tested for each)."""

KINDS = ("general", "vision-centric")
CIRCULAR = "circular"


@dataclass(frozen=True)
class DataFile:
    """A data set of VLMEvalKit, which is one file in the data folder.

    Attributes:
        dataset: VLMEvalKit's name of it.
        md5: Of the file; empty if any content will do.
        url: Where it can be fetched; empty if nowhere.
    """

    dataset: str
    md5: str = ""
    url: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.dataset}.tsv"


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        name: What a user types.
        title: What the table says.
        kind: One of `KINDS`.
        files: Its data sets. The benchmark's score is the mean of theirs.
        metric: Which of VLMEvalKit's numbers is a data set's score.
        scale: What makes 0 - 100 of VLMEvalKit's numbers: 100 for shares, 1 for percentages.
        group: Rows that are right or wrong together: this many neighbours in the order of their
            index, or `CIRCULAR` for one question with its options rotated, as VLMEvalKit
            takes any data set whose name holds "mmbench" or "circular".
        answer_tokens: Longest answer: an option, "yes", a few words; fields of forms and formulas
            take more. VLMEvalKit gives XTuner's LLaVA 5 for choices and 512 else; what ends the
            turn ends the answer anyway.
        judge: What takes a judge model's place where VLMEvalKit would ask one.
        module: Imported before a data set is built; may put classes of VLMEvalKit's kind into
            ``vlmeval.dataset.DATASET_CLASSES``. Where it changes, the benchmark is asked again.
        chance: The score, 0 - 100, of answering at random; None where the table need not say it.
    """

    name: str
    title: str
    kind: str
    files: tuple[DataFile, ...]
    metric: str = "Overall"
    scale: float = 100
    group: int | str = 1
    answer_tokens: int = 64
    judge: str = ""
    module: str | None = None
    chance: float | None = None

    def __post_init__(self) -> None:
        """Refuse a kind that the table has no place for."""
        if self.kind not in KINDS:
            raise DPAError(
                f"kind={self.kind!r} of benchmark {self.name!r}; expected one of {KINDS}."
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """VLMEvalKit's names of its data sets."""
        return tuple(file.dataset for file in self.files)

    def score(self, scores: Mapping[str, float]) -> float:
        """Make the benchmark's score of its data sets' scores, all of which must be there."""
        return sum(scores[dataset] for dataset in self.datasets) / len(self.datasets)

    def config(self, dataset: str, data_root: str | Path, limit: int | None = None) -> dict:
        """Make OpenCompass's config of one of the data sets, all but its ``abbr``.

        The evaluation task must be given ``dump_details=True`` for the samples' details to be kept.

        Args:
            dataset: VLMEvalKit's name of it.
            data_root: Folder with the data file; its pictures are unpacked to ``images`` there.
            limit: Questions to ask at most, see `EvaluationDataset`.
        """
        common = dict(
            dataset_name=dataset,
            data_root=str(data_root),
            limit=limit,
            group=self.group,
            module=self.module,
        )
        return dict(
            type="dpa_xtuner.evaluation.dataset.EvaluationDataset",
            **common,
            reader_cfg=dict(input_columns=["prompt"], output_column="answer"),
            infer_cfg=dict(
                prompt_template=dict(
                    type="opencompass.openicl.icl_raw_prompt_template.RawPromptTemplate",
                    messages=[dict(expand_column="prompt")],
                    format_variables=False,
                ),
                retriever=dict(type="opencompass.openicl.icl_retriever.ZeroRetriever"),
                inferencer=dict(
                    type="opencompass.openicl.icl_inferencer.GenInferencer",
                    max_out_len=self.answer_tokens,
                ),
            ),
            eval_cfg=dict(
                evaluator=dict(
                    type="dpa_xtuner.evaluation.evaluator.BenchmarkEvaluator",
                    **common,
                    metric=self.metric,
                    scale=self.scale,
                )
            ),
        )


def _file(dataset: str, md5: str, folder: str = "VLMEval") -> DataFile:
    return DataFile(
        dataset, md5, f"https://opencompass.openxlab.space/utils/{folder}/{dataset}.tsv"
    )


_EXACT = "exact matching"

_TABLE = (
    # A question counts if it is answered rightly in each rotation of its options.
    Benchmark(
        "mmbench",
        "MMBench",
        "general",
        (_file("MMBench_DEV_EN", "b6caf1133a01c6bb705cf753bb527ed8", "benchmarks/MMBench"),),
        group=CIRCULAR,
        judge=_EXACT,
    ),
    Benchmark(
        "ai2d",
        "AI2D",
        "general",
        (_file("AI2D_TEST", "0f593e0d1c7df9a3d69bf1f947e71975"),),
        judge=_EXACT,
    ),
    # ANLS: one minus the edit distance over the length; 0 where that is below 0.5.
    Benchmark(
        "docvqa",
        "DocVQA",
        "general",
        (_file("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf"),),
        scale=1,
        answer_tokens=128,
    ),
    # The share of questions of which an answer is a part of what was said.
    Benchmark(
        "ocrbench",
        "OCRBench",
        "general",
        (_file("OCRBench", "e953d98a987cc6e26ef717b61260b778"),),
        metric="Final Score Norm",
        scale=1,
        answer_tokens=256,
    ),
    # Cambrian-1 (arXiv 2406.16860, appendix C): the mean of 2D and 3D, and 2D the mean of its two
    # sources, ADE20K and COCO. VLMEvalKit gives just these two parts, and no whole. The share of
    # all 2,638 questions would be another number: 1,438 of them are 2D.
    Benchmark(
        "cvbench",
        "CV-Bench",
        "vision-centric",
        (
            _file("CV-Bench-2D", "a7cff4cc2857cc237ee2b89e62bccb2d"),
            _file("CV-Bench-3D", "bb94c0d568d652d15b60e001ac40a170"),
        ),
        judge=_EXACT,
    ),
    # "Overall" counts pairs with two right answers, "Average" answers.
    Benchmark(
        "mmvp",
        "MMVP",
        "vision-centric",
        (_file("MMVP", "8cb732b141a0cba5b42159df2839e557"),),
        group=2,
        judge=_EXACT,
    ),
    # The group accuracy, G_Acc, is what its authors rank models by (arXiv 2410.14669): a group is
    # two questions to two pictures, of which who does not look gets none right, but half of the
    # answers. Q_Acc, I_Acc and Acc (which VLMEvalKit would take) are kept among the metrics.
    Benchmark(
        "naturalbench",
        "NaturalBench",
        "vision-centric",
        (
            DataFile(
                "NaturalBenchDataset",
                "e5f724932972eaeb8a9099e6979606ec",
                "https://huggingface.co/datasets/BaiqiL/NaturalBench/resolve/main/"
                "NaturalBenchDataset.tsv",
            ),
        ),
        metric="G_Acc",
        group=4,
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
"""By name, in the paper's column order. `register_benchmark` adds to it."""

PAPER = tuple(BENCHMARKS)
"""The names of the paper's seven benchmarks."""


def register_benchmark(benchmark: Benchmark) -> None:
    """Add a benchmark of your own to `BENCHMARKS`; again is fine, another of that name is not.

    Its ``module``, where none is given, is the one that calls.
    """
    caller = sys._getframe(1).f_globals["__name__"]
    if benchmark.module is None and caller != "__main__":
        benchmark = replace(benchmark, module=caller)
    if BENCHMARKS.setdefault(benchmark.name, benchmark) != benchmark:
        raise DPAError(f"There is another benchmark {benchmark.name!r}. Choose another name.")


def find_benchmarks(names: Iterable[str], also: Iterable[str] = ()) -> list[Benchmark]:
    """Look names up, in the table's order; "all" stands for the paper's seven.

    Args:
        names: Of benchmarks.
        also: Names that the caller takes besides, for the message.

    Raises:
        DPAError: A name is unknown; the message has the nearest and the known ones.
    """
    found = dict.fromkeys(n for name in names for n in (PAPER if name == "all" else (name,)))
    for name in found:
        if name not in BENCHMARKS:
            known = ["all", *BENCHMARKS, *also]
            raise DPAError(
                f"There is no benchmark {name!r}{nearest(name, known)}. Known: {', '.join(known)}."
            )
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in found]


@dataclass(frozen=True)
class Missing:
    """A data file that can't be used.

    Attributes:
        benchmark: That needs it.
        file: What is expected.
        path: Where.
        problem: What is wrong with it.
        md5: Of the file that is there, where another is expected; else empty.
    """

    benchmark: Benchmark
    file: DataFile
    path: Path
    problem: str
    md5: str = ""

    def __str__(self) -> str:
        """What is wrong, and what to do."""
        return f"{self.path}: {self.problem}"


def missing_files(benchmarks: Iterable[Benchmark], root: str | Path) -> list[Missing]:
    """List what can't be used of the benchmarks' files in a folder.

    A file must be there and, where `DataFile` has one, have the right md5.
    """
    missing = []
    for benchmark in benchmarks:
        for file in benchmark.files:
            path = Path(root, file.name)
            get, found = f"python tools/get_benchmarks.py {benchmark.name}", ""
            if not path.is_file():
                problem = f"not there; get it with: {get}" if file.url else "not there"
            elif file.md5 and (found := file_md5(path)) != file.md5:
                problem = (
                    f"its md5 is {found}, expected {file.md5}: cut short, or another version. "
                    f"Move it away and get it again: {get}; or evaluate it as it is: tools/eval.py "
                    f"--ignore-md5"
                )
            else:
                continue
            missing.append(Missing(benchmark, file, path, problem, found))
    return missing


def file_md5(path: str | Path) -> str:
    """The md5 of a file, read once in a process unless the file changes."""
    state = Path(path).stat()
    return _file_md5(str(path), state.st_size, state.st_mtime_ns)


@functools.cache
def _file_md5(path: str, size: int, changed: int) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
