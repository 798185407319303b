"""What kind of word a token belongs to, by a list of English words (words.json)."""

import json
import re
import unicodedata
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
PART = "\ufffd"
"""Stands at the end of a token's text for the part of a character that the token has."""

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
    singular = [word, word.removesuffix("s")]
    if re.fullmatch(r"..+(s|x|z|ch|sh|.o)es", word):  # boxes and potatoes, but not notes or toes
        singular.append(word[:-2])
    return next((listed[each] for each in singular if each in listed), OTHER)


def classes_of(texts: Sequence[str]) -> list[str]:
    """Return each token's class: that of the first word of which the token has a part.

    A token that has spaces alone, or no more than a part of a character, has the class of the next.

    Args:
        texts: of the tokens, as :func:`token_texts` gives them.
    """
    whole = "".join(text.rstrip(PART) for text in texts)
    # The vowel signs of many scripts are no letters to `re`, but they don't end a word.
    letters = "".join("a" if unicodedata.category(c).startswith("M") else c for c in whole)
    kinds: list[str | None] = [None] * len(whole)
    for match in _WORD.finditer(letters):
        kinds[match.start() : match.end()] = [class_of(match[0])] * len(match[0])
    found, end, following = [], len(whole), END
    for text in reversed(texts):
        shown = text.rstrip(PART)
        start = end - len(shown)
        parts = [kind for kind in kinds[start:end] if kind]
        if parts:
            following = parts[0]
        elif shown.strip():
            following = PUNCTUATION
        elif not text or "\n" in text:
            following = END
        found.append(following)
        end = start
    return found[::-1]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token in its context; without :data:`PART` they are the whole text.

    Of a character in several tokens the last has all of it, and the others end in :data:`PART`. A
    special token that stands for an end shows nothing.
    """
    texts = []
    for i in range(len(ids)):
        window = list(ids[max(0, i - _BEFORE) : i + 1])
        before, now = (_decode(tokenizer, part) for part in (window[:-1], window))
        text = now[len(before.rstrip(PART)) :]
        texts.append(text.rstrip(PART) + PART if text.endswith(PART) else text)
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    how: dict[str, Any] = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.decode(ids, **how)
