"""What the formats have in common: turns, answers that are not trained on, pictures' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.records import Malformed

HUMAN = ("human", "user")
ANSWERS = ("gpt", "assistant", "bot")
SYSTEM = "system"
_OTHER_SPELLINGS = ("<ImageHere>",)  # of "<image>"
_WEB = ("http://", "https://", "s3://", "gs://", "oss://")
_MEDIA = ("video", "videos", "audio", "audios", "speech", "point_cloud")
_PREFERENCES = (
    "chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag",
)  # fmt: skip
_TOOLS = ("tools", "functions")
_SUSPECT = frozenset((*_MEDIA, *_PREFERENCES, *_TOOLS, "label"))


def refuse_what_is_not_read(item: Mapping[str, Any]) -> None:
    """Refuse what a record has besides pictures and texts, and would be trained without.

    Raises:
        Malformed: there is a video or audio, tools, or an answer that others are preferred to.
    """
    if _SUSPECT.isdisjoint(item):
        return
    for key in _MEDIA:
        if item.get(key):
            raise Malformed(f"{key}: records with {key} are not read, only pictures and texts")
    for key in _PREFERENCES:
        if item.get(key) is not None:
            raise Malformed(f"preferences: {key!r} rates answers, and here all are trained on")
    if isinstance(item.get("label"), bool):
        raise Malformed("preferences: 'label' rates answers, and here all are trained on")
    for key in _TOOLS:
        if item.get(key) not in (None, "", "[]", []):
            raise Malformed(f"tools: {key!r} is not read")


def list_under(item: Mapping[str, Any], key: str, expected: str) -> list:
    """Return the list under a key.

    Raises:
        Malformed: there is none, or it is empty.
    """
    found = item[key]
    if not isinstance(found, list) or not found:
        raise Malformed(f"no {key}: expected a list of {expected}")
    return found


def with_marks(text: str) -> str:
    """Spell all marks of pictures in a text ``<image>``."""
    for spelling in _OTHER_SPELLINGS:
        if spelling in text:
            text = text.replace(spelling, DEFAULT_IMAGE_TOKEN)
    return text


def picture_names(value: Any, what: str = "image") -> tuple[str, ...]:
    """Return the pictures under a key: none, a path, or a list of paths.

    Raises:
        Malformed: it is something else, or a picture on the web.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str) and ":" not in value:
        return (value,)
    return tuple(
        picture_name(each, what) for each in (value if isinstance(value, list) else [value])
    )


def picture_name(value: Any, what: str = "image") -> str:
    """Return a picture's path: as written, of a ``file://`` address or of ``{"path": ...}``.

    Raises:
        Malformed: it is none, or it is on the web.
    """
    if isinstance(value, Mapping) and not value.get("bytes"):
        value = value.get("path") or value.get("url")
    if not isinstance(value, str) or not value:
        raise Malformed(f"malformed {what}: expected a path or a list of paths")
    if value.startswith(_WEB):
        raise Malformed(f"picture on the web: {value[:200]}; download it, and name the file")
    return unquote(value.removeprefix("file://")) if value.startswith("file://") else value


def pictures_of(item: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the pictures that a record names under "image" or "images".

    Raises:
        Malformed: they are no paths, or the two keys name different ones.
    """
    images = picture_names(item.get("image"))
    if item.get("images") is None:
        return images
    others = picture_names(item["images"], "images")
    if images and others and images != others:
        raise Malformed("two lists of pictures: 'image' and 'images' name different ones")
    return images or others


def pair_up(
    roles: Sequence[Any], texts: Sequence[str], silent: Sequence[bool]
) -> tuple[str | None, tuple[tuple[str, str], ...], tuple[int, ...]]:
    """Turn messages into a system prompt and pairs of a question and its answer.

    Args:
        roles: who speaks.
        texts: what is said.
        silent: whether a message is not to be trained on.

    Returns:
        The text of a leading system message or None, the pairs, and the numbers of those whose
        answer is not to be trained on.

    Raises:
        Malformed: a role is unknown, or questions and answers do not alternate.
    """
    system, start = None, 0
    if roles and roles[0] == SYSTEM:
        system, start = texts[0], 1
    if not _alternate(roles[start:]):
        raise _wrong_roles(roles)
    pairs = tuple(zip(texts[start::2], texts[start + 1 :: 2], strict=True))
    if True not in silent:
        return system, pairs, ()
    return system, pairs, tuple(i for i, each in enumerate(silent[start + 1 :: 2]) if each)


def _alternate(roles: Sequence[Any]) -> bool:
    """Whether questions and answers alternate, from a question to an answer."""
    if roles in (["human", "gpt"], ["user", "assistant"]):  # most often
        return True
    humans, answers = roles[::2], roles[1::2]
    return (
        len(humans) == len(answers) > 0
        and all(role in HUMAN for role in humans)
        and all(role in ANSWERS for role in answers)
    )


def _wrong_roles(roles: Sequence[Any]) -> Malformed:
    known = (*HUMAN, *ANSWERS, SYSTEM)
    for role in roles:
        if role not in known:
            return Malformed(f"unknown role: {role!r}; known: {', '.join(known)}")
    shown = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
    return Malformed(f"roles not alternating: expected human, gpt, ...; got {shown or 'none'}")


def is_silent(message: Mapping[str, Any]) -> bool:
    """Whether a message says of itself that it is not to be trained on ("loss", "weight")."""
    return any(key in message and message[key] in (0, False) for key in ("loss", "weight"))


def with_pictures_in_front(
    turns: Sequence[tuple[str, str]], images: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Pairs whose pictures stand before the first question, where no question marks their place."""
    if images and not any(DEFAULT_IMAGE_TOKEN in human for human, _ in turns):
        (human, gpt), *others = turns
        turns = [(f"{DEFAULT_IMAGE_TOKEN}\n" * len(images) + human, gpt), *others]
    return tuple(turns)
