"""Special tokens that stand in a text of the data, and are only text there.

A tokenizer takes ``<|im_end|>`` for the end of a turn wherever it stands: a question that speaks of
it would hold a false end, and an answer would teach one. So where a text of the data holds such a
word, each is replaced by a stand-in before the prompt template is laid around the text. What the
template itself says stays special. A second tokenizer, which knows the special tokens by other
names only, then takes the words for what they are.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from xtuner.utils import DEFAULT_IMAGE_TOKEN

# Unicode's noncharacters, which no text holds.
_OPEN, _CLOSE, _NAMED = "\ufdd0", "\ufdd1", "\ufdd2"
_FIRST = 0xE000  # of the private characters that number the special tokens


class SpecialTokens:
    """The special tokens of a tokenizer, and the tokens of texts that mention them.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow.
        template: the prompt template; what ends an answer in it is special too where it is a token
            of its own.
    """

    def __init__(self, tokenizer: Any, template: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._words = sorted(_words(tokenizer, template), key=len, reverse=True)
        self._starts = {word[0] for word in self._words}
        self._pattern = re.compile("|".join(map(re.escape, self._words)) or "(?!)")
        self._numbers = {word: i for i, word in enumerate(self._words)}
        last = chr(_FIRST + max(0, len(self._words) - 1))
        self._hidden = re.compile(f"{_OPEN}([{chr(_FIRST)}-{last}]){_CLOSE}")

    def are_in(self, text: str) -> bool:
        """Whether a text holds a special token."""
        # Few texts hold such a letter, so that few are searched.
        found = any(letter in text for letter in self._starts) and self._pattern.search(text)
        return bool(found)

    def hide(self, text: str) -> str:
        """Put stand-ins for the special tokens of a text."""
        return self._pattern.sub(
            lambda m: f"{_OPEN}{chr(_FIRST + self._numbers[m[0]])}{_CLOSE}", text
        )

    def is_hidden(self, text: str) -> bool:
        """Whether a text holds stand-ins."""
        return _OPEN in text and self._hidden.search(text) is not None

    def ids(self, text: str) -> list[int]:
        """Tokenise a text with stand-ins: what they stand for becomes plain text."""
        if self._renamed is None:
            return self._ids_of_slow(text)
        named = self._pattern.sub(lambda m: self._name(m[0]), text)
        return self._renamed.encode(self._shown(named), add_special_tokens=False).ids

    def _shown(self, text: str) -> str:
        return self._hidden.sub(lambda m: self._words[ord(m[1]) - _FIRST], text)

    def _name(self, word: str) -> str:
        return f"{_NAMED}{chr(_FIRST + self._numbers[word])}{_NAMED}"

    def _ids_of_slow(self, text: str) -> list[int]:
        ids: list[int] = []
        plain = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        # Text, special token, text, special token, ..., text.
        for i, piece in enumerate(re.split(f"({self._pattern.pattern})", text)):
            if i % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += self._tokenizer(self._shown(piece), **plain).input_ids
        return ids

    @functools.cached_property
    def _renamed(self) -> Tokenizer | None:
        """The tokenizer with other names for its special tokens; None for a slow one."""
        if not self._tokenizer.is_fast:
            return None
        self._tokenizer("a")  # clears the padding and truncation that an earlier call has left set
        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        spec["post_processor"] = None
        for token in spec["added_tokens"]:
            if token["content"] in self._numbers:
                token["content"] = self._name(token["content"])
        model = spec["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {self._known(word): i for word, i in model["vocab"].items()}
        elif "vocab" in model:  # Unigram: a list of pieces with their scores
            model["vocab"] = [[self._known(word), score] for word, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._known(model["unk_token"])
        renamed = Tokenizer.from_str(json.dumps(spec))
        for word in self._words:
            theirs = self._tokenizer.convert_tokens_to_ids(word)
            assert renamed.token_to_id(self._name(word)) == theirs, f"{word} is not token {theirs}"
        return renamed

    def _known(self, word: str) -> str:
        return self._name(word) if word in self._numbers else word


def special_ids(tokenizer: Any) -> list[int]:
    """List the tokens that no text becomes, such as the end of a turn."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added.union(tokenizer.all_special_ids))


def _words(tokenizer: Any, template: Mapping[str, Any]) -> set[str]:
    """List special tokens and added ones that end an answer, without the mark of a picture."""
    ends = [(template.get("SUFFIX") or "").strip(), *(template.get("STOP_WORDS") or ())]
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special or str(token) in ends}
    found |= {*map(str, tokenizer.all_special_tokens)}
    words = [word for word in found if word.strip() and word != DEFAULT_IMAGE_TOKEN]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    unk = tokenizer.special_tokens_map.get("unk_token")
    # A name that was set and is no token has the id of the unknown token, or none.
    unknown = {None} if unk is None else {None, tokenizer.convert_tokens_to_ids(unk)}
    return {word for word, i in ids.items() if i not in unknown or word == unk}
