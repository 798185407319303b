"""Folders: Hugging Face data sets as ``save_to_disk`` or a hub has them, and tar shards."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dpa_xtuner.data.formats import rows, tars
from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json

_OTHER_SPLIT = re.compile(
    r"(mini)?(validation|valid|val|dev|test|eval|evaluation)(mini|dev|std)?([-_.]|$)"
)
_TRAIN = re.compile(r"train([-_.]|$)")


def open_folder(path: Path) -> Source:
    """Open a folder; of several splits, the one that is called train.

    Raises:
        DPAError: nothing in it is read, or no split is the one to train on.
    """
    if (path / "dataset_dict.json").is_file():
        return open_folder(_train_of(path))
    if (path / "state.json").is_file():
        named = read_json(path / "state.json", "Save the data set again.").get("_data_files", [])
        return rows.arrow(tuple(path / each["filename"] for each in named))
    kinds = {".parquet": rows.parquet, ".tar": tars.shards, ".arrow": rows.arrow}
    files = sorted(_files(path))
    found = {kind: [file for file in files if file.suffix == kind] for kind in kinds}
    there = [kind for kind in kinds if found[kind]]
    if len(there) > 1:
        raise DPAError(
            f"data folder {path} holds files of several kinds ({', '.join(there)}); name the files "
            "or the folder of one kind."
        )
    for kind in there:
        return kinds[kind](_to_train_on(path, found[kind]))
    holds = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
    raise DPAError(
        f"data folder {path} holds no data set: expected save_to_disk's state.json, or Parquet, "
        f"Arrow or tar files; it holds {holds}. For JSON or a table, name the file."
    )


def _files(path: Path) -> Iterator[Path]:
    """List the files below a folder, linked folders too, without hidden and cached ones."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        # datasets keeps what a map has made in cache-*.arrow.
        yield from (Path(folder, name) for name in names if not name.startswith((".", "cache-")))


def _train_of(path: Path) -> Path:
    splits = read_json(path / "dataset_dict.json", "Save the data set again.").get("splits", [])
    if len(splits) == 1:
        return path / splits[0]
    if "train" in splits:
        return path / "train"
    raise DPAError(
        f"data folder {path} has the splits {', '.join(splits)}, and none is called train; name "
        f"the folder of one, such as {path / splits[0] if splits else path}."
    )


def _to_train_on(path: Path, files: list[Path]) -> tuple[Path, ...]:
    """Return the files without those of splits to measure on."""

    def is_of(split: re.Pattern, file: Path) -> bool:
        return any(split.match(part) for part in file.relative_to(path).parts)

    train = [file for file in files if is_of(_TRAIN, file)]
    others = [file for file in files if is_of(_OTHER_SPLIT, file)]
    if train:
        return tuple(train)
    if len(others) == len(files):
        raise DPAError(
            f"data folder {path} holds only splits to measure on ({files[0].name}, ...); name a "
            "file to train on it all the same."
        )
    return tuple(file for file in files if file not in others)
