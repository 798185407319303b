"""WebDataset's tar shards: files of one name are one record, such as 7.jpg with 7.txt or 7.json."""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from dpa_xtuner.data.formats import captions
from dpa_xtuner.data.formats.json_text import decode
from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.places import in_tar
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_CAPTIONS = ("txt", "caption", "cap")
_MEDIA = {"mp4": "video", "avi": "video", "mkv": "video", "webm": "video", "wav": "audio",
          "mp3": "audio", "flac": "audio", "npy": "video", "npz": "video"}  # fmt: skip
_TALKS = frozenset(("conversations", "messages", "texts", "query", "response"))
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
        name = Path(member.name).name
        if member.isreg() and "." in name and not name.startswith("."):
            yield member
        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all it has seen


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _item(path: Path, key: str, members: list[tarfile.TarInfo], content: BinaryIO) -> Any:
    pictures, texts, media = {}, {}, {}
    for member in members:
        kind = Path(member.name).name.partition(".")[2].lower()
        last = kind.rpartition(".")[2]
        if last in _PICTURES:
            pictures[member.name] = in_tar(path, member.offset_data, member.size)
        elif kind == "json" or kind in _CAPTIONS:
            kind = "json" if kind == "json" else "caption"
            if kind in texts:
                return Problem(key, f"several texts: of the kind {kind}")
            content.seek(member.offset_data)
            try:
                text = content.read(member.size).decode("utf-8-sig")
                texts[kind] = decode(text) if kind == "json" else text
            except (ValueError, RecursionError) as error:
                return Problem(key, f"broken {last}: {member.name} ({error})")
        elif last in _MEDIA:
            media[_MEDIA[last]] = member.name
    item = texts.get("json", {})
    if isinstance(item, list):
        item = {"messages": item}
    if not isinstance(item, dict):
        return Problem(key, f"not a record: the JSON of {key} holds {type(item).__name__}")
    if not texts and not media:
        names = ", ".join(member.name for member in members)
        return Problem(key, f"no text: expected a .txt or .json next to {names} in the tar")
    named = item.get("images") or item.get("image")
    if _TALKS.isdisjoint(item):
        # The JSON only tells where the picture came from, unless it has a question.
        if "caption" in texts and not captions.reserved(item):
            item = {"caption": texts["caption"], "image": []}
        if len(pictures) > 1:
            return Problem(key, f"several pictures of a caption: {', '.join(sorted(pictures))}")
    if pictures:
        item = {**item, "image": _in_order(pictures, named), "images": None}
    return {"id": key, **item, **media}


def _in_order(pictures: dict[str, str], named: Any) -> list[str]:
    """Return the places of pictures as the JSON lists them; else by the numbers in their names."""
    listed = [named] if isinstance(named, str) else named or []
    names = [Path(each).name for each in listed if isinstance(each, str)]
    places = {Path(name).name: place for name, place in pictures.items()}
    if sorted(names) == sorted(places):
        return [places[name] for name in names]
    parts = {name: re.split(r"(\d+)", name) for name in pictures}  # text, digits, text, ...
    keys = {name: (each[::2], list(map(int, each[1::2]))) for name, each in parts.items()}
    return [pictures[name] for name in sorted(pictures, key=keys.__getitem__)]
