"""Pairs of a question and its answer: "query" and "response", or "texts" of "user", "assistant".

ms-swift writes the former, with earlier turns under "history"; The Cauldron and FineVision the
latter. Pictures stand before the first question unless marks in the questions place them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.formats.turns import list_under, pictures_of, with_marks
from dpa_xtuner.data.records import Malformed, Parts

_UNREAD = ("instruction", "input", "context")


def read_query(item: Mapping[str, Any]) -> Parts:
    """Read a record of a query and its response.

    Raises:
        Malformed: it is not as the format says.
    """
    for key in _UNREAD:
        if item.get(key):
            raise Malformed(f"text that is not read: {key!r}; put it into 'query'")
    history = item.get("history") or []
    pairs = [*history, [item["query"], item["response"]]] if isinstance(history, list) else [None]
    return _parts(item, pairs, "'query' and 'response' are texts, 'history' has pairs")


def read_texts(item: Mapping[str, Any]) -> Parts:
    """Read a record of user and assistant texts.

    Raises:
        Malformed: it is not as the format says.
    """
    expected = "{'user': a string, 'assistant': a string}"
    texts = list_under(item, "texts", expected)
    known = (each if isinstance(each, Mapping) else {} for each in texts)
    pairs = ([each.get("user"), each.get("assistant")] for each in known)
    return _parts(item, pairs, f"expected {expected}")


def _parts(item: Mapping[str, Any], pairs: Iterable[Any], expected: str) -> Parts:
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise Malformed(f"malformed turn: {expected}")
        turns.append((with_marks(pair[0]), with_marks(pair[1])))
    images = pictures_of(item)
    if images and not any(DEFAULT_IMAGE_TOKEN in human for human, _ in turns):
        human, gpt = turns[0]
        turns[0] = (f"{DEFAULT_IMAGE_TOKEN}\n" * len(images) + human, gpt)
    return Parts(images, None, tuple(turns))
