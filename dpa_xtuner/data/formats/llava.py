"""LLaVA's records: "conversations" of "from" and "value", pictures under "image" or "images"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpa_xtuner.data.formats.turns import is_silent, list_under, pair_up, pictures_of, with_marks
from dpa_xtuner.data.records import Malformed, Parts

NAME = "LLaVA"
NEEDS = ("conversations",)


def fits(item: Mapping[str, Any]) -> bool:
    """Whether a record is one of this format."""
    return "conversations" in item


def read(item: Mapping[str, Any]) -> Parts:
    """Read a record.

    Raises:
        Malformed: it is not as the format says.
    """
    turns = list_under(item, "conversations", "turns under 'conversations'")
    roles, texts, silent = [], [], []
    for turn in turns:
        if not isinstance(turn, dict):
            raise _malformed()
        text = turn.get("value")
        if text is None:
            text = turn.get("content")
        if not isinstance(text, str):
            raise _malformed()
        roles.append(turn.get("from") or turn.get("role"))
        texts.append(with_marks(text) if "<" in text else text)
        silent.append(is_silent(turn))
    return Parts(pictures_of(item), *pair_up(roles, texts, silent))


def _malformed() -> Malformed:
    return Malformed("malformed turn: expected {'from': ..., 'value': a string}")
