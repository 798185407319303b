"""VLMEvalKit's data sets for OpenCompass: whole groups under a limit, and no row lost."""

import ast
import base64
import importlib
import json
import os
import string
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import pandas as pd
import vlmeval.dataset as known
from datasets import Dataset
from opencompass.datasets.base import BaseDataset
from opencompass.datasets.vlmevalkit.image import convert_vlmeval_prompt
from opencompass.registry import LOAD_DATASET
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.image_mcq import ImageMCQDataset

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import CIRCULAR

_ASKED = ("question", "hint", "prompt", *string.ascii_uppercase)  # columns that make a prompt
_TEXTS = ("question", "prompt", "answer")  # text, even if every value looks like a number
_LONGEST_REFERENCE = 64  # characters; a longer text is a picture, as in VLMEvalKit

compat.vlmeval_literals()


@LOAD_DATASET.register_module()
class EvaluationDataset(BaseDataset):
    """A data set of VLMEvalKit, with its prompts.

    The rows are sorted by length, the longest prompt first, always in the same order: memory
    problems show early, and a batch has prompts of similar lengths. No row of the file is lost. A
    row without picture or question has an empty path or text in its prompt, and one with a broken
    picture the path of that file, so that the model fails on that sample alone. A row without a
    right answer has None.
    """

    @staticmethod
    def load(
        dataset_name: str,
        data_root: str,
        images: str,
        limit: int | None = None,
        group: int | str = 1,
        module: str | None = None,
    ) -> Dataset:
        """Read ``<data_root>/<dataset_name>.tsv``.

        Args:
            dataset_name: VLMEvalKit's name.
            data_root: folder of the file.
            images: folder to unpack its pictures to. Existing pictures are not written again.
            limit: the number of questions to ask, evenly spread over the file. Rows that belong
                together (MMBench's rotations of a question, a pair of MMVP, a group of
                NaturalBench) count as one question. None for all.
            group: see ``Benchmark``.
            module: see ``Benchmark``.

        Returns:
            A row for each sample: ``index``, ``prompt`` (messages), ``answer``, and ``row``, the
            file's row without pictures, as JSON.

        Raises:
            DPAError: there is no such file, it has no rows, an index is missing or occurs twice, a
                group is incomplete, or the limit is below 1.
        """
        data = read_rows(Path(data_root, f"{dataset_name}.tsv"), limit, group)
        if "image" in data:
            data["image_path"] = _unpack(data, Path(images))
            data = data.drop(columns="image")
        dataset = vlmeval_dataset(dataset_name, data, module, data_root)
        return Dataset.from_list(
            [
                {
                    "index": line["index"],
                    "prompt": _prompt(dataset, line),
                    "answer": line.get("answer"),
                    "row": json.dumps(line.drop("image_path", errors="ignore").to_dict()),
                }
                for _, line in data.iterrows()
            ]
        )


def vlmeval_dataset(name: str, data: pd.DataFrame, module: str | None, root: str | Path) -> Any:
    """Make VLMEvalKit's data set from given rows; it reads and fetches no file.

    Args:
        name: a name that VLMEvalKit knows, or that ``module`` registers. Any other means multiple
            choice, as in VLMEvalKit.
        data: its rows, without pictures.
        module: imported first.
        root: an existing folder that VLMEvalKit may write to; else it makes one in the home.
    """
    if module:
        importlib.import_module(module)
    classes = (c for c in known.DATASET_CLASSES if name in c.supported_datasets())
    kind = next(classes, ImageMCQDataset)
    if not issubclass(kind, ImageBaseDataset):
        raise DPAError(f"{name!r} is not a data set of pictures.")
    dataset = kind.__new__(kind)
    dataset.load_data = lambda _: data.drop(columns="image_path", errors="ignore")
    with patch.dict(os.environ, LMUData=str(root)):
        dataset.__init__(dataset=name)
    dataset.data = data
    return dataset


def read_rows(file: Path, limit: int | None = None, group: int | str = 1) -> pd.DataFrame:
    """Read a data file of VLMEvalKit; see ``EvaluationDataset.load``.

    Returns:
        The chosen rows in the order of the questions. ``image`` holds lists of base64 texts, an
        empty text for a missing picture.
    """
    if not file.is_file():
        raise DPAError(f"{file} is not there; see tools/get_benchmarks.py.")
    try:
        # Without converters, pandas would read "None" and "NA" as missing.
        data = pd.read_csv(file, sep="\t", converters=dict.fromkeys(_TEXTS, str))
    except pd.errors.EmptyDataError:
        data = pd.DataFrame()
    if data.empty:
        raise DPAError(f"{file} has no rows. Get the file again.")
    if "index" not in data:
        data["index"] = None
    wrong = data["index"].isna() | data["index"].map(str).duplicated()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        problem = "no index" if pd.isna(data["index"][row]) else "the index of another row"
        raise DPAError(
            f"{file}: row {row + 1} of {len(data)} has {problem}. Give it a number that no other "
            f"row has, or get the file again."
        )
    for column in data.columns.intersection(_TEXTS):
        data[column] = data[column].where(data[column].str.strip() != "", None)
    if "answer" in data and data["answer"].isna().all():
        raise DPAError(f"{file} has no right answers: nothing can be scored.")
    if "image" in data:
        pictures = dict(zip(data["index"].map(str), data["image"].map(str), strict=True))
        data["image"] = [_pictures(picture, pictures) for picture in pictures.values()]
    return _chosen(data, file, limit, group)


def group_keys(data: pd.DataFrame, group: int | str) -> pd.Series:
    """Say which rows belong together: the number of its group for each row, in file order."""
    if group == CIRCULAR:
        if "g_index" in data:
            return data["g_index"].astype(int)
        return (data["index"] % 10**6).astype(int)
    order = data["index"].rank(method="first").astype(int) - 1
    return order // int(group)


def _chosen(data: pd.DataFrame, file: Path, limit: int | None, group: int | str) -> pd.DataFrame:
    """Choose whole groups, evenly spread, and sort the rows by length, the longest first."""
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
            f"{file.name}: {len(incomplete)} of {len(sizes)} groups of rows are incomplete, the "
            f"first that of {incomplete[0]}. Get the file again."
        )
    if limit is not None:
        names = list(dict.fromkeys(keys))
        count = min(limit, len(names))
        data = data[keys.isin([names[i * len(names) // count] for i in range(count)])]
    texts = data[data.columns.intersection(_ASKED)].fillna("").astype(str)
    length = texts.map(len).sum(axis=1)
    if "image" in data:  # several pictures weigh more than any text
        length += 10**6 * data["image"].map(len)
    return data.loc[length.sort_values(ascending=False, kind="stable").index]


def _pictures(cell: str, others: dict[str, str]) -> list[str]:
    """Read a cell: a picture, a list of pictures, or the index of a row that has one."""
    if len(cell) <= _LONGEST_REFERENCE:
        cell = others.get(cell, "")
    found: Any = [cell]
    if cell.startswith("["):
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = [""]
    return [p if len(p) > _LONGEST_REFERENCE else "" for p in map(str, found)] or [""]


def _unpack(data: pd.DataFrame, folder: Path) -> list[list[str]]:
    """Write the pictures of the file unchanged, and return their paths, row by row."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, pictures in zip(data["index"], data["image"], strict=True):
        numbers = [f"_{n}" for n in range(len(pictures))] if len(pictures) > 1 else [""]
        stems = [quote(f"{index}{number}", safe="") for number in numbers]  # an index may be "../"
        paths.append([_write(*pair, folder) for pair in zip(pictures, stems, strict=True)])
    return paths


def _write(picture: str, stem: str, folder: Path) -> str:
    if not picture:
        return ""
    path = folder / f"{stem}{'.jpg' if picture.startswith('/9j/') else '.png'}"
    if not path.exists():
        try:
            content = base64.b64decode(picture)
        except ValueError:
            content = picture.encode()  # not a picture: the model reports that
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        partial.write_bytes(content)
        os.replace(partial, path)
    return str(path)


def _prompt(dataset: Any, line: pd.Series) -> list[dict]:
    """Build VLMEvalKit's prompt as messages; a missing text becomes an empty one."""
    unasked = pd.isna(line.get("question", ""))
    parts = dataset.build_prompt(line.fillna({"question": ""}) if unasked else line)
    for part in parts:
        if part["type"] == "text" and (unasked or not isinstance(part["value"], str)):
            part["value"] = ""
    return convert_vlmeval_prompt(parts)
