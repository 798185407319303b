"""OpenCompass's evaluator of questions about pictures: VLMEvalKit's score, and every sample."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from opencompass.openicl.icl_evaluator import BaseEvaluator
from opencompass.registry import ICL_EVALUATORS

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER, failed_samples
from dpa_xtuner.evaluation.dataset import group_keys, vlmeval_dataset
from dpa_xtuner.evaluation.scoring import score

_NO_GOLD = "['no answer in the data file']"  # valid for any rule, and equal to no answer
_NO_QUESTION = "no question in the data file"


@ICL_EVALUATORS.register_module()
class BenchmarkEvaluator(BaseEvaluator):
    """Scores a data set by VLMEvalKit's functions, without a judge model.

    Args:
        dataset_name: VLMEvalKit's name.
        group: see ``Benchmark``.
        module: imported first; see ``Benchmark``.
        metric: VLMEvalKit's name of the number that is the score.
        scale: factor that turns VLMEvalKit's numbers into 0 - 100.
    """

    def __init__(
        self,
        dataset_name: str,
        group: int | str = 1,
        module: str | None = None,
        metric: str = "Overall",
        scale: float = 100,
    ) -> None:
        super().__init__()
        self.dataset_name, self.group_rows, self.module = dataset_name, group, module
        self.metric, self.scale = metric, scale

    def evaluate(self, k: Any, n: Any, original_dataset: Dataset, **arguments: Any) -> dict:
        """Call ``score``, without the base class's statistics over repeated runs.

        Args:
            k: not used.
            n: not used.
            original_dataset: not used.
            arguments: arguments of ``score``.
        """
        return self.score(**arguments)

    def score(self, predictions: Sequence[str | None], test_set: Dataset) -> dict[str, Any]:
        """Score a data set.

        Args:
            predictions: an answer for each row of ``test_set``. A sample whose answer is empty or
                begins with ``NO_ANSWER`` has failed and counts as wrong. So does a sample whose
                row has no right answer.
            test_set: the rows of ``EvaluationDataset`` that were asked.

        Returns:
            ``score`` (0 - 100), ``samples`` (number of rows), ``metrics`` (VLMEvalKit's numbers by
            name, fractions as 0 - 100), ``failed`` (``index`` and ``reason`` of each) and
            ``details`` (of each row: index, question, image (path), answer, prediction, correct, as
            in ``Scored``, and group: the same for rows that are right or wrong together, None
            without groups).
        """
        data = pd.DataFrame([json.loads(row) for row in test_set["row"]])
        golds = data.get("answer", pd.Series(_NO_GOLD, index=data.index))
        given = [
            f"{NO_ANSWER}: no right answer is given" if gold is None else answer
            for gold, answer in zip(golds, predictions, strict=True)
        ]
        failed = failed_samples(test_set["index"], given)
        lost = {sample["index"] for sample in failed}
        data["answer"] = golds.fillna(_NO_GOLD)
        data["prediction"] = [
            NO_ANSWER if index in lost else answer
            for index, answer in zip(test_set["index"], given, strict=True)
        ]
        keys = group_keys(data, self.group_rows)
        if "question" in data:  # both rows of a pair of MMVP must have the same question
            others = data["question"].groupby(keys).transform("first")
            data["question"] = data["question"].fillna(others).fillna(_NO_QUESTION)
        right, metrics = self._scored(data)
        groups = keys if self.group_rows != 1 else [None] * len(data)
        return {
            "score": self._headline(metrics),
            "samples": len(data),
            "metrics": metrics,
            "failed": failed,
            "details": [
                _detail(row, answer, correct, group)
                for row, answer, correct, group in zip(
                    test_set, predictions, right, groups, strict=True
                )
            ],
        }

    def _scored(self, data: pd.DataFrame) -> tuple[list[bool | float | None], dict[str, float]]:
        """Score rows in the order of their index, and return the results in the given order."""
        ordered = data.sort_values("index")
        positions = ordered.index
        ordered = ordered.reset_index(drop=True)
        folder = Path(self.output_dir)
        # VLMEvalKit's classes would use files of an earlier evaluation.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        dataset = vlmeval_dataset(self.dataset_name, ordered, self.module, folder)
        right, metrics = score(dataset, ordered, self.group_rows, folder)
        by_position = dict(zip(positions, right, strict=True))
        return (
            [by_position[position] for position in range(len(data))],
            {str(name): float(value) * self.scale for name, value in metrics.items()},
        )

    def _headline(self, metrics: dict[str, float]) -> float:
        """Pick the number that is the score; with several splits, their mean."""
        found = [v for name, v in metrics.items() if name.rpartition("|")[2] == self.metric]
        if not found:
            raise DPAError(
                f"VLMEvalKit's numbers for {self.dataset_name} have no {self.metric!r}; "
                f"there are: {', '.join(metrics) or 'none'}."
            )
        return sum(found) / len(found)


def _detail(row: dict, answer: str | None, correct: bool | float | None, group: Any) -> dict:
    blocks = [block for message in row["prompt"] for block in message["content"]]
    images = [block["image_url"] for block in blocks if block["type"] == "image"]
    return {
        "index": row["index"],
        "question": "\n".join(block["text"] for block in blocks if block["type"] == "text"),
        "image": images[0] if images else None,
        "answer": row["answer"],
        "prediction": answer,
        "correct": correct,
        "group": None if group is None else int(group),
    }
