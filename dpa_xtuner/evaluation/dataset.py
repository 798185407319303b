"""VLMEvalKit's data sets for OpenCompass: whole groups under a limit, and no row lost."""

from __future__ import annotations

import base64
import binascii
import importlib
import os
import string
from pathlib import Path
from typing import Any

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
_NO_PICTURE = "no picture in the data file".ljust(80, ".")  # VLMEvalKit takes <= 64 for an index


compat.vlmeval_scoring()


@LOAD_DATASET.register_module()
class EvaluationDataset(VLMEvalKitDataset):
    """A data set of VLMEvalKit, with its prompts.

    The rows come longest prompt first, which shows trouble with memory early and makes batches of
    alike lengths; the order is the same each time. Each row of the file is there: one whose
    picture is missing has a prompt with the empty path, one whose picture is broken has a path to
    what is broken, so that the model fails on that one sample.
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
            DPAError: There is no such file, a group in it is incomplete, or the limit is below 1.
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

    VLMEvalKit drops rows without picture, fails on rows that refer to a dropped one, and where the
    md5 is not the one it knows, fetches the file and writes over the one that is there.
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

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Read ``<LMUData>/<dataset>.tsv``, each row with pictures or a mark for none."""
        path = Path(LMUDataRoot(), f"{dataset}.tsv")
        if not path.is_file():
            raise DPAError(f"{path} is not there; see tools/get_benchmarks.py.")
        self.data_path = str(path)
        data = load(str(path))
        if "image" in data:
            data["image"] = _resolved(data)
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
        path = Path(self.img_root, name + (".jpg" if picture.startswith("/9j/") else ".png"))
        if not path.exists():
            try:
                content = base64.b64decode(picture)
            except binascii.Error:
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


def _resolved(data: pd.DataFrame) -> list[str]:
    """Pictures in place of references to another row's, and a mark where there is none."""
    pictures = dict(zip(data["index"].map(str), data["image"], strict=True))
    resolved = []
    for picture in data["image"]:
        if len(str(picture)) <= 64:
            picture = pictures.get(str(picture))
        resolved.append(str(picture) if len(str(picture)) > 64 else _NO_PICTURE)
    return resolved
