"""The table of benchmarks: their data files, and how VLMEvalKit's numbers become one score.

It imports neither OpenCompass nor VLMEvalKit. File names, md5 and URLs are those of VLMEvalKit
(``DATASET_URL`` and ``DATASET_MD5`` of ms-vlmeval 0.0.20; a test compares them).
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.evaluation.cache_key import file_digest

NO_ANSWER = "\ue0d0" * 3
"""The answer of a sample that has none: characters of Unicode's private use. It holds no option, no
"yes" or "no" and no word, so no benchmark counts it as right (tested for each)."""

BENCHMARK_KINDS = _GENERAL, _VISION = "general", "vision-centric"
CIRCULAR = "circular"


def failed_samples(indices: Iterable, answers: Iterable) -> list[dict[str, Any]]:
    """List ``index`` and ``reason`` of samples without an answer.

    Args:
        indices: indices of all samples.
        answers: one for each; a failed one is empty, or ``NO_ANSWER`` and ``: reason``.
    """
    failed = []
    for index, answer in zip(indices, answers, strict=True):
        text = "" if answer is None else str(answer).strip()
        if not text or text.startswith(NO_ANSWER):
            reason = text.removeprefix(NO_ANSWER).removeprefix(":").strip()
            failed.append({"index": index, "reason": reason or "empty answer"})
    return failed


@dataclass(frozen=True)
class DataFile:
    """A file of the data folder: a data set of VLMEvalKit, or an archive of OpenCompass.

    Attributes:
        dataset: VLMEvalKit's name of the data set, or the folder in the archive.
        md5: the file's md5; empty if any content will do.
        url: address of the file; empty if it can't be fetched.
        ending: ending of the file's name: ``tsv``, or ``zip`` for an archive.
    """

    dataset: str
    md5: str = ""
    url: str = ""
    ending: str = "tsv"

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.dataset}.{self.ending}"

    @property
    def is_archive(self) -> bool:
        """Whether the file has to be unpacked."""
        return self.ending == "zip"


@dataclass(frozen=True)
class Missing:
    """A data file that can't be used.

    Attributes:
        title: title of the benchmark that needs it.
        file: the file to fetch.
        path: path of the file that is missing or wrong.
        problem: what is wrong with it, and what to do.
        md5: the file's md5 if it is not the expected one; else empty.
    """

    title: str
    file: DataFile
    path: Path
    problem: str
    md5: str = ""

    def __str__(self) -> str:
        """Say what is wrong, and what to do."""
        return f"{self.title}: {self.path}: {self.problem}"


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        name: its name on the command line.
        title: its title in the table.
        kind: one of ``BENCHMARK_KINDS``.
        files: its data sets. The benchmark's score is the mean of theirs.
        metric: the number of VLMEvalKit that is a data set's score.
        scale: factor that turns VLMEvalKit's numbers into 0 - 100: 100 for fractions, 1 for
            percentages.
        group: rows that are right or wrong together: this many neighbours in the order of their
            index, or ``CIRCULAR`` for one question with its options rotated, as in any data set
            whose name holds "mmbench" or "circular".
        answer_tokens: tokens of the longest answer: an option, "yes", a few words; fields of forms
            and formulas need more. VLMEvalKit allows XTuner's LLaVA 5 for choices and 512
            otherwise. An answer also ends where the turn ends.
        judge: what replaces the judge model that VLMEvalKit would ask.
        module: imported before a data set is built; may add classes to
            ``vlmeval.dataset.DATASET_CLASSES``. If its file changes, the benchmark is asked again.
        chance: the score, 0 - 100, of answering at random; None if the table does not show it.
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
        """Refuse an unknown kind."""
        if self.kind not in BENCHMARK_KINDS:
            raise DPAError(
                f"kind={self.kind!r} of benchmark {self.name!r}; expected one of {BENCHMARK_KINDS}."
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """VLMEvalKit's names of its data sets."""
        return tuple(file.dataset for file in self.files)

    def missing(self, root: Path) -> list[Missing]:
        """List the data files that can't be used: missing, or with another md5."""
        missing = []
        for file in self.files:
            path = root / file.name
            get, found = f"python tools/get_benchmarks.py {self.name}", ""
            if not path.is_file():
                problem = f"not there; get it with: {get}" if file.url else "not there"
            elif file.md5 and (found := file_digest(path)) != file.md5:
                problem = (
                    f"its md5 is {found}, expected {file.md5}: cut short, or another version. "
                    f"Move it away and get it again: {get}; or evaluate it all the same: "
                    f"tools/eval.py --ignore-md5"
                )
            else:
                continue
            missing.append(Missing(self.title, file, path, problem, found))
        return missing

    def score(self, scores: Mapping[str, float]) -> float:
        """Return the benchmark's score: the mean over all its data sets."""
        return sum(scores[dataset] for dataset in self.datasets) / len(self.datasets)

    def config(
        self,
        dataset: str,
        data_root: str | Path,
        limit: int | None = None,
        images: str | Path | None = None,
    ) -> dict:
        """Make OpenCompass's config of one of the data sets, without its ``abbr``.

        Give the evaluation task ``dump_details=True`` to keep the samples' details.

        Args:
            dataset: VLMEvalKit's name of the data set.
            data_root: folder of the data file.
            limit: the number of questions to ask, see ``EvaluationDataset``.
            images: folder to unpack its pictures to; by default one in ``data_root``.
        """
        common = dict(dataset_name=dataset, group=self.group, module=self.module)
        return dict(
            type="dpa_xtuner.evaluation.dataset.EvaluationDataset",
            **common,
            data_root=str(data_root),
            images=str(images or Path(data_root, "images", dataset)),
            limit=limit,
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


_SERVER = "https://opencompass.openxlab.space/utils/{}/{{}}.tsv"
_HUB = "https://huggingface.co/datasets/BaiqiL/NaturalBench/resolve/main/{}.tsv"
_PUBLISHED = {  # md5 and URL
    "MMBench_DEV_EN": ("b6caf1133a01c6bb705cf753bb527ed8", _SERVER.format("benchmarks/MMBench")),
    "AI2D_TEST": ("0f593e0d1c7df9a3d69bf1f947e71975", _SERVER.format("VLMEval")),
    "DocVQA_VAL": ("d5ee77e1926ff10690d469c56b73eabf", _SERVER.format("VLMEval")),
    "OCRBench": ("e953d98a987cc6e26ef717b61260b778", _SERVER.format("VLMEval")),
    "CV-Bench-2D": ("a7cff4cc2857cc237ee2b89e62bccb2d", _SERVER.format("VLMEval")),
    "CV-Bench-3D": ("bb94c0d568d652d15b60e001ac40a170", _SERVER.format("VLMEval")),
    "MMVP": ("8cb732b141a0cba5b42159df2839e557", _SERVER.format("VLMEval")),
    "NaturalBenchDataset": ("e5f724932972eaeb8a9099e6979606ec", _HUB),
}


def _files(*datasets: str) -> tuple[DataFile, ...]:
    published = [(dataset, *_PUBLISHED[dataset]) for dataset in datasets]
    return tuple(DataFile(dataset, md5, url.format(dataset)) for dataset, md5, url in published)


_EXACT = "exact matching"
_TABLE = (
    # A question counts if each rotation of its options is answered correctly.
    Benchmark(
        "mmbench", "MMBench", _GENERAL, _files("MMBench_DEV_EN"), group=CIRCULAR, judge=_EXACT
    ),
    Benchmark("ai2d", "AI2D", _GENERAL, _files("AI2D_TEST"), judge=_EXACT),
    # ANLS: one minus the edit distance over the length; 0 where that is below 0.5.
    Benchmark("docvqa", "DocVQA", _GENERAL, _files("DocVQA_VAL"), scale=1, answer_tokens=128),
    # The fraction of questions where a reference answer occurs in the model's answer.
    Benchmark(
        "ocrbench", "OCRBench", _GENERAL, _files("OCRBench"), "Final Score Norm", scale=1,
        answer_tokens=256,
    ),
    # Cambrian-1 (arXiv 2406.16860, appendix C): the mean of 2D and 3D, and 2D the mean of its two
    # sources, ADE20K and COCO. VLMEvalKit gives only these two splits. The fraction of all 2,638
    # questions would be another number: 1,438 of them are 2D.
    Benchmark(
        "cvbench", "CV-Bench", _VISION, _files("CV-Bench-2D", "CV-Bench-3D"), judge=_EXACT
    ),
    # "Overall" counts pairs with two right answers, "Average" answers.
    Benchmark("mmvp", "MMVP", _VISION, _files("MMVP"), group=2, judge=_EXACT),
    # The authors rank models by the group accuracy, G_Acc (arXiv 2410.14669). A group is two
    # questions about two pictures: without looking, half of the answers are right, but no group.
    # The metrics also have Q_Acc, I_Acc and Acc (VLMEvalKit's choice).
    Benchmark(
        "naturalbench", "NaturalBench", _VISION, _files("NaturalBenchDataset"), "G_Acc", group=4
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
"""By name, in the paper's column order. ``register_benchmark`` adds to it."""

PAPER = tuple(BENCHMARKS)
"""The names of the paper's seven benchmarks."""


def register_benchmark(benchmark: Benchmark) -> None:
    """Add a benchmark to ``BENCHMARKS``.

    Without a ``module``, it gets the calling module. The same benchmark may be added twice.

    Raises:
        DPAError: another benchmark has that name.
    """
    caller = sys._getframe(1).f_globals["__name__"]
    if benchmark.module is None and caller != "__main__":
        benchmark = replace(benchmark, module=caller)
    if BENCHMARKS.setdefault(benchmark.name, benchmark) != benchmark:
        raise DPAError(f"There is another benchmark {benchmark.name!r}. Choose another name.")


def find_benchmarks(names: Iterable[str], also: Iterable[str] = ()) -> list[Benchmark]:
    """Look names up, in the table's order; "all" stands for the paper's seven.

    Args:
        names: names of benchmarks.
        also: further names that the caller knows, for the message.

    Raises:
        DPAError: a name is unknown.
    """
    found = dict.fromkeys(n for name in names for n in (PAPER if name == "all" else (name,)))
    for name in found:
        if name not in BENCHMARKS:
            known = ["all", *BENCHMARKS, *also]
            raise DPAError(
                f"There is no benchmark {name!r}{nearest(name, known) or '.'} "
                f"Known: {', '.join(known)}."
            )
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in found]
