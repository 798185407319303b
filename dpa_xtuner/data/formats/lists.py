"""Files that name other data files: LLaVA-NeXT's YAML and InternVL's meta.json."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml as yaml_package

from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.places import joined
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Record
from dpa_xtuner.errors import DPAError

Find = Callable[[Path], Source]
Read = Callable[[Source], Iterator[Any]]

_SAMPLING = re.compile(r"(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)")
_YAML_HEAD = re.compile(r"^(datasets\s*:|-\s*json_path\s*:)", re.MULTILINE)
_SAYS_HOW_OFTEN = re.compile("ratio|weight|sampl|repeat|epoch|fraction|prob", re.IGNORECASE)


@dataclass(frozen=True)
class _File:
    """A data file that a list names.

    Attributes:
        path: the file.
        root: folder of its pictures, relative to the image folder; "" for that itself.
        keep: gives of the number of its records the places of those that are taken, in order, and
            None for all.
        times: how often they are seen.
    """

    path: Path
    root: str
    keep: Callable[[int], np.ndarray] | None
    times: int = 1


def is_yaml(text: str) -> bool:
    """Whether a text is LLaVA-NeXT's list of data sets."""
    return _YAML_HEAD.search(text) is not None


def yaml(path: Path, text: str, find: Find, read: Read) -> Source:
    """Open LLaVA-NeXT's list: "datasets" of "json_path" and "sampling_strategy".

    Raises:
        DPAError: it is broken, or names what is not there.
    """
    try:
        found = yaml_package.safe_load(text)
    except yaml_package.YAMLError as error:
        raise DPAError(f"data file {path} is no YAML: {' '.join(str(error).split())}") from None
    entries = found.get("datasets") if isinstance(found, dict) else found
    if not isinstance(entries, list) or not entries:
        raise DPAError(f"data file {path}: 'datasets' names no file.")
    files = [_of_yaml(path, each) for each in entries]
    return _source("LLaVA-NeXT list", path, files, find, read)


def is_meta(found: Any) -> bool:
    """Whether a JSON object is InternVL's list of data sets."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(each, dict) and "annotation" in each for each in found.values())
    )


def meta(path: Path, found: dict[str, Any], find: Find, read: Read) -> Source:
    """Open InternVL's list: name -> "annotation", "root" and "repeat_time".

    Raises:
        DPAError: it is no such list, or names what is not there.
    """
    if not is_meta(found):
        keys = ", ".join(map(repr, list(found)[:8])) or "none"
        raise DPAError(
            f"data file {path} is one JSON object with the keys {keys}; expected an array of "
            "records, a record on each line, or InternVL's meta.json, whose values have "
            "'annotation' and 'root'."
        )
    files = [_of_meta(path, name, each) for name, each in found.items()]
    return _source("InternVL meta", path, files, find, read)


def _of_yaml(path: Path, entry: Any) -> _File:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("json_path"), str):
        raise DPAError(f"data file {path}: expected 'json_path' in {entry!r}.")
    _refuse_other_sampling(path, entry, entry["json_path"], "sampling_strategy")
    asked = str(entry.get("sampling_strategy") or "all").strip()
    keep = None
    if asked != "all":
        match = _SAMPLING.fullmatch(asked)
        if match is None:
            raise DPAError(
                f"data file {path}: sampling_strategy {asked!r} of {entry['json_path']} is "
                "unknown; known: all, first:N, end:N, random:N, each also with N%."
            )
        keep = _sampled(*match.groups())
    root = _root(path, entry.get("data_root") or entry.get("images_folder"))
    return _File(_found(path, entry["json_path"]), root, keep)


def _sampled(which: str, number: str | None, percent: str) -> Callable[[int], np.ndarray]:
    def keep(records: int) -> np.ndarray:
        asked = int(number) if number else math.ceil(float(percent) * records / 100)
        asked = min(asked, records)
        if which == "first":
            return np.arange(asked)
        if which == "end":
            return np.arange(records - asked, records)
        return np.sort(np.random.default_rng(0).permutation(records)[:asked])

    return keep


def _of_meta(path: Path, name: str, entry: dict[str, Any]) -> _File:
    _refuse_other_sampling(path, entry, name, "repeat_time")
    times = entry.get("repeat_time", 1)
    number = isinstance(times, (int, float)) and not isinstance(times, bool) and times > 0
    if not number or (times > 1 and not float(times).is_integer()):
        raise DPAError(
            f"data file {path}: repeat_time of {name!r} is {times!r}, expected a whole number or a "
            "fraction below 1."
        )
    if not isinstance(entry["annotation"], str):
        raise DPAError(f"data file {path}: 'annotation' of {name!r} is no path.")
    root = _root(path, entry.get("root") or entry.get("media_root"))
    keep = None if times >= 1 else lambda records: np.arange(int(records * times))
    return _File(_found(path, entry["annotation"]), root, keep, max(1, int(times)))


def _root(path: Path, named: Any) -> str:
    root = str(named or "")
    if "://" in root:
        raise DPAError(
            f"data file {path} names pictures in {root}, which is no folder of this machine; "
            "download them, and name their folder."
        )
    return root


def _refuse_other_sampling(path: Path, entry: Mapping[str, Any], name: str, known: str) -> None:
    for key, value in entry.items():
        if key != known and value not in (None, 1) and _SAYS_HOW_OFTEN.search(str(key)):
            raise DPAError(f"data file {path}: {key} of {name!r} is not read; use {known}.")


def _found(path: Path, named: str) -> Path:
    """Return a named file: as it is written, or relative to the list."""
    for place in (path.parent / named, Path(named)):
        if place.exists():
            return place
    raise DPAError(f"data file {path} names {named}, which does not exist here or beside it.")


def _source(name: str, path: Path, files: list[_File], find: Find, read: Read) -> Source:
    sources = [find(file.path) for file in files]

    def items() -> Iterator[Record | Problem]:
        for file, source in zip(files, sources, strict=True):
            for _ in range(file.times):
                yield from _records(file, functools.partial(read, source))

    return Source(name, (path, *(each for source in sources for each in source.files)), items)


def _records(file: _File, read: Callable[[], Iterator[Any]]) -> Iterator[Record | Problem]:
    kept = None
    if file.keep is not None:
        kept = set(file.keep(sum(1 for _ in read())).tolist())
    for number, found in enumerate(read()):
        if kept is not None and number not in kept:
            continue
        if isinstance(found, Problem):
            where = (found.file, found.number) if found.file else (str(file.path), number)
            yield replace(found, file=where[0], number=where[1])
        else:
            yield replace(found, images=tuple(joined(file.root, name) for name in found.images))
