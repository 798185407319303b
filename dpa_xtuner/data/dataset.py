"""The data set of all three stages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from torch.utils.data import Dataset
from xtuner.registry import BUILDER
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.encode import Encoder
from dpa_xtuner.data.images import ImageProblem, load_pixels
from dpa_xtuner.data.records import Problem
from dpa_xtuner.data.store import TokenStore, describe, enforce_skip_limit, open_store
from dpa_xtuner.errors import DPAError


@dataclass(frozen=True, slots=True)
class Skipped:
    """Stands in a batch for a sample that cannot be loaded.

    Attributes:
        id: The record's id.
        reason: "kind: details", as in `Problem`.
    """

    id: str
    reason: str


@DATASETS.register_module()
class DPADataset(Dataset):
    """LLaVA-format data in one of three views, tokenised once and memory-mapped.

    Args:
        data_path: JSON array or JSON lines in LLaVA format; see `read_records`.
        image_folder: Folder that the records' image paths are relative to; None where the view has
            no images.
        tokenizer: A Hugging Face tokenizer, or a config that `xtuner.registry.BUILDER` builds.
        image_processor: A Hugging Face image processor, or a config of one; None where the view has
            no images.
        view: "caption_text", "caption" or "chat"; see `templates`.
        image_tokens: Tokens that an image takes in the sequence.
        prompt_template: Name or mapping; see `resolve_template`. Only the chat view reads it.
        max_length: Tokens that a sample may have, those of its images counted.
        pad_image_to_square: Whether images are padded to a square in the processor's mean colour.
        skip_limit: Share of the records that may be unusable, 0 to 1.
        held_out: Records that are kept out of training, drawn by a fixed seed: the same ones in
            every view of a file.
        part: "train" for all others, "held_out" for these.

    Attributes:
        store: The tokenised store.
        encoding: What its tokens were made by; see `Encoder.facts`.
        image_folder: As given.
        skip_limit: As given.

    Raises:
        DPAError: A setting is wrong, the data cannot be read, or more than `skip_limit` of the
            records are unusable.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_folder: str | Path | None,
        tokenizer: Any,
        image_processor: Any,
        view: str,
        image_tokens: int = 0,
        prompt_template: str | Mapping[str, Any] | None = None,
        max_length: int = 2048,
        pad_image_to_square: bool = True,
        skip_limit: float = 0.01,
        held_out: int = 0,
        part: str = "train",
    ) -> None:
        if not 0 <= skip_limit <= 1:
            raise DPAError(f"skip_limit is {skip_limit}; expected a share from 0 to 1.")
        encoder = Encoder(_build(tokenizer), view, image_tokens, prompt_template, max_length)
        self.encoding = encoder.facts()
        self.store = open_store(data_path, encoder)
        self.image_folder = image_folder
        self.image_tokens = image_tokens
        self.pad_image_to_square = pad_image_to_square
        self.skip_limit = skip_limit
        self._rows = _split(self.store, held_out, part)
        enforce_skip_limit(self.store.problems, self.store.records, skip_limit)
        if not len(self._rows):
            raise DPAError(
                f"data file {data_path} has no usable sample: {describe(self.store)}; "
                f"held_out={held_out}."
            )
        if (self._lengths > 0).any() and (image_folder is None or image_processor is None):
            raise DPAError(
                f"the {view} view of {data_path} has images: set image_folder (is {image_folder}) "
                f"and image_processor (is {image_processor})."
            )
        self.image_processor = _build(image_processor)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        """Loads a sample.

        Args:
            index: From 0 to `len(self) - 1`.

        Returns:
            What `text` gives, and "pixel_values", a list of (3, H, W) float32 tensors, one per
            image; or a `Skipped` where an image is missing or broken.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            pixels = [
                load_pixels(path, self.image_processor, self.pad_image_to_square)
                for path in self.image_paths(index)
            ]
        except ImageProblem as problem:
            return Skipped(self.record_id(index), str(problem))
        return self.text(index) | {"pixel_values": pixels}

    def text(self, index: int) -> dict[str, Any]:
        """Loads a sample without its images.

        Args:
            index: From 0 to `len(self) - 1`.

        Returns:
            "index", "id" (str), "input_ids" and "labels" ((T,) int64; each image is `image_tokens`
            times `IMAGE_TOKEN_INDEX`, what is not supervised is `IGNORE_INDEX` in the labels).
        """
        tokens, supervised = self.store.tokens(self._rows[index])
        repeats = np.where(tokens == IMAGE_TOKEN_INDEX, self.image_tokens, 1)
        labels = np.where(supervised, tokens, IGNORE_INDEX)
        return {
            "index": index,
            "id": self.record_id(index),
            "input_ids": np.repeat(tokens, repeats).astype(np.int64),
            "labels": np.repeat(labels, repeats).astype(np.int64),
        }

    def record_id(self, index: int) -> str:
        """Returns a sample's record id."""
        return self.store.names(self._rows[index])[0]

    def image_paths(self, index: int) -> list[str]:
        """Returns the full paths of a sample's images."""
        _, names = self.store.names(self._rows[index])
        return [os.path.join(self.image_folder, name) for name in names]

    @property
    def problems(self) -> list[Problem]:
        """The records that were left out when the store was built."""
        return self.store.problems

    @property
    def modality_length(self) -> list[int]:
        """Tokens per sample with images expanded; negative for samples without images."""
        return self._lengths.tolist()

    @property
    def length(self) -> list[int]:
        """Tokens per sample with images expanded."""
        return np.abs(self._lengths).tolist()

    @property
    def text_length(self) -> list[int]:
        """Tokens per sample, an image counted as one."""
        return np.diff(self.store.arrays["offsets"])[self._rows].tolist()

    @property
    def truncated(self) -> int:
        """Number of samples whose end is cut off."""
        return int(self.store.arrays["truncated"][self._rows].sum())

    @property
    def _lengths(self) -> np.ndarray:
        return self.store.arrays["lengths"][self._rows]


def _split(store: TokenStore, held_out: int, part: str) -> np.ndarray:
    if part not in ("train", "held_out"):
        raise DPAError(f"part is {part!r}; expected 'train' or 'held_out'.")
    if held_out < 0:
        raise DPAError(f"held_out is {held_out}; expected a number of samples, 0 for none.")
    # Drawn among the file's records, so that views which can't use the same ones agree.
    drawn = np.random.default_rng(0).permutation(store.records)[:held_out]
    return np.flatnonzero(np.isin(store.arrays["positions"], drawn) == (part == "held_out"))


def _build(part: Any) -> Any:
    return BUILDER.build(part) if isinstance(part, Mapping) else part
