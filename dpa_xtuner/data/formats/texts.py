"""The Cauldron's and FineVision's records: "texts" of "user" and "assistant", and "images"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpa_xtuner.data.formats.turns import (
    list_under,
    pictures_of,
    with_marks,
    with_pictures_in_front,
)
from dpa_xtuner.data.records import Malformed, Parts


def read(item: Mapping[str, Any]) -> Parts:
    """Read a record; its pictures stand before the first question unless marks place them.

    Raises:
        Malformed: it is not as the format says.
    """
    texts = list_under(item, "texts", "{'user': ..., 'assistant': ...}")
    turns = []
    for each in texts:
        known = each if isinstance(each, Mapping) else {}
        user, assistant = known.get("user"), known.get("assistant")
        if not isinstance(user, str) or not isinstance(assistant, str):
            raise Malformed("malformed turn: expected {'user': a string, 'assistant': a string}")
        turns.append((with_marks(user), with_marks(assistant)))
    images = pictures_of(item)
    return Parts(images, None, with_pictures_in_front(turns, images))
