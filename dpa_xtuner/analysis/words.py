"""What kind of word a token belongs to, by a list of English words (words.json)."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

OTHER, PUNCTUATION, END = "other word", "punctuation", "end"
CLASSES = ("thing", "colour", "number", "position", "function", "style", OTHER, PUNCTUATION, END)
"""All classes: what a picture shows first, then what text alone can tell.

Without a tagger, verbs, adjectives and rarer nouns are an :data:`OTHER` word, and so is every word
of another language. A token of neither letters nor digits is :data:`PUNCTUATION`; one that shows
nothing, such as a newline or the LLM's own end, is the :data:`END`."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
_BEFORE = 12  # tokens that are decoded together with one, so that its spaces are right


@cache
def _listed() -> dict[str, str]:
    """Each word of the list, and its class."""
    content = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
    return {
        word: kind for kind, words in content.items() if kind in CLASSES for word in words.split()
    }


def class_of(word: str) -> str:
    """Return the class of one word, in any case."""
    if word[0].isdigit():
        return "number"
    word, listed = word.lower().split("'")[0].split("’")[0], _listed()
    singular = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((listed[each] for each in singular if each in listed), OTHER)


def classes_of(texts: Sequence[str]) -> list[str]:
    """Return each token's class: that of the first word of which the token has a part.

    Args:
        texts: of the tokens, as :func:`token_texts` gives them; together they are the text.
    """
    whole = "".join(texts)
    kinds: list[str | None] = [None] * len(whole)
    for match in _WORD.finditer(whole):
        kinds[match.start() : match.end()] = [class_of(match[0])] * len(match[0])
    found, start = [], 0
    for text in texts:
        parts = [kind for kind in kinds[start : start + len(text)] if kind]
        found.append(parts[0] if parts else PUNCTUATION if text.strip() else END)
        start += len(text)
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token in its context; together they are the whole text.

    Of a character in several tokens the last has all of it, and the others the empty text. A
    special token that stands for an end shows nothing.
    """
    texts = []
    for i in range(len(ids)):
        window = list(ids[max(0, i - _BEFORE) : i + 1])
        before, now = (_decode(tokenizer, part) for part in (window[:-1], window))
        started = before.rstrip("\ufffd")
        texts.append("" if now.endswith("\ufffd") else now[len(started) :])
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    how: dict[str, Any] = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.decode(ids, **how)
