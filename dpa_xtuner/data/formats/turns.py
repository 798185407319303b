"""What the formats have in common: turns, answers that are not trained on, pictures' names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.places import is_place
from dpa_xtuner.data.records import Malformed

HUMAN = ("human", "user")
ANSWERS = ("gpt", "assistant", "bot")
SYSTEM = "system"
_MEDIA = ("video", "videos", "audio", "audios", "speech", "point_cloud")
_PREFERENCE = re.compile(
    r"(?:chosen|rejected)(?:_.*)?|.*_(?:chosen|rejected)|(?:positive|negative)_messages|kto_tag"
)
_TOOLS = ("tools", "functions")
_READ = frozenset(("id", "image", "images", "conversations", "messages", "texts"))
_TALKS = frozenset(("conversations", "messages", "texts"))
_NUMBERED = re.compile(r"(?:image|img)s?[_-]?\d+", re.IGNORECASE)
_PICTURE_KEY = re.compile(
    r"(?:image|img|picture|photo)s?(?:[_-]?(?:path|url|file|name|list)s?)?", re.IGNORECASE
)
_PICTURE_FILE = re.compile(r".+\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
_LONGEST_PATH = 4096
_SHOWN = 80  # characters of what is no picture
# Keys of a message that change what is trained: the kind of the problem for each.
_NOT_READ_IN_A_MESSAGE = {
    **dict.fromkeys(_MEDIA, "other medium in a message"),
    **dict.fromkeys(("image", "images", "image_url", "img"), "picture that is not read"),
    **dict.fromkeys(("tool_calls", "function_call"), "tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
    "train_detail": "answer trained in part",
}
_TRAINED = ("loss", "weight", "train", "training", "loss_scale")


def refuse_what_is_not_read(item: Mapping[str, Any]) -> None:
    """Refuse what a record has besides pictures and texts, and would be trained without.

    Raises:
        Malformed: there is a video or audio, tools, or an answer that others are preferred to; or
            two conversations.
    """
    if len(_TALKS & item.keys()) > 1:
        named = " and ".join(sorted(map(repr, _TALKS & item.keys())))
        raise Malformed(f"two conversations: under {named}; keep one")
    if item.get("history") and not _TALKS.isdisjoint(item):
        raise Malformed("two conversations: 'history' is read beside 'query' alone")
    for key, value in item.items():
        if key in _MEDIA and value:
            raise Malformed(f"{key}: records with {key} are not read, only pictures and texts")
        if (key == "label" and isinstance(value, bool)) or _PREFERENCE.fullmatch(key):
            raise Malformed(f"preferences: {key!r} rates answers, and here all are trained on")
        if key in _TOOLS and value not in ("", "[]", []):
            raise Malformed(f"tools: {key!r} is not read")


def refuse_unread_pictures(item: Mapping[str, Any], images: Sequence[str]) -> None:
    """Refuse a record with a picture under a key that is not read.

    Where pictures are read, another key may tell where they came from, and does no harm.

    Args:
        item: the record as it is in the file.
        images: its pictures that are read.

    Raises:
        Malformed: there is one.
    """
    for key, value in item.items():
        if key in _READ or not value:
            continue
        if _NUMBERED.fullmatch(key) or (
            not images and (_PICTURE_KEY.fullmatch(key) or _is_picture(value))
        ):
            raise Malformed(
                f"picture that is not read: {key!r}; pictures belong under 'image' or 'images'"
            )


def _is_picture(value: Any) -> bool:
    """Whether a value names or holds a picture; bytes stand for a column of them."""
    if isinstance(value, str):
        return len(value) < _LONGEST_PATH and _PICTURE_FILE.fullmatch(value) is not None
    if isinstance(value, list):
        return bool(value) and _is_picture(value[0])
    if isinstance(value, Mapping):
        return "bytes" in value or _is_picture(value.get("path"))
    return isinstance(value, bytes)


def list_under(item: Mapping[str, Any], key: str, expected: str) -> list:
    """Return the list under a key.

    Raises:
        Malformed: there is none, or it is empty.
    """
    found = item[key]
    if not isinstance(found, list) or not found:
        got = "none" if found == [] else type(found).__name__
        raise Malformed(f"no {key}: expected a list of {expected}, got {got}")
    return found


def with_marks(text: str) -> str:
    """Spell all marks of pictures in a text ``<image>``."""
    return text.replace("<ImageHere>", DEFAULT_IMAGE_TOKEN)


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
    given = value
    if isinstance(value, Mapping) and not value.get("bytes"):
        value = value.get("path") or value.get("url")
    if not isinstance(value, str) or not value:
        got = repr(given)[:_SHOWN]
        raise Malformed(f"malformed {what}: expected a path or a list of paths, got {got}")
    if value.startswith("file://"):
        return unquote(value.removeprefix("file://"))
    if "://" in value and not is_place(value):
        raise Malformed(f"picture on the web: {value[:200]}; download it, and name the file")
    return value


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
    start = 1 if roles and roles[0] == SYSTEM else 0
    humans, answers = roles[start::2], roles[start + 1 :: 2]
    known = all(role in HUMAN for role in humans) and all(role in ANSWERS for role in answers)
    if not known or not len(humans) == len(answers) > 0:
        raise _wrong_roles(roles)
    pairs = tuple(zip(texts[start::2], texts[start + 1 :: 2], strict=True))
    left_out = tuple(i for i, each in enumerate(silent[start + 1 :: 2]) if each)
    return texts[0] if start else None, pairs, left_out


def _wrong_roles(roles: Sequence[Any]) -> Malformed:
    known = (*HUMAN, *ANSWERS, SYSTEM)
    for role in roles:
        if role not in known:
            return Malformed(f"unknown role: {role!r}; known: {', '.join(known)}")
    shown = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
    return Malformed(f"roles not alternating: expected human, gpt, ...; got {shown or 'none'}")


def is_silent(message: Mapping[str, Any], role: Any) -> bool:
    """Whether a message says of itself that it is not to be trained on.

    Raises:
        Malformed: it holds what is not read, such as a picture of its own, or a weight other than
            0 and 1; or it is a question to be trained on.
    """
    if len(message) == 2:  # who speaks, and what is said
        return False
    for key, kind in _NOT_READ_IN_A_MESSAGE.items():
        if message.get(key):
            raise Malformed(f"{kind}: {key!r} of a message is not read")
    said = [(key, message[key]) for key in _TRAINED if message.get(key) is not None]
    for key, value in said:
        if value not in (0, 1):
            raise Malformed(f"malformed {key}: expected true or false, 1 or 0")
        if value and role not in ANSWERS:
            raise Malformed(f"question to train on: {key!r} says so, and only answers are trained")
    return any(not value for _, value in said)
