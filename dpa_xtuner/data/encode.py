"""Tokenises records in batches; an image is one placeholder token until a sample is read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.data.records import Problem, Record
from dpa_xtuner.data.templates import Piece, Special, check_view, resolve_template, to_pieces
from dpa_xtuner.data.tiles import count_tiles
from dpa_xtuner.errors import DPAError


@dataclass(frozen=True)
class Encoded:
    """A tokenised batch of N samples with T tokens in all.

    Attributes:
        records: The N records that are usable.
        tokens: (T,) int32, `IMAGE_TOKEN_INDEX` once for each image.
        supervised: (T,) bool.
        counts: (N,) int64, tokens per sample.
        lengths: (N,) int64, tokens per sample with its images expanded.
        truncated: (N,) bool, whether a sample's end was cut off.
        problems: What is wrong with the other records.
    """

    records: list[Record]
    tokens: np.ndarray
    supervised: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    problems: list[Problem]


class Encoder:
    """Turns records into tokens for one view.

    BOS stands once, at the start, where the tokenizer itself puts one and the template does not.
    (Stock `encode_fn` puts one before every turn that follows an EOS, for any tokenizer that names
    a BOS.)

    Args:
        tokenizer: A Hugging Face tokenizer, fast or slow.
        view: One of `templates.VIEWS`.
        image_tokens: Tokens that an image, or each of its tiles, takes in the sequence.
        prompt_template: Template name or mapping; the chat view needs one, the others read none.
        max_length: Tokens that a sample may have, its images expanded.
        max_tiles: Tiles that an image may be cut into; see `tiles`. Above 1, the records must tell
            the sizes of their images.
        tile_size: Side of a tile in pixels; read where `max_tiles` is above 1.

    Raises:
        DPAError: A setting is unknown or impossible.
    """

    def __init__(
        self,
        tokenizer: Any,
        view: str,
        image_tokens: int,
        prompt_template: str | Mapping[str, Any] | None,
        max_length: int,
        max_tiles: int = 1,
        tile_size: int = 336,
    ) -> None:
        self.tokenizer = tokenizer
        self.view = check_view(view)
        self.template = resolve_template(prompt_template) if view == "chat" else {}
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.max_tiles = 1 if view == "caption_text" else max_tiles
        self.tile_size = tile_size
        first = tokenizer("a").input_ids[:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []
        self._in_context = self.template.get("AS_ONE_TEXT", False) and self._adds_prefix_space()
        needs_eos = view == "chat" and not self.template.get("SUFFIX_AS_EOS", False)
        if needs_eos and tokenizer.eos_token_id is None:
            raise DPAError(
                "the tokenizer has no eos_token, which ends an answer in this prompt_template; set "
                "one, or use a template with SUFFIX and SUFFIX_AS_EOS=True."
            )
        if max_length < 2:
            raise DPAError(f"max_length is {max_length}; expected at least 2 tokens.")
        if image_tokens < 1 and view == "caption":
            raise DPAError(
                f"image_tokens is {image_tokens}; the caption view needs the number of tokens that "
                "an image takes (576 for CLIP ViT-L/14-336)."
            )
        if max_tiles < 1:
            raise DPAError(f"max_tiles is {max_tiles}; expected 1 for no tiles, or more.")
        if tile_size < 1:
            raise DPAError(f"tile_size is {tile_size}; expected the side of a tile in pixels.")

    @property
    def has_tiles(self) -> bool:
        """Whether images are cut into tiles, so that their sizes decide how many tokens they take.

        Never in the text view, which leaves the images out.
        """
        return self.max_tiles > 1

    def tiles(self, images: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int]:
        """Counts the pictures that each image of a sample becomes, its thumbnail included.

        Args:
            images: The sample's images.
            sizes: (width, height) of each; read where there are tiles.
        """
        if not self.has_tiles:
            return [1] * len(images)
        return [count_tiles(tuple(size), self.max_tiles, self.tile_size) for size in sizes]

    def facts(self) -> dict[str, Any]:
        """All that decides the tokens, other than the data; the tokenizer by its hash."""
        content = json.dumps(_tokenizer_content(self.tokenizer), sort_keys=True)
        return {
            "view": self.view,
            "prompt_template": self.template,
            "image_tokens": self.image_tokens,
            "max_length": self.max_length,
            "max_tiles": self.max_tiles,
            "tile_size": self.tile_size if self.has_tiles else None,
            "bos": self.bos,
            "eos": self.tokenizer.eos_token_id,
            "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        }

    def fingerprint(self) -> str:
        """Hashes the facts: a hexadecimal string."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def __call__(self, items: Sequence[Record | Problem]) -> Encoded:
        """Tokenises a batch.

        Args:
            items: Records; problems among them are passed on.

        Returns:
            The usable samples and the problems.
        """
        records, layouts, problems = [], [], []
        for item in items:
            if self.view == "caption_text" and isinstance(item, Record):
                item = replace(item, images=())
            pieces = item if isinstance(item, Problem) else self._lay_out(item)
            if isinstance(pieces, Problem):
                problems.append(pieces)
            else:
                records.append(item)
                layouts.append(pieces)
        if not records:
            empty = np.empty(0, np.int64)
            return Encoded([], empty.astype(np.int32), empty > 0, empty, empty, empty > 0, problems)
        return self._cut(records, *self._tokenise(layouts), problems)

    def _lay_out(self, record: Record) -> list[Piece] | Problem:
        if record.images and self.image_tokens < 1:
            raise DPAError(
                f"record {record.id} has an image, but image_tokens is {self.image_tokens}; set "
                "the number of tokens that an image takes (576 for CLIP ViT-L/14-336)."
            )
        return to_pieces(record, self.view, self.template)

    def _tokenise(self, layouts: list[list[Piece]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens (T,) int32, supervised (T,) bool and the sample of each token (T,)."""
        special = {Special.IMAGE: [IMAGE_TOKEN_INDEX], Special.EOS: [self.tokenizer.eos_token_id]}
        pieces = list(chain.from_iterable(layouts))
        texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
        alone = self._ids(texts)
        encoded = iter(self._ids_in_context(layouts, alone) if self._in_context else alone)
        rows = [special.get(piece.content) or next(encoded) for piece in pieces]
        flags = [piece.supervised for piece in pieces]
        samples = np.repeat(np.arange(len(layouts)), [len(layout) for layout in layouts])
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), np.int32, int(sizes.sum()))
        supervised, samples = np.repeat(flags, sizes), np.repeat(samples, sizes)
        if self.bos:
            starts = np.searchsorted(samples, np.arange(len(layouts)))
            without = np.flatnonzero(tokens[starts] != self.bos[0])
            tokens = np.insert(tokens, starts[without], self.bos[0])
            supervised = np.insert(supervised, starts[without], False)
            samples = np.insert(samples, starts[without], without)
        return tokens, supervised, samples

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

    def _adds_prefix_space(self) -> bool:
        """Whether a text that stands alone is tokenised as if a space stood before it."""
        alone, later = self._ids(["a", "\na"])
        return later[-len(alone) :] != alone

    def _ids_in_context(self, layouts: list[list[Piece]], alone: list[list[int]]) -> list:
        """The tokens of each text piece as they are behind what precedes it in its sample.

        Args:
            layouts: the pieces of each sample.
            alone: the tokens of each text piece where it stands alone.
        """
        specials = tuple(map(str, self.tokenizer.all_special_tokens))
        start = self.tokenizer.bos_token if self.bos else ""
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
    ) -> Encoded:
        """Truncates to `max_length` and sorts out the samples that lost what they need."""
        n = len(records)
        images = tokens == IMAGE_TOKEN_INDEX
        cost = np.ones(len(tokens), np.int64)
        tiles = [self.tiles(record.images, record.sizes) for record in records]
        cost[images] = self.image_tokens * np.fromiter(chain.from_iterable(tiles), np.int64)
        full = _sum_by(samples, cost, n)
        end = np.cumsum(cost) - (np.cumsum(full) - full)[samples]  # position after each token
        fits = end <= self.max_length
        trained = fits & supervised & (end > cost)  # a first token is predicted from nothing
        image_lost = _sum_by(samples, images & ~fits, n) > 0
        no_answer = _sum_by(samples, trained, n) == 0
        for i in np.flatnonzero(image_lost | no_answer):
            record = records[i]
            lost = self._image_reason(tiles[i]) if image_lost[i] else self._answer_reason(full[i])
            problems.append(Problem(record.id, lost))
        good = ~(image_lost | no_answer)
        kept = fits & good[samples]
        return Encoded(
            records=[record for record, ok in zip(records, good, strict=True) if ok],
            tokens=tokens[kept],
            supervised=supervised[kept],
            counts=_sum_by(samples, kept, n)[good],
            lengths=_sum_by(samples, cost * kept, n)[good],
            truncated=(full > self.max_length)[good],
            problems=problems,
        )

    def _image_reason(self, tiles: list[int]) -> str:
        cut = f" in {sum(tiles)} tiles" if self.has_tiles else ""
        return (
            f"image cut off: {len(tiles)} image(s){cut} of {self.image_tokens} tokens and the "
            f"text before them exceed max_length {self.max_length}"
        )

    def _answer_reason(self, length: int) -> str:
        return f"no supervised token: {length} tokens, max_length {self.max_length}"


def _sum_by(samples: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sums (T,) values for each of n samples: (n,) int64."""
    return np.bincount(samples, weights=values, minlength=n).astype(np.int64)


def _tokenizer_content(tokenizer: Any) -> str:
    """Hashes a tokenizer by what it does; neither its folder nor its padding state matters."""
    parts = [type(tokenizer).__name__.encode()]
    if tokenizer.is_fast:
        tokenizer("a")  # clears the padding and truncation that an earlier call has left set
        parts.append(tokenizer.backend_tokenizer.to_str().encode())
    else:
        added = {token: str(value) for token, value in tokenizer.added_tokens_encoder.items()}
        parts.append(json.dumps(added, sort_keys=True).encode())
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            parts += [Path(file).read_bytes() for file in sorted(files)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
