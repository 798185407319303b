"""One record of the data, whatever format it was written in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from xtuner.utils import DEFAULT_IMAGE_TOKEN

# What other projects put into a text for something that is not read here. "<image>" itself is
# counted, and "<ImageHere>" and its like were replaced by it.
_OTHER_MARK = re.compile(
    r"<[\s|/]{0,2}(?:(?:start|begin|end|of|fake|token|around|global|vila|__dj__)[_/-]?)*"
    r"(?:image|img|picture|video|audio|speech|sound|vision|media|point_?cloud|bbox|ref-object)"
    r"(?:[ _-]?(?:\d+|pad|start|begin|bos|end|eos|context|content|placeholder|plh|soft|tokens?|here"
    r"|features?|patch|location))*[\s|/]{0,2}>|<im_(?:start|end|patch)>|\[IMG\]"
    r"|data:image/[\w.+-]+;base64,[\w+/=]{64,}",
    re.IGNORECASE,
)
# Beside a picture, these stand for a part of it: of VideoRefer, Osprey, SpatialRGPT, Shikra.
_REGION = re.compile(r"<(?:region|mask|boxes|depth|roi|spi_descript)s?[ _-]?\d*>", re.IGNORECASE)
_OTHER_IN_ANSWER = re.compile(r"<(img|video|audio)>[^<>]*</\1>|<(bbox|ref-object)>", re.IGNORECASE)
_SYSTEM_KEYS = ("system", "system_prompt", "system_message")


@dataclass(frozen=True, slots=True)
class Record:
    """A well-formed record.

    Attributes:
        id: the record's "id"; its index in the file where it has none.
        images: paths as written in the file, or places in a file (see
            :mod:`dpa_xtuner.data.places`), in the order of the ``<image>`` marks.
        system: the system prompt, or None.
        turns: (human text with its ``<image>`` marks, gpt text) per turn, at least one.
        position: its place among the file's records, from 0.
        sizes: (width, height) of each image in pixels; empty where they were not read.
        silent: numbers of the turns, from 0, whose answers the data says not to train on.
    """

    id: str
    images: tuple[str, ...]
    system: str | None
    turns: tuple[tuple[str, str], ...]
    position: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    silent: tuple[int, ...] = ()


class Parts(NamedTuple):
    """What a format reads of a record.

    Attributes:
        images: as of :class:`Record`.
        system: the text of a system turn, or None.
        turns: as of :class:`Record`.
        silent: as of :class:`Record`.
    """

    images: tuple[str, ...]
    system: str | None
    turns: tuple[tuple[str, str], ...]
    silent: tuple[int, ...] = ()


class Malformed(Exception):
    """Why a record can't be used: "kind" or "kind: details"."""


def make_record(item: Mapping[str, Any], parts: Parts, position: int) -> Record:
    """Check what a format has read, and make the record.

    Args:
        item: the record as it is in the file, for its id and its system prompt.
        parts: what the format has read of it.
        position: its place among the file's records, its id where it has none.

    Raises:
        Malformed: it can't be trained on as it is meant.
    """
    record_id = read_id(item, position)
    system = _system(item, parts.system)
    _check_marks(parts.images, system, parts.turns)
    try:
        "".join([record_id, *parts.images, system or "", *chain(*parts.turns)]).encode()
    except UnicodeEncodeError:
        raise Malformed(
            "malformed text: half of a surrogate pair, which is no Unicode text"
        ) from None
    return Record(record_id, parts.images, system, parts.turns, position, (), parts.silent)


def read_id(item: Mapping[str, Any], position: int) -> str:
    """Return a record's "id" as text; its position where it has none.

    Raises:
        Malformed: it is neither a text nor a number.
    """
    found = item.get("id")
    if isinstance(found, str):
        return found
    if found is None:
        return str(position)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise Malformed("malformed id: expected a string or a number")
    if isinstance(found, float) and found.is_integer():  # as pandas writes whole numbers
        found = int(found)
    return str(found)


def shown_id(item: Any, position: int) -> str:
    """Return a record's id for a message, whatever is wrong with the record."""
    try:
        found = read_id(item, position) if isinstance(item, Mapping) else str(position)
    except Malformed:
        return str(position)
    return found.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair, escaped


def _system(item: Mapping[str, Any], turn: str | None) -> str | None:
    """Return the system prompt of a system turn or a key; None if it is empty or blank."""
    found = {turn} if turn is not None and turn.strip() else set()
    for key in _SYSTEM_KEYS:
        value = item.get(key)
        if value is not None and not isinstance(value, str):
            raise Malformed(f"malformed {key}: expected a string")
        if value and value.strip():
            found.add(value)
    if len(found) > 1:
        raise Malformed("several system prompts: a system turn and a key say different ones")
    return next(iter(found), None)


def _check_marks(
    images: tuple[str, ...], system: str | None, turns: tuple[tuple[str, str], ...]
) -> None:
    answers = [gpt for _, gpt in turns if "<" in gpt]
    if any(DEFAULT_IMAGE_TOKEN in text for text in (system or "", *answers)):
        raise Malformed(f"misplaced {DEFAULT_IMAGE_TOKEN}: it belongs into human turns only")
    for gpt in answers:
        if found := _OTHER_IN_ANSWER.search(gpt):
            raise Malformed(f"mark that is not read: {found[0][:100]} in an answer")
    for text in (system or "", *(human for human, _ in turns)):
        refuse_other_marks(text, bool(images))
    marks = sum(human.count(DEFAULT_IMAGE_TOKEN) for human, _ in turns)
    if marks != len(images):
        raise Malformed(
            f"wrong number of {DEFAULT_IMAGE_TOKEN}: {marks} in the text, {len(images)} images; "
            "mark the place of each image in the questions"
        )


def refuse_other_marks(text: str, beside_pictures: bool) -> None:
    """Refuse a text with a mark of another medium, or another spelling of a picture's.

    Args:
        text: a question, a system prompt or a caption.
        beside_pictures: whether the record has pictures, so that there may be marks of their parts.

    Raises:
        Malformed: there is one.
    """
    others = text.count("<") > text.count(DEFAULT_IMAGE_TOKEN)  # most texts have none
    if not others and "[IMG]" not in text and ";base64," not in text:
        return
    if beside_pictures and (part := _REGION.search(text)):
        raise Malformed(f"mark that is not read: {part[0]}; parts of pictures are not read")
    for found in _OTHER_MARK.finditer(text):
        if found[0] != DEFAULT_IMAGE_TOKEN:
            raise Malformed(
                f"mark that is not read: {found[0][:100]}; a picture's is {DEFAULT_IMAGE_TOKEN}, "
                "and other media are not read"
            )
