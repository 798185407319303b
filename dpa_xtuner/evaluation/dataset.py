"""VLMEvalKit's data sets for OpenCompass: whole groups under a limit, and no row lost."""

from __future__ import annotations

import ast
import base64
import importlib
import os
import string
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import vlmeval.dataset as known
from datasets import Dataset
from opencompass.datasets.vlmevalkit.dataset import VLMEvalKitDataset
from opencompass.registry import LOAD_DATASET
from vlmeval.dataset import image_vqa
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.image_mcq import ImageMCQDataset, NaturalBenchDataset
from vlmeval.dataset.utils.naturalbench import extract_answer, get_scores
from vlmeval.smp import LMUDataRoot, dump, load

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import CIRCULAR, NO_ANSWER

_ASKED = ("question", "hint", "prompt", *string.ascii_uppercase)  # columns that make a prompt
_TEXTS = ("question", "prompt", "answer")  # that are text also where each one looks like a number
_NO_PICTURE = "no picture in the data file".ljust(80, ".")  # VLMEvalKit takes <= 64 for an index
_NO_QUESTION = "no question in the data file"
NO_GOLD = "['no answer in the data file']"
"""Stands for a row's missing right answer: any benchmark's scoring takes it, and nothing that a
model says is equal to it."""

compat.vlmeval_scoring()
compat.vlmeval_literals()


@LOAD_DATASET.register_module()
class EvaluationDataset(VLMEvalKitDataset):
    """A data set of VLMEvalKit, with its prompts.

    The rows come longest prompt first, which shows trouble with memory early and makes batches of
    alike lengths; the order is the same each time. Each row of the file is there: one whose
    picture or question is missing has a prompt with the empty path or text, one whose picture is
    broken has a path to what is broken, so that the model fails on that one sample. One without a
    right answer has `NO_GOLD`.
    """

    @staticmethod
    def load(
        dataset_name: str,
        data_root: str,
        limit: int | None = None,
        group: int | str = 1,
        module: str | None = None,
        test_range: str | None = None,
    ) -> Dataset:
        """Read ``<data_root>/<dataset_name>.tsv``.

        Args:
            dataset_name: VLMEvalKit's name.
            data_root: Folder with the file; its pictures are unpacked to ``images`` there.
            limit: Questions at most, evenly spread over the file; what belongs together (a
                question of MMBench in its rotations, a pair of MMVP, a group of NaturalBench)
                counts as one. All where it is None.
            group: See `Benchmark`.
            module: See `Benchmark`.
            test_range: A slice of the rows, such as "[0:100]", from OpenCompass's partitioners.

        Returns:
            A row for each sample, with the columns that OpenCompass's bridge makes.

        Raises:
            DPAError: There is no such file, it has no rows, a row without index or an incomplete
                group, or the limit is below 1.
        """
        known_to_vlmevalkit(dataset_name, module)
        return VLMEvalKitDataset.load(
            dataset_name,
            data_root,
            dataset_kwargs=dict(limit=limit, group=group),
            test_range=test_range,
        )


class _WholeFile:
    """Before one of VLMEvalKit's classes in the order of bases: reads the file and no other.

    Answers, where they are given by index, are scored as they are: OpenCompass hands them over in a
    spreadsheet, which makes 3.0 of the answers "3" beside a missing one, 7 of "007", a formula of
    "= 4" and nothing of "None".

    VLMEvalKit drops rows without picture, fails on rows that refer to a dropped one or have no
    question or answer, and where the md5 is not the one it knows, fetches the file and writes over
    the one that is there.
    """

    def __init__(
        self,
        dataset: str,
        limit: int | None = None,
        group: int | str = 1,
        answers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(dataset)  # type: ignore[call-arg]
        self.group, self.answers = group, answers
        self.data = _chosen(self.data, dataset, limit, group)
        self.unasked: set = set()
        if "question" in self.data:
            self.unasked = set(self.data["index"][self.data["question"].isna()])
            self.data["question"] = _for_scoring(self.data, group)

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Read ``<LMUData>/<dataset>.tsv``, with marks for missing pictures and right answers."""
        path = Path(LMUDataRoot(), f"{dataset}.tsv")
        if not path.is_file():
            raise DPAError(f"{path} is not there; see tools/get_benchmarks.py.")
        self.data_path = str(path)
        try:
            # Converted, "None" and "NA" are texts as well.
            data = pd.read_csv(path, sep="\t", converters=dict.fromkeys(_TEXTS, str))
        except pd.errors.EmptyDataError:
            data = pd.DataFrame()
        if data.empty:
            raise DPAError(f"{path} has no rows. Get the file again.")
        if "index" in data and data["index"].isna().any():
            row = int(data["index"].isna().to_numpy().argmax()) + 1
            raise DPAError(
                f"{path}: row {row} of {len(data)} has no index. Give it a number that no other "
                f"row has, or get the file again."
            )
        for column in data.columns.intersection(_TEXTS):
            data[column] = data[column].where(data[column].str.strip() != "")
        if "answer" in data:
            if data["answer"].isna().all():
                raise DPAError(f"{path} has no right answers: nothing can be scored.")
            data["answer"] = data["answer"].fillna(NO_GOLD)
        if "image" in data:
            data["image"] = _resolved(data)
            data = data.drop(columns="image_path", errors="ignore")  # of no use, and may be empty
        return data

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> Any:
        """Score as the data set's class does."""
        return super().evaluate(self.exact(eval_file), **judge_kwargs)  # type: ignore[misc]

    def exact(self, eval_file: str) -> str:
        """A file beside a spreadsheet of answers, with these as they were given."""
        if self.answers is None:
            return eval_file
        data = self.data.drop(columns="image", errors="ignore")
        data["prediction"] = data["index"].map(lambda index: self.answers[str(index)])
        file = str(answers_file(eval_file))
        dump(data, file)
        return file

    def build_prompt(self, line: pd.Series) -> list[dict]:
        """VLMEvalKit's prompt, with the empty text where there is no question."""
        prompt = super().build_prompt(line)  # type: ignore[misc]
        for part in prompt:
            if part.get("type") == "text":
                missing = line["index"] in self.unasked or not isinstance(part["value"], str)
                part["value"] = "" if missing else part["value"]
        return prompt

    def dump_image(self, line: Any) -> list[str]:
        """Write a row's pictures as they are in the file, not decoded and encoded again."""
        if "image" not in line:
            return super().dump_image(line)  # type: ignore[misc]
        pictures = line["image"] if isinstance(line["image"], list) else [line["image"]]
        numbers = [f"_{n}" for n in range(len(pictures))] if len(pictures) > 1 else [""]
        return [
            self._unpack(picture, f"{line['index']}{number}")
            for picture, number in zip(pictures, numbers, strict=True)
        ]

    def _unpack(self, picture: str, name: str) -> str:
        if picture == _NO_PICTURE:
            return ""
        ending = ".jpg" if picture.startswith("/9j/") else ".png"
        path = Path(self.img_root, f"{quote(name, safe='')}{ending}")  # an index may hold "../"
        if not path.exists():
            try:
                content = base64.b64decode(picture)
            except ValueError:
                content = picture.encode()  # no picture either: the model says so
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            os.replace(partial, path)
        return str(path)


def answers_file(eval_file: str | Path) -> Path:
    """Where the answers of a spreadsheet are kept as they were given: a pickle of a DataFrame."""
    return Path(eval_file).with_suffix(".pkl")


class _Groups(_WholeFile, NaturalBenchDataset):
    """NaturalBench of any number of groups: VLMEvalKit's class takes 1,900 and no others."""

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        return naturalbench_scores(load(self.exact(eval_file)))


def naturalbench_scores(data: pd.DataFrame) -> dict[str, float]:
    """VLMEvalKit's shares (0 - 1) of answers, questions, pictures and groups that are right.

    Args:
        data: Any number of groups of four lines, with ``index``, ``type`` and ``prediction``.
    """
    data = data.sort_values(by="index")
    read = [
        extract_answer(str(said), kind)
        for said, kind in zip(data["prediction"], data["type"], strict=True)
    ]
    return get_scores([read[i : i + 4] for i in range(0, len(read), 4)])


class _Shares(_WholeFile, image_vqa.OCRBench):
    """OCRBench of any number of questions: VLMEvalKit's norm is that of 1,000.

    A sample without an answer is wrong, although nothing is a part of it, and may be a gold answer.
    """

    def exact(self, eval_file: str) -> str:
        file = super().exact(eval_file)
        if self.answers is not None:
            data = load(file)
            data.loc[data["prediction"] == NO_ANSWER, "answer"] = "['none is right']"
            dump(data, file)
        return file

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        counts = super().evaluate(eval_file, **judge_kwargs)
        share = counts["Final Score"] / len(load(eval_file))
        return {**counts, "Final Score Norm": 100 * share}


def known_to_vlmevalkit(dataset_name: str, module: str | None = None) -> None:
    """Have VLMEvalKit's ``build_dataset`` build a data set of this name as we need it.

    Args:
        dataset_name: A name that VLMEvalKit knows, or that ``module`` makes known; any other is
            taken for multiple choice, as VLMEvalKit does.
        module: Imported first.
    """
    if module:
        importlib.import_module(module)
    classes = (c for c in known.DATASET_CLASSES if dataset_name in c.supported_datasets())
    base = next(classes, ImageMCQDataset)
    if issubclass(base, _WholeFile):
        return
    if not issubclass(base, ImageBaseDataset):
        raise DPAError(f"{dataset_name!r} is no data set of single pictures.")
    ours = {NaturalBenchDataset: _Groups, image_vqa.OCRBench: _Shares}.get(base)
    supported = {"supported_datasets": classmethod(lambda cls: [dataset_name])}
    bases = (ours,) if ours else (_WholeFile, base)
    known.DATASET_CLASSES.insert(0, type(f"{base.__name__}WholeFile", bases, supported))


def group_keys(data: pd.DataFrame, group: int | str) -> pd.Series:
    """Say which rows belong together: a number for each, that of its group in file order."""
    if group == CIRCULAR:
        if "g_index" in data:
            return data["g_index"].astype(int)
        return (data["index"] % 10**6).astype(int)
    order = data["index"].rank(method="first").astype(int) - 1
    return order // int(group)


def _chosen(data: pd.DataFrame, dataset: str, limit: int | None, group: int | str) -> pd.DataFrame:
    """Whole groups, evenly spread, as many as asked for; longest first."""
    if limit is not None and limit < 1:
        raise DPAError(f"limit={limit}; expected 1 or more, or None for all questions.")
    keys = group_keys(data, group)
    sizes = keys.value_counts()
    if group == CIRCULAR:
        incomplete = sorted(set(keys) - set(data["index"]))
    else:
        incomplete = sorted(sizes.index[sizes != group])
    if incomplete:
        raise DPAError(
            f"{dataset}.tsv: {len(incomplete)} of {len(sizes)} groups of rows are incomplete, the "
            f"first that of {incomplete[0]}. Get the file again."
        )
    if limit is not None:
        names = list(dict.fromkeys(keys))
        count = min(limit, len(names))
        keep = {names[i * len(names) // count] for i in range(count)}
        data = data[keys.isin(keep)]
    asked = data[[column for column in _ASKED if column in data]].fillna("").astype(str)
    length = asked.map(len).sum(axis=1)
    if "image" in data:  # several pictures weigh more than any text
        length += 10**6 * data["image"].map(lambda p: len(p) if isinstance(p, list) else 1)
    return data.loc[length.sort_values(ascending=False, kind="stable").index]


def _for_scoring(data: pd.DataFrame, group: int | str) -> pd.Series:
    """The questions, without gaps: those of MMVP must be the same within a pair."""
    others = data.groupby(group_keys(data, group))["question"].transform("first")
    return data["question"].fillna(others).fillna(_NO_QUESTION)


def _resolved(data: pd.DataFrame) -> list[str]:
    """Pictures in place of references to another row's, and a mark where there is none.

    Several pictures of a row are a list, which VLMEvalKit reads again.
    """
    pictures = dict(zip(data["index"].map(str), data["image"], strict=True))
    resolved = []
    for picture in data["image"]:
        if len(str(picture)) <= 64:
            picture = pictures.get(str(picture))
        text = str(picture)
        resolved.append(str(_listed(text)) if text.startswith("[") else _picture(text))
    return resolved


def _listed(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    return [_picture(str(p)) for p in found or [""]] if isinstance(found, list) else [_NO_PICTURE]


def _picture(text: str) -> str:
    return text if len(text) > 64 else _NO_PICTURE
