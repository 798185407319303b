"""Conversations: "conversations" of "from" and "value", or "messages" of "role" and "content".

LLaVA, OpenAI, LLaMA-Factory, ms-swift and XTuner V1 write them so. What is said is a text with
``<image>`` marks, or a list of blocks. A block of a picture names it
(``{"type": "image", "image": path}``, ``{"type": "image_url", "image_url": {"url": path}}``), or
stands for the next one under "images" or "image". XTuner V1 names pictures in blocks and marks
their places in the text by ``<IMG_CONTEXT>``.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.formats.turns import (
    ANSWERS,
    SYSTEM,
    is_silent,
    list_under,
    pair_up,
    picture_name,
    pictures_of,
    with_marks,
)
from dpa_xtuner.data.records import Malformed, Parts

_PLACE = "<IMG_CONTEXT>"  # of a picture in XTuner V1
_BLOCKS_AS_TEXT = ('[{"type"', "[{'type'")
_PICTURES = ("image", "image_url")  # types of blocks, and the keys of their pictures


class _Picture(NamedTuple):
    """A block of a picture: its path, None if it does not say; its "index", None without one."""

    path: str | None
    index: Any


def as_item(value: Any) -> Any:
    """Make a record of a bare list of messages; return anything else unchanged."""
    if not isinstance(value, list) or not value:
        return value
    said = all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value)
    return {"messages": value} if said else value


def read(item: Mapping[str, Any], key: str = "messages") -> Parts:
    """Read a record.

    Args:
        item: the record.
        key: what its messages stand under.

    Raises:
        Malformed: it is not as the format says.
    """
    roles, texts, silent = [], [], []
    pictures: list[_Picture] = []
    for message in list_under(item, key, "{'from': ..., 'value': ...}, or of role and content"):
        if not isinstance(message, Mapping):
            raise Malformed("malformed message: expected {'role': ..., 'content': ...}")
        role, content = message.get("from"), message.get("value")
        role = message.get("role") if role is None else role
        content = message.get("content") if content is None else content
        silent.append(is_silent(message, role))
        if content is None:
            content = _of_no_content(role, message)
        elif not isinstance(content, str):
            content, found = _of_blocks(content)
            pictures += found
        elif "<" in content:
            content = with_marks(content)
        elif content.startswith(_BLOCKS_AS_TEXT):
            raise Malformed("malformed message: its blocks are a JSON text; decode it to a list")
        roles.append(role)
        texts.append(content)
    images = pictures_of(item)
    return Parts(_images(images, pictures) if pictures else images, *pair_up(roles, texts, silent))


def _images(named: tuple[str, ...], blocks: list[_Picture]) -> tuple[str, ...]:
    """Return the pictures, which a record names under a key of its own or in blocks."""
    whole = tuple(block.path for block in blocks if block.path is not None)
    if not named and len(whole) < len(blocks):
        raise Malformed("malformed image: a block of a picture does not say which")
    if named and whole and named != whole:
        raise Malformed("two lists of pictures: in the messages, and under 'images' or 'image'")
    if any(block.index not in (None, place) for place, block in enumerate(blocks)):
        raise Malformed("pictures out of order: the 'index' of a block is not its place")
    return named or whole


def _of_no_content(role: Any, message: Mapping[str, Any]) -> str:
    """Return the empty text of an answer or a system prompt that is null."""
    if role in (*ANSWERS, SYSTEM) and not message.keys().isdisjoint(("content", "value")):
        return ""
    raise Malformed(
        "malformed message: its text is under 'content' or 'value'; it has "
        f"{', '.join(map(repr, message)) or 'no key'}"
    )


def _of_blocks(content: Any) -> tuple[str, list[_Picture]]:
    """Return the text with marks and the pictures of a message whose content is no text."""
    if not isinstance(content, list):
        raise Malformed("malformed message: its content is neither a text nor a list of blocks")
    parts = list(_parts(content))
    pictures = [part for part in parts if isinstance(part, _Picture)]
    text = "".join(part for part in parts if isinstance(part, str))
    for mark in (_PLACE, DEFAULT_IMAGE_TOKEN):
        marked = text.count(mark)
        if marked and (pictures or mark == _PLACE):  # the text says where they stand
            if marked != len(pictures):
                raise Malformed(f"wrong number of {mark}: {marked} for {len(pictures)} pictures")
            return text.replace(mark, DEFAULT_IMAGE_TOKEN), pictures
    joined = [part if isinstance(part, str) else f"{DEFAULT_IMAGE_TOKEN}\n" for part in parts]
    return "".join(joined), pictures


def _parts(blocks: list[Any]) -> Iterator[str | _Picture]:
    """Each block's text or picture."""
    for block in blocks:
        if isinstance(block, str):
            yield with_marks(block)
            continue
        if not isinstance(block, Mapping):
            raise Malformed("malformed message: a block of its content is no object")
        known = (key for key in ("text", *_PICTURES) if block.get(key) is not None)
        kind = block.get("type") or next(known, None)
        if block.get("text") and any(map(block.get, _PICTURES)):
            raise Malformed("malformed block: it has a picture and a text; make two of it")
        if kind == "text":
            if not isinstance(block.get("text"), str):
                raise Malformed("malformed block: a block of a text has it under 'text'")
            yield with_marks(block["text"])
        elif kind in _PICTURES:
            yield _Picture(_path(block), block.get("index"))
        else:
            raise Malformed(f"block that is not read: type {kind!r}; known: text, image, image_url")


def _path(block: Mapping[str, Any]) -> str | None:
    for key in (*_PICTURES, "path", "url"):
        value = block.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("url"), str):
            value = value["url"]
        if value is not None:
            return picture_name(value)
    return None
