"""WebDataset's tar shards: files of one name are one record, such as 7.jpg with 7.txt or 7.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.places import in_tar
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_CAPTIONS = ("txt", "caption", "cap")
_MEDIA = {"mp4": "video", "avi": "video", "mkv": "video", "webm": "video", "wav": "audio",
          "mp3": "audio", "flac": "audio", "npy": "video", "npz": "video"}  # fmt: skip
_MAGIC = slice(257, 262)


def is_tar(head: bytes) -> bool:
    """Whether a file begins as a tar does."""
    return head[_MAGIC] == b"ustar"


def shards(files: tuple[Path, ...]) -> Source:
    """Open shards; a picture is known by its place in the tar."""

    def items() -> Iterator[Any]:
        for path in files:
            yield from _items(path)

    return Source("WebDataset tar", files, items)


def _items(path: Path) -> Iterator[Any]:
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as content:
            for key, members in groupby(_files(tar), key=_key):
                yield _item(path, key, list(members), content)
    except tarfile.TarError as error:
        raise DPAError(f"data file {path} is a broken tar: {error}. Write it again.") from error


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if member.isreg() and not Path(member.name).name.startswith("."):
            yield member
        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all it has seen


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _item(path: Path, key: str, members: list[tarfile.TarInfo], content: Any) -> Any:
    item: Any = {}
    caption, pictures, media = None, [], {}
    for member in members:
        kind = member.name.rpartition(".")[2].lower()
        if kind in _PICTURES:
            pictures.append((member.name, in_tar(path, member.offset_data, member.size)))
        elif kind in _CAPTIONS or kind == "json":
            content.seek(member.offset_data)
            try:
                text = content.read(member.size).decode("utf-8-sig")
                if kind == "json":
                    item = json.loads(text)
                else:
                    caption = text
            except ValueError as error:
                return Problem(key, f"broken {kind}: {member.name} ({error})")
        elif kind in _MEDIA:
            media[_MEDIA[kind]] = member.name
    if isinstance(item, list):
        item = {"messages": item}
    if not isinstance(item, dict):
        return Problem(key, f"not a record: the JSON of {key} holds {type(item).__name__}")
    images = [place for _, place in sorted(pictures)]
    if caption is not None:
        item = {"caption": caption} if _only_about(item) else item
    item = {name: value for name, value in item.items() if not (images and name in _NAMES)}
    if images:
        item["image"] = images
    return {"id": key, **item, **media}


_NAMES = ("image", "images")  # of pictures outside the tar, which those in it replace
_TALKS = ("conversations", "messages", "texts", "query", "response")


def _only_about(item: dict[str, Any]) -> bool:
    """Whether the JSON tells of the picture (its size, its address), and not of a conversation."""
    return not any(name in item for name in _TALKS)
