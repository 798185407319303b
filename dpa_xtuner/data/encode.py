"""Tokenise records in batches; an image is one placeholder token until a sample is read."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Malformed, Record
from dpa_xtuner.data.special import SpecialTokens
from dpa_xtuner.data.templates import (
    Piece,
    SampleFormat,
    Special,
    resolve_template,
    silent_turns,
    to_pieces,
)
from dpa_xtuner.data.tiles import Tiling
from dpa_xtuner.errors import DPAError


@dataclass(frozen=True)
class TokenizedRecords:
    """A tokenised batch of N samples with T tokens in all.

    Attributes:
        records: the N records that are usable.
        tokens: (T,) int32, ``IMAGE_TOKEN_INDEX`` once for each image.
        supervised: (T,) bool.
        counts: (N,) int64, tokens per sample.
        lengths: (N,) int64, tokens per sample with its images expanded.
        truncated: (N,) bool, whether a sample's end was cut off.
        problems: what is wrong with the other records.
        notes: what is special about usable ones, told of as problems are: special tokens in a text,
            answers that are not trained on.
    """

    records: list[Record]
    tokens: np.ndarray
    supervised: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    problems: list[Problem]
    notes: list[Problem]


class RecordTokenizer:
    """Turns records into tokens in one format.

    BOS stands once, at the start, where the tokenizer itself puts one and the template does not.
    (Stock ``encode_fn`` puts one before every turn that follows an EOS, for any tokenizer that
    names a BOS.)

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow.
        sample_format: see :mod:`dpa_xtuner.data.templates`.
        image_tokens: tokens that an image, or each of its tiles, takes in the sequence.
        prompt_template: template name or mapping; "chat" needs one, the others read none.
        max_length: tokens that a sample may have, its images expanded; at least 2.
        tiling: how images are cut, so that their sizes decide how many tokens they take: then the
            records must tell these. None where an image is one picture.
        special_tokens: what a special token in a text of the data is, "text" or a "token"; stock
            XTuner takes it for the token. See :mod:`dpa_xtuner.data.special`.

    Attributes:
        tokenizer: as given.
        sample_format: as given.
        tiling: as given, None for "caption_text", which leaves the images out.

    Raises:
        DPAError: the template is unknown, or the tokenizer lacks the EOS that it needs.
    """

    def __init__(
        self,
        tokenizer: Any,
        sample_format: SampleFormat,
        image_tokens: int,
        prompt_template: str | Mapping[str, Any] | None,
        max_length: int,
        tiling: Tiling | None = None,
        special_tokens: Literal["text", "token"] = "text",
    ) -> None:
        self.tokenizer = tokenizer
        self.sample_format = sample_format
        self.tiling = None if sample_format == "caption_text" else tiling
        self._template = resolve_template(prompt_template) if sample_format == "chat" else {}
        self._image_tokens = image_tokens
        self._max_length = max_length
        self._special_tokens = special_tokens
        self._special = SpecialTokens(tokenizer, self._template)
        first = tokenizer("a").input_ids[:1]
        self._bos = first if first == [tokenizer.bos_token_id] else []
        self._in_context = self._template.get("AS_ONE_TEXT", False) and self._adds_prefix_space()
        needs_eos = sample_format == "chat" and not self._template.get("SUFFIX_AS_EOS", False)
        if needs_eos and tokenizer.eos_token_id is None:
            raise DPAError(
                "the tokenizer has no eos_token, which ends an answer in this prompt_template; set "
                "one, or use a template with SUFFIX and SUFFIX_AS_EOS=True."
            )

    def cache_key(self) -> dict[str, Any]:
        """Collect all that decides the tokens, except the data; the tokenizer by its hash."""
        return {
            "sample_format": self.sample_format,
            "prompt_template": self._template,
            "image_tokens": self._image_tokens,
            "max_length": self._max_length,
            "max_tiles": self.tiling.max_tiles if self.tiling else 1,
            "tile_size": self.tiling.tile_size if self.tiling else None,
            "special_tokens": self._special_tokens,
            "bos": self._bos,
            "eos": self.tokenizer.eos_token_id,
            "tokenizer": _tokenizer_hash(self.tokenizer),
        }

    def __call__(self, items: Sequence[Record | Problem]) -> TokenizedRecords:
        """Tokenise a batch.

        Args:
            items: records; problems among them are passed on.

        Returns:
            The usable samples and the problems.

        Raises:
            DPAError: a record has an image, and none takes any token.
        """
        records, layouts = [], []
        problems: list[Problem] = []
        notes: list[Problem] = []
        for item in items:
            if isinstance(item, Problem):
                problems.append(item)
                continue
            if self.sample_format == "caption_text":
                item = replace(item, images=())
            try:
                layouts.append(self._lay_out(item, notes))
                records.append(item)
            except Malformed as error:
                problems.append(Problem.of(item, str(error)))
        found = self._cut(records, *self._tokenise(layouts), problems)
        lost = {problem.position for problem in found.problems}
        found.notes.extend(note for note in notes if note.position not in lost)
        return found

    def _lay_out(self, record: Record, notes: list[Problem]) -> list[Piece]:
        if record.images and self._image_tokens < 1:
            raise DPAError(
                f"record {record.id} has an image, but image_tokens is {self._image_tokens}; set "
                "the number of tokens that an image takes (576 for CLIP ViT-L/14-336)."
            )
        pieces = to_pieces(self._plain(record, notes), self.sample_format, self._template)
        if self.sample_format == "chat" and (silent := silent_turns(record)):
            some = f"{len(silent)} of {len(record.turns)}"
            left = f"answers not trained on: {some}, empty or marked so"
            notes.append(Problem.of(record, left))
        return pieces

    def _plain(self, record: Record, notes: list[Problem]) -> Record:
        """Hide the special tokens that a record's texts hold, so that they are taken for text."""
        special = self._special
        if not any(map(special.are_in, self._texts(record))):
            return record
        notes.append(Problem.of(record, "special token in a text"))
        if self._special_tokens == "token":
            return record
        hidden = tuple((special.hide(human), special.hide(gpt)) for human, gpt in record.turns)
        system = record.system if record.system is None else special.hide(record.system)
        return replace(record, turns=hidden, system=system)

    def _texts(self, record: Record) -> list[str]:
        """Return the texts of a record that this format uses."""
        if self.sample_format != "chat":
            return [gpt for _, gpt in record.turns]
        return [record.system or "", *chain.from_iterable(record.turns)]

    def _tokenise(self, layouts: list[list[Piece]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens (T,) int32, supervised (T,) bool and the sample of each token (T,)."""
        special: dict[str | Special, list[int]] = {
            Special.IMAGE: [IMAGE_TOKEN_INDEX],
            Special.EOS: [self.tokenizer.eos_token_id],
        }
        pieces = list(chain.from_iterable(layouts))
        texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
        alone = self._ids(texts)
        encoded = iter(self._ids_in_context(layouts, alone) if self._in_context else alone)
        rows = [special.get(piece.content) or next(encoded) for piece in pieces]
        sizes = np.array([len(row) for row in rows], np.int64)
        tokens = np.fromiter(chain.from_iterable(rows), np.int32, int(sizes.sum()))
        # From one value per piece to one per token.
        supervised = np.repeat(np.array([piece.supervised for piece in pieces], bool), sizes)
        numbers = [sample for sample, layout in enumerate(layouts) for _ in layout]
        samples: np.ndarray = np.repeat(np.array(numbers, np.int64), sizes)
        if self._bos:
            starts = np.searchsorted(samples, np.arange(len(layouts)))
            lacking = np.flatnonzero(tokens[starts] != self._bos[0])
            tokens = np.insert(tokens, starts[lacking], self._bos[0])
            supervised = np.insert(supervised, starts[lacking], False)
            samples = np.insert(samples, starts[lacking], lacking)
        return tokens, supervised, samples

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids
        for i, text in enumerate(texts):
            if self._special.is_hidden(text):
                rows[i] = self._special.ids(text)
        return rows

    def _adds_prefix_space(self) -> bool:
        """Tell whether a text on its own is tokenised as if a space preceded it."""
        alone, later = self._ids(["a", "\na"])
        return later[-len(alone) :] != alone

    def _ids_in_context(self, layouts: list[list[Piece]], alone: list[list[int]]) -> list:
        """Tokenise each text piece in the context of what precedes it in its sample.

        Args:
            layouts: the pieces of each sample.
            alone: the tokens of each text piece where it stands alone.
        """
        specials = tuple(map(str, self.tokenizer.all_special_tokens))
        start = self.tokenizer.bos_token if self._bos else ""
        special = {Special.IMAGE: "", Special.EOS: self.tokenizer.eos_token}
        contexts, texts = [], []
        for layout in layouts:
            before = start
            for content, _ in layout:
                if isinstance(content, str):
                    contexts.append(before)
                    texts.append(before + content)
                    ends = [token for token in specials if content.endswith(token)]
                    before = max(ends, key=len, default="\n")
                else:
                    before = special[content]
        ahead = {context: self._ids([context])[0] if context else [] for context in set(contexts)}
        rows = []
        for context, row, other in zip(contexts, self._ids(texts), alone, strict=True):
            size = len(ahead[context])
            rows.append(row[size:] if row[:size] == ahead[context] else other)
        return rows

    def _cut(
        self,
        records: list[Record],
        tokens: np.ndarray,
        supervised: np.ndarray,
        samples: np.ndarray,
        problems: list[Problem],
    ) -> TokenizedRecords:
        """Truncate to ``max_length`` and sort out the samples that lost what they need."""
        n = len(records)
        images = tokens == IMAGE_TOKEN_INDEX
        pictures = [self._pictures(record) for record in records]
        cost = np.ones(len(tokens), np.int64)
        cost[images] = self._image_tokens * np.array([*chain.from_iterable(pictures)], np.int64)
        full = _sum_by(samples, cost, n)
        end = np.cumsum(cost) - (np.cumsum(full) - full)[samples]  # position after each token
        fits = end <= self._max_length
        trained = fits & supervised & (end > cost)  # a first token is predicted from nothing
        image_lost = _sum_by(samples, images & ~fits, n) > 0
        no_answer = _sum_by(samples, trained, n) == 0
        for i in np.flatnonzero(image_lost | no_answer):
            lost = f"no supervised token: {full[i]} tokens, max_length {self._max_length}"
            if image_lost[i]:
                cut = f" in {sum(pictures[i])} tiles" if self.tiling else ""
                lost = (
                    f"image cut off: {len(pictures[i])} image(s){cut} of {self._image_tokens} "
                    f"tokens and the text before them exceed max_length {self._max_length}"
                )
            problems.append(Problem.of(records[i], lost))
        good = ~(image_lost | no_answer)
        kept = fits & good[samples]
        return TokenizedRecords(
            records=[record for record, ok in zip(records, good, strict=True) if ok],
            tokens=tokens[kept],
            supervised=supervised[kept],
            counts=_sum_by(samples, kept, n)[good],
            lengths=_sum_by(samples, cost * kept, n)[good],
            truncated=(full > self._max_length)[good],
            problems=problems,
            notes=[],
        )

    def _pictures(self, record: Record) -> list[int]:
        """Count the pictures that each image of a sample becomes, its thumbnail included."""
        if self.tiling is None:
            return [1] * len(record.images)
        return [self.tiling.count(size) for size in record.sizes]


def _sum_by(samples: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sum (T,) values for each of n samples: (n,) int64."""
    return np.bincount(samples, weights=values, minlength=n).astype(np.int64)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash a tokenizer by what it does; neither its folder nor its padding state matters."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if tokenizer.is_fast:
        tokenizer("a")  # clears the padding and truncation that an earlier call has left set
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        added = {token: str(value) for token, value in tokenizer.added_tokens_encoder.items()}
        digest.update(json.dumps(added, sort_keys=True).encode())
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(tokenizer.save_vocabulary(folder)):
                digest.update(Path(file).read_bytes())
    return digest.hexdigest()
