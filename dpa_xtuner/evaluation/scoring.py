"""VLMEvalKit's scores by its own functions, and which rows are right.

``score`` knows how VLMEvalKit scores the published benchmarks, and calls the functions that its
classes call. For any other class it calls ``evaluate``, which works on files.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from vlmeval.dataset.image_mcq import CVBench, ImageMCQDataset, NaturalBenchDataset
from vlmeval.dataset.image_vqa import ImageVQADataset, OCRBench
from vlmeval.dataset.utils import multiple_choice as mcq
from vlmeval.dataset.utils.naturalbench import extract_answer, get_scores
from vlmeval.dataset.utils.vqa_eval import anls_compute, hit_calculate
from vlmeval.smp import get_intermediate_file_path, load
from vlmeval.smp.status_report import flatten_summary_metrics

from dpa_xtuner.evaluation.benchmarks import CIRCULAR, NO_ANSWER
from dpa_xtuner.evaluation.dataset import group_keys

Scored = tuple[Sequence[bool | float | None], Mapping[str, float]]
"""Whether each row is right (a float if it can be partly right, None if VLMEvalKit does not tell),
and VLMEvalKit's numbers by name."""

# Reports of multiple choice, by a part of the data set's name; ``report_acc`` for all others.
_REPORTS = {"MMT": mcq.report_acc_MMT, "MMSci": mcq.report_acc_MMSci, "MMVP": mcq.report_acc_MMVP}
_ANLS = ("DocVQA", "InfoVQA")
_FORMULA = "Handwritten Mathematical Expression Recognition"
_OCR_TASKS = (
    "Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", _FORMULA,
)  # fmt: skip
# The file and the column in which a class's ``evaluate`` leaves the score of each row.
_ROW_FILES = (("_exact_matching_result", "hit"), ("_auxmatch", "score"), ("_results", "eval_score"))
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_LONGEST = 32_000  # a cell of a spreadsheet holds 32,767 characters


def score(dataset: Any, data: pd.DataFrame, group: int | str, folder: Path) -> Scored:
    """Score answers as the data set's class does, without a judge model.

    Args:
        dataset: made by ``vlmeval_dataset``.
        data: the file's rows and their ``prediction``, by ascending index, numbered from 0.
        group: see ``Benchmark``.
        folder: folder for files of a class that is not known here.
    """
    kind, name = type(dataset), dataset.dataset_name
    if kind is CVBench and all(data["split"] == "2D"):
        return _choices(data, group, partial(CVBench.report_accuracy, dataset))
    if kind in (CVBench, ImageMCQDataset):
        report = next((r for part, r in _REPORTS.items() if part in name), mcq.report_acc)
        return _choices(data, group, report)
    if kind is ImageVQADataset and any(part in name for part in _ANLS):
        return _anls(data, name)
    if issubclass(kind, OCRBench):
        return _ocrbench(data)
    if issubclass(kind, NaturalBenchDataset):
        return _naturalbench(data), naturalbench_scores(data)
    return _by_class(dataset, data, folder)


def _choices(data: pd.DataFrame, group: int | str, report: Callable) -> Scored:
    right = [mcq.prefetch_answer(row) == row["answer"] for _, row in data.iterrows()]
    table = data.rename(columns=lambda name: name if len(name) == 1 else name.lower())
    table["hit"] = right
    if group == CIRCULAR:  # a question counts if it is right in each rotation of its options
        keys = group_keys(data, group)
        table["hit"] = table["hit"].groupby(keys).transform("all")
        table = table[table["index"] == keys].reset_index(drop=True)
    return right, flatten_summary_metrics(report(table))


def _anls(data: pd.DataFrame, name: str) -> Scored:
    rows = zip(data["answer"].map(_listed), data["prediction"], strict=True)
    found = [{"match": [anls_compute(gold, answer) for gold in golds]} for golds, answer in rows]
    values = pd.Series(hit_calculate(found, name), dtype=float)
    by = next((data[column] for column in ("split", "category") if column in data), None)
    by_split = {} if by is None else values.groupby(by).mean().to_dict()
    means = {"Overall": values.mean(), **by_split}
    return values.tolist(), {name: 100 * fraction for name, fraction in means.items()}


def _listed(answer: str) -> list[str]:
    """Read the right answers: a list, or a single one."""
    try:
        found = ast.literal_eval(answer)
    except (ValueError, SyntaxError):
        return [answer]
    return found if isinstance(found, list) else [answer]


def _ocrbench(data: pd.DataFrame) -> Scored:
    """Score by OCRBench's rule, with its norm as a percentage for any number of questions."""
    right = [_is_read(row) for _, row in data.iterrows()]
    counts = dict.fromkeys(("Text Recognition", *_OCR_TASKS), 0)
    for category, hit in zip(data["category"], right, strict=True):
        counts[category if category in _OCR_TASKS else "Text Recognition"] += hit
    total = sum(right)
    return right, counts | {"Final Score": total, "Final Score Norm": 100 * total / len(right)}


def _is_read(row: pd.Series) -> bool:
    """Tell whether a right answer occurs in the answer; in formulas case counts, not spaces."""

    def plain(text: str) -> str:
        """Normalise a text as OCRBench does."""
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if row["category"] == _FORMULA else text.lower()

    answer, golds = plain(row["prediction"]), ast.literal_eval(row["answer"])
    return row["prediction"] != NO_ANSWER and any(plain(gold) in answer for gold in golds)


def _naturalbench(data: pd.DataFrame) -> list[bool | float | None]:
    golds = (1, 0, 0, 1)  # yes or A, no or B, in the order of a group
    return [read == golds[number % 4] for number, read in enumerate(_extracted(data))]


def naturalbench_scores(data: pd.DataFrame) -> dict[str, float]:
    """Return NaturalBench's fractions (0 - 1) of right answers, questions, pictures and groups.

    Args:
        data: any number of groups of four rows, with ``index``, ``type`` and ``prediction``.
    """
    read = _extracted(data.sort_values(by="index"))
    return get_scores([read[i : i + 4] for i in range(0, len(read), 4)])


def _extracted(data: pd.DataFrame) -> list[int]:
    return [
        extract_answer(str(answer), kind)
        for answer, kind in zip(data["prediction"], data["type"], strict=True)
    ]


def _by_class(dataset: Any, data: pd.DataFrame, folder: Path) -> Scored:
    """Let a class score a file of answers, and read from its files which rows are right."""
    file = str(folder / f"{dataset.dataset_name}.pkl")  # a spreadsheet would turn "007" into 7
    answers = data["prediction"].map(lambda text: _UNWRITABLE.sub(" ", text)[:_LONGEST])
    data.assign(prediction=answers).to_pickle(file)
    made = dataset.evaluate(file, model="exact_matching", nproc=1)
    for suffix, column in _ROW_FILES:
        if (left := Path(get_intermediate_file_path(file, suffix))).is_file():
            table = load(str(left))
            values = dict(zip(table["index"].map(str), table[column], strict=True))
            right = [_as_right(values.get(str(index))) for index in data["index"]]
            return right, flatten_summary_metrics(made)
    return [None] * len(data), flatten_summary_metrics(made)


def _as_right(value: Any) -> bool | float | None:
    if value is None or pd.isna(value):
        return None
    return bool(value) if value in (0, 1) else float(value)
