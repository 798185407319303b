"""A question and its answer: "query" and "response", earlier turns under "history"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpa_xtuner.data.formats.turns import pictures_of, with_marks, with_pictures_in_front
from dpa_xtuner.data.records import Malformed, Parts

_UNREAD = ("instruction", "input", "context")


def read(item: Mapping[str, Any]) -> Parts:
    """Read a record; pictures that no mark places stand before the first question.

    Raises:
        Malformed: it is not as the format says.
    """
    for key in _UNREAD:
        if item.get(key):
            raise Malformed(f"text that is not read: {key!r}; put it into 'query'")
    history = item.get("history") or []
    pairs = [*history, [item["query"], item["response"]]] if isinstance(history, list) else [None]
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise Malformed("malformed turn: 'query' and 'response' are texts, 'history' has pairs")
        turns.append((with_marks(pair[0]), with_marks(pair[1])))
    images = pictures_of(item)
    return Parts(images, None, with_pictures_in_front(turns, images))
