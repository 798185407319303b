"""Records of "messages" with "role" and "content": OpenAI, LLaMA-Factory, ms-swift, XTuner V1.

The content is a text with ``<image>`` marks, or a list of blocks. A block of a picture names it
(``{"type": "image", "image": path}``, ``{"type": "image_url", "image_url": {"url": path}}``), or
stands for the next one under "images" or "image". XTuner V1 names pictures in blocks and marks
their places in the text by ``<IMG_CONTEXT>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.formats.turns import (
    ANSWERS,
    is_silent,
    list_under,
    pair_up,
    picture_name,
    pictures_of,
    with_marks,
)
from dpa_xtuner.data.records import Malformed, Parts

NAME = "messages"
NEEDS = ("messages",)
_PLACE = "<IMG_CONTEXT>"  # of a picture in XTuner V1
_PICTURES = ("image", "image_url")  # types of blocks, and the keys of their pictures


def fits(item: Mapping[str, Any]) -> bool:
    """Whether a record is one of this format."""
    return "messages" in item


def as_item(value: Any) -> Any:
    """Make a record of a bare list of messages; return anything else unchanged."""
    if not isinstance(value, list) or not value:
        return value
    said = all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value)
    return {"messages": value} if said else value


def read(item: Mapping[str, Any]) -> Parts:
    """Read a record.

    Raises:
        Malformed: it is not as the format says.
    """
    messages = list_under(item, "messages", "messages under 'messages'")
    said = [_message(message) for message in messages]
    silent = [is_silent(message) for message in messages]
    roles, texts = [role for role, _, _ in said], [text for _, text, _ in said]
    images = _images(pictures_of(item), [name for _, _, names in said for name in names])
    blocks = [each for message in messages for each in _picture_blocks(message)]
    if any(block.get("index", i) not in (None, i) for i, block in enumerate(blocks)):
        raise Malformed("pictures out of order: the 'index' of a block is not its place")
    return Parts(images, *pair_up(roles, texts, silent))


def _images(named: tuple[str, ...], in_blocks: list[str | None]) -> tuple[str, ...]:
    """Return the pictures, which a record names under a key of its own or in blocks."""
    whole = tuple(name for name in in_blocks if name is not None)
    if not named and len(whole) < len(in_blocks):
        raise Malformed("malformed image: a block of a picture does not say which")
    if named and whole and named != whole:
        raise Malformed("two lists of pictures: in the messages, and under 'images' or 'image'")
    return named or whole


def _message(message: Any) -> tuple[Any, str, list[str | None]]:
    """Return a message's role, its text with marks, and the pictures of its blocks."""
    if not isinstance(message, Mapping):
        raise Malformed("malformed message: expected {'role': ..., 'content': ...}")
    role = message.get("role") or message.get("from")
    content = message.get("content")
    content = message.get("value") if content is None else content
    if isinstance(content, str):
        return role, with_marks(content), []
    if content is None and role in ANSWERS:
        return role, "", []
    if not isinstance(content, list):
        raise Malformed("malformed message: 'content' is neither a text nor a list of blocks")
    return role, *_blocks(content)


def _blocks(blocks: list[Any]) -> tuple[str, list[str | None]]:
    parts = list(_parts(blocks))
    pictures = [picture for text, picture in parts if text is None]
    texts = [text for text, _ in parts if text is not None]
    marked = sum(text.count(_PLACE) for text in texts)
    if marked:
        if marked != len(pictures):
            raise Malformed(f"wrong number of {_PLACE}: {marked} for {len(pictures)} pictures")
        return "".join(texts).replace(_PLACE, DEFAULT_IMAGE_TOKEN), pictures
    if pictures and any(DEFAULT_IMAGE_TOKEN in text for text in texts):
        if sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts) != len(pictures):
            raise Malformed(
                f"wrong number of {DEFAULT_IMAGE_TOKEN}: the text has other marks than its blocks"
            )
        return "".join(texts), pictures
    joined = "".join(f"{DEFAULT_IMAGE_TOKEN}\n" if text is None else text for text, _ in parts)
    return joined, pictures


def _picture_blocks(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if isinstance(block, Mapping) and block.get("type") in _PICTURES:
            yield block


def _parts(blocks: list[Any]) -> Iterator[tuple[str | None, str | None]]:
    """(text, None) of each block of text, (None, path or None) of each picture."""
    for block in blocks:
        if isinstance(block, str):
            yield with_marks(block), None
            continue
        if not isinstance(block, Mapping):
            raise Malformed("malformed message: a block of its content is no object")
        known = (key for key in ("text", *_PICTURES) if block.get(key) is not None)
        kind = block.get("type") or next(known, None)
        if kind == "text" and isinstance(block.get("text"), str):
            yield with_marks(block["text"]), None
        elif kind in _PICTURES:
            yield None, _picture(block)
        else:
            raise Malformed(f"block that is not read: type {kind!r}; known: text, image, image_url")


def _picture(block: Mapping[str, Any]) -> str | None:
    for key in (*_PICTURES, "path", "url"):
        value = block.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("url"), str):
            value = value["url"]
        if value is not None:
            return picture_name(value)
    return None
