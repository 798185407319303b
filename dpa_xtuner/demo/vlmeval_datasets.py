"""The demo's benchmarks for VLMEvalKit; importing this module registers their names.

VLMEvalKit treats a file with an unknown name as multiple choice, and could not score the others.
The classes build the prompts of their base classes and score by VLMEvalKit's functions. This module
is separate from ``dpa_xtuner.demo.benchmarks`` because importing VLMEvalKit takes seconds.
"""

from typing import Any, ClassVar

import pandas as pd
import vlmeval.dataset as known
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.image_mcq import ImageMCQDataset, NaturalBenchDataset
from vlmeval.dataset.image_vqa import ImageVQADataset
from vlmeval.dataset.utils.multiple_choice import report_acc_MMVP
from vlmeval.dataset.utils.vqa_eval import process_answer
from vlmeval.smp import d2df, dump, get_intermediate_file_path, load

from dpa_xtuner.evaluation.scoring import naturalbench_scores


class OpenMojiChoice(ImageMCQDataset):
    """Multiple choice, as MMBench without circles."""

    DATASET_URL: ClassVar[dict[str, str]] = {"OpenMojiChoice": ""}


class OpenMojiPairs(ImageMCQDataset):
    """Pairs of lines, like MMVP: "Overall" counts pairs with two right answers."""

    DATASET_URL: ClassVar[dict[str, str]] = {"OpenMojiPairs": ""}

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> pd.DataFrame:
        """Score each line as multiple choice, then the pairs as for the name "MMVP"."""
        super().evaluate(eval_file, **judge_kwargs)
        record = get_intermediate_file_path(
            eval_file, f"_{judge_kwargs.get('model', 'exact_matching')}_result"
        )
        scores = report_acc_MMVP(load(record))
        dump(scores, get_intermediate_file_path(eval_file, "_acc", "csv"))
        return scores


class OpenMojiGroups(NaturalBenchDataset):
    """Groups of four lines, like NaturalBench, whose own class accepts only 1,900 groups."""

    DATASET_URL: ClassVar[dict[str, str]] = {"OpenMojiGroups": ""}

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Score as NaturalBench: fractions of answers, questions, pictures and groups."""
        scores = naturalbench_scores(load(eval_file))
        table = pd.DataFrame(list(scores.items()), columns=["Metric", "Score"])
        dump(table, get_intermediate_file_path(eval_file, "_acc", "csv"))
        return scores


class OpenMojiShort(ImageVQADataset):
    """Short answers and counts.

    The prompts are those of training, without VLMEvalKit's request for a single word. Two answers
    are equal if they are after VLMEvalKit's normalisation (articles, punctuation, number words);
    its default for VQA data needs ten answers by ten people.
    """

    DATASET_URL: ClassVar[dict[str, str]] = {"OpenMojiShort": "", "OpenMojiCount": ""}
    build_prompt = ImageBaseDataset.build_prompt

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> pd.DataFrame:
        """Score the percentage of right answers, over all and by category."""
        data = load(eval_file)
        data["eval_score"] = [
            float(process_answer(str(given)) == process_answer(str(answer)))
            for given, answer in zip(data["prediction"], data["answer"], strict=True)
        ]
        dump(data, get_intermediate_file_path(eval_file, "_results"))
        by_category = data.groupby("category")["eval_score"].mean() * 100
        scores = d2df({"Overall": data["eval_score"].mean() * 100, **by_category})
        dump(scores, get_intermediate_file_path(eval_file, "_acc"))
        return scores


for _class in (OpenMojiChoice, OpenMojiPairs, OpenMojiGroups, OpenMojiShort):
    known.DATASET_CLASSES.append(_class)
    known.SUPPORTED_DATASETS.extend(_class.supported_datasets())
