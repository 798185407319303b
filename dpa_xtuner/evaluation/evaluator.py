"""Scores by VLMEvalKit's functions, on one scale, with what became of each sample."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from opencompass.evaluator.vlmevalkit import VLMEvalKitEvaluator
from opencompass.registry import ICL_EVALUATORS
from vlmeval.dataset.image_mcq import NaturalBenchDataset
from vlmeval.dataset.image_vqa import OCRBench
from vlmeval.dataset.utils.multiple_choice import prefetch_answer
from vlmeval.dataset.utils.naturalbench import extract_answer
from vlmeval.dataset.utils.vqa_eval import hit_calculate
from vlmeval.smp import get_intermediate_file_path, load
from vlmeval.smp.status_report import flatten_summary_metrics

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import CIRCULAR, NO_ANSWER
from dpa_xtuner.evaluation.dataset import (
    NO_GOLD,
    answers_file,
    group_keys,
    known_to_vlmevalkit,
)

# Where VLMEvalKit leaves what it made of each row, and in which column.
_RECORDS = (("_exact_matching_result", "hit"), ("_auxmatch", "score"), ("_results", "eval_score"))
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_LONGEST = 32_000  # a cell of a spreadsheet holds 32,767 characters


@ICL_EVALUATORS.register_module()
class BenchmarkEvaluator(VLMEvalKitEvaluator):
    """Has VLMEvalKit score a data set, without a judge model.

    The answers go through VLMEvalKit's own functions, so that the numbers are its; what would lose
    it the data set is taken out of them (characters that its spreadsheets can't hold).
    """

    def __init__(
        self,
        dataset_name: str,
        data_root: str,
        limit: int | None = None,
        group: int | str = 1,
        module: str | None = None,
        metric: str = "Overall",
        scale: float = 100,
    ) -> None:
        """Keep what `Benchmark.config` gives; see `EvaluationDataset.load` and `Benchmark`."""
        known_to_vlmevalkit(dataset_name, module)
        super().__init__(
            dataset_name,
            data_root,
            dataset_kwargs=dict(limit=limit, group=group),
            eval_kwargs=dict(model="exact_matching", nproc=1),
        )
        self.group_rows = group
        self.metric = metric
        self.scale = scale

    def evaluate(self, k: Any, n: Any, original_dataset: Dataset, **arguments: Any) -> dict:
        """Call `score`, without the base class's reckoning over repeated runs."""
        return self.score(**arguments)

    def score(self, predictions: Sequence[str | None], test_set: Dataset) -> dict[str, Any]:
        """Score a data set.

        Args:
            predictions: An answer for each row of ``test_set``; one that is empty or begins with
                `NO_ANSWER` is that of a sample that failed, and wrong. So is any answer where the
                data file has no right one.
            test_set: Rows of `EvaluationDataset`, all that were asked for.

        Returns:
            ``score`` (0 - 100), ``samples`` (how many rows), ``metrics`` (VLMEvalKit's numbers by
            name, shares as 0 - 100), ``failed`` (``index`` and ``reason`` of each) and ``details``
            (a dict for each row: index, question, image (path), answer, prediction, correct: a
            bool, a float where an answer can be partly right, or None where VLMEvalKit does not
            tell; group: the same for rows that are right or wrong together, None without groups).
        """
        answers, failed = [], []
        golds = test_set["answer"]
        for index, gold, prediction in zip(
            test_set["vlmeval_index"], golds, predictions, strict=True
        ):
            text = _UNWRITABLE.sub(" ", str(prediction or ""))[:_LONGEST]
            if gold == NO_GOLD:
                text = f"{NO_ANSWER}: no right answer is given"
            if not text.strip() or text.startswith(NO_ANSWER):
                reason = text.removeprefix(NO_ANSWER).strip().removeprefix(":").strip()
                reason = reason or "empty answer"
                failed.append({"index": index, "reason": reason})
                text = NO_ANSWER
            answers.append(text)
        indices = map(str, test_set["vlmeval_index"])
        self.dataset_kwargs["answers"] = dict(zip(indices, answers, strict=True))
        # VLMEvalKit would go on with what it finds of an earlier evaluation.
        shutil.rmtree(self.output_dir, ignore_errors=True)
        metrics = {
            name: float(value) * self.scale
            for name, value in super().score(answers, test_set).items()
        }
        return {
            "score": self._headline(metrics),
            "samples": len(answers),
            "metrics": metrics,
            "failed": failed,
            "details": self._details(predictions, test_set),
        }

    def _headline(self, metrics: dict[str, float]) -> float:
        """The number of that name; the mean of several splits' where there are several."""
        found = [v for name, v in metrics.items() if name.rpartition("|")[2] == self.metric]
        if not found:
            raise DPAError(
                f"VLMEvalKit's numbers for {self.dataset_name} have no {self.metric!r}; "
                f"there are: {', '.join(metrics)}."
            )
        return sum(found) / len(found)

    def _details(self, predictions: Sequence[str | None], test_set: Dataset) -> list[dict]:
        file = answers_file(Path(self.output_dir, f"{self.dataset_name}.xlsx"))
        frame = load(str(file))  # the answers as VLMEvalKit has read them
        keys = group_keys(frame, self.group_rows)
        indices = [str(index) for index in frame["index"]]
        correct = dict(zip(indices, _correct(self._dataset, frame, file), strict=True))
        groups = dict(zip(indices, keys.tolist(), strict=True))
        details = []
        for row, prediction in zip(test_set, predictions, strict=True):
            blocks = [block for message in row["prompt"] for block in message["content"]]
            images = [block["image_url"] for block in blocks if block["type"] == "image"]
            texts = [block["text"] for block in blocks if block["type"] == "text"]
            index = str(row["vlmeval_index"])
            details.append(
                {
                    "index": row["vlmeval_index"],
                    "question": "\n".join(texts),
                    "image": images[0] if images else None,
                    "answer": row["answer"],
                    "prediction": prediction,
                    "correct": correct[index],
                    "group": groups[index] if self.group_rows != 1 else None,
                }
            )
        return details

    def _convert_metrics(self, dataset: Any, raw_metrics: Any) -> tuple[dict, dict, dict]:
        """VLMEvalKit's numbers as they are: the base class takes each for a share."""
        self._dataset = dataset
        flat = flatten_summary_metrics(raw_metrics)
        if not flat:
            raise DPAError(f"VLMEvalKit gave no number for {self.dataset_name}.")
        return flat, flat, {}


def _correct(dataset: Any, frame: pd.DataFrame, file: Path) -> list[bool | float | None]:
    """What VLMEvalKit made of each row: from its records, or else by its functions."""
    if rule := _rule(dataset):
        return [rule(line) for _, line in frame.iterrows()]
    name = dataset.dataset_name
    if (
        "DocVQA" in name or "InfoVQA" in name
    ):  # the record has distances, the scores are made of them
        distances = _record(file, "_results", "eval_match")
        matches = [{"match": ast.literal_eval(distances[str(index)])} for index in frame["index"]]
        return [float(hit) for hit in hit_calculate(matches, name)]
    if isinstance(dataset, NaturalBenchDataset):  # yes, no, no, yes, in the order of the index
        rank = frame["index"].rank(method="first").astype(int) - 1
        return [
            extract_answer(str(said), kind) == (1, 0, 0, 1)[place % 4]
            for said, kind, place in zip(frame["prediction"], frame["type"], rank, strict=True)
        ]
    for suffix, column in _RECORDS:
        if made := _record(file, suffix, column):
            return [_plain(made.get(str(index))) for index in frame["index"]]
    return [None] * len(frame)


def _record(file: Path, suffix: str, column: str) -> dict[str, Any]:
    """A column of a file that VLMEvalKit left, by index; empty where there is none."""
    record = Path(get_intermediate_file_path(str(file), suffix))
    if not record.is_file():
        return {}
    table = load(str(record))
    return dict(zip(table["index"].map(str), table[column], strict=True))


def _rule(dataset: Any) -> Callable[[pd.Series], bool | float] | None:
    if isinstance(dataset, OCRBench):
        return _ocr_hit
    if dataset.group == CIRCULAR:  # its records have one row for each group
        return lambda line: prefetch_answer(line) == line["answer"]
    return None


def _ocr_hit(line: pd.Series) -> bool:
    """As VLMEvalKit's OCRBench does: formulas with their case, and without spaces."""
    formula = line["category"] == "Handwritten Mathematical Expression Recognition"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    said = plain(str(line["prediction"]))
    return any(plain(gold) in said for gold in ast.literal_eval(line["answer"]))


def _plain(value: Any) -> bool | float | None:
    if value is None or pd.isna(value):
        return None
    return bool(value) if value in (0, 1) else float(value)
