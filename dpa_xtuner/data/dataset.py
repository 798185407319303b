"""The data set of all three stages."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import print_log
from mmengine.registry import DATASETS
from torch.utils.data import Dataset
from xtuner.registry import BUILDER
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.encode import Encoder
from dpa_xtuner.data.images import ImageProblem, load_image, load_pixels, load_tiles
from dpa_xtuner.data.mixture import check_choice, choose
from dpa_xtuner.data.records import Problem
from dpa_xtuner.data.sampler import NOTHING
from dpa_xtuner.data.store import describe, enforce_skip_limit, open_store
from dpa_xtuner.data.tiles import count_tiles
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
        data_path: JSON array or JSON lines in LLaVA format; see `read_records`. A list of files is
            a mixture.
        image_folder: Folder that the records' image paths are relative to; None where the view has
            no images. Of a mixture, one for all files or a list with one for each.
        tokenizer: A Hugging Face tokenizer, or a config that `xtuner.registry.BUILDER` builds.
        image_processor: A Hugging Face image processor, or a config of one; None where the view has
            no images.
        view: "caption_text", "caption" or "chat"; see `templates`.
        image_tokens: Tokens that an image, or each of its tiles, takes in the sequence.
        prompt_template: Name or mapping; see `resolve_template`. Only the chat view reads it.
        max_length: Tokens that a sample may have, those of its images counted.
        pad_image_to_square: Whether images (of tiled ones, the thumbnail) are padded to a square in
            the processor's mean colour.
        skip_limit: Share of the records that may be unusable, 0 to 1.
        held_out: Records that are kept out of training, drawn by a fixed seed: the same ones in
            every view of a file and for every `share`.
        part: "train" for all others, "held_out" for these.
        max_tiles: Tiles that an image may be cut into, a thumbnail not counted; see `tiles`. With 1
            it is not cut.
        tile_size: Side of a tile in pixels, that of the visual encoder's images; read where
            `max_tiles` is above 1.
        share: Share of the records that is trained on, drawn by a fixed seed: the same ones in
            every view, and a smaller share is part of a larger one.
        weights: Of a mixture, how large a part of an epoch each file gives, relative to the others;
            see `mixture`. None takes every sample once.

    Attributes:
        stores: The tokenised store of each file.
        encoding: What its tokens were made by and what was chosen of them: the facts of `Encoder`,
            the settings that choose, and a hash of the chosen samples with their lengths.
        skip_limit: As given.

    Raises:
        DPAError: A setting is wrong, the data cannot be read, or more than `skip_limit` of the
            records are unusable.
    """

    def __init__(
        self,
        data_path: str | Path | Sequence[str | Path],
        image_folder: str | Path | Sequence[str | Path] | None,
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
        max_tiles: int = 1,
        tile_size: int = 336,
        share: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not 0 <= skip_limit <= 1:
            raise DPAError(f"skip_limit is {skip_limit}; expected a share from 0 to 1.")
        self._files, self._folders = _pair(data_path, image_folder)
        weights = None if weights is None else list(weights)
        choice = {"held_out": held_out, "part": part, "share": share, "weights": weights}
        check_choice(len(self._files), **choice)
        encoder = Encoder(
            _build(tokenizer), view, image_tokens, prompt_template, max_length, max_tiles, tile_size
        )
        self.stores = [
            open_store(file, encoder, folder)
            for file, folder in zip(self._files, self._folders, strict=True)
        ]
        self.image_tokens = image_tokens
        self.pad_image_to_square = pad_image_to_square
        self.skip_limit = skip_limit
        self.max_tiles = encoder.max_tiles
        self.tile_size = tile_size
        self._ends = np.cumsum([len(store) for store in self.stores])
        enforce_skip_limit(self.problems, self.records, skip_limit, self._files)
        self._check_files(view, image_processor)
        positions = [store.arrays["positions"] for store in self.stores]
        self._rows = choose(positions, [store.records for store in self.stores], **choice)
        if not len(self._rows):
            raise DPAError(
                f"no usable sample is left of data file {', '.join(map(str, self._files))}: "
                f"{self._ends[-1]} usable samples from {self.records} records, {choice}."
            )
        self.image_processor = _build(image_processor)
        if len(self.stores) > 1 or share < 1:
            print_log(f"{part}: {self._describe_epoch()}", logger="current")
        chosen = hashlib.sha256(self._rows.tobytes() + self._lengths.tobytes()).hexdigest()
        self.encoding = encoder.facts() | choice | {"chosen": chosen}

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped | None:
        """Loads a sample.

        Args:
            index: From 0 to `len(self) - 1`, or `sampler.NOTHING`.

        Returns:
            None for `NOTHING`. Otherwise what `text` gives, and "pixel_values", a list of (3, H, W)
            float32 tensors: one per image, or its tiles in order and its thumbnail; or a `Skipped`
            where an image is missing, broken or not of the size that its tokens were counted for.
        """
        if index == NOTHING:
            return None
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            pixels = [tensor for image in self._images(index) for tensor in self._load(*image)]
        except ImageProblem as problem:
            return Skipped(self.record_id(index), str(problem))
        return self.text(index) | {"pixel_values": pixels}

    def text(self, index: int) -> dict[str, Any]:
        """Loads a sample without its images.

        Args:
            index: From 0 to `len(self) - 1`.

        Returns:
            "index", "id" (str), "input_ids" and "labels" ((T,) int64; each image is `image_tokens`
            times `IMAGE_TOKEN_INDEX` for each of its tiles and its thumbnail, what is not
            supervised is `IGNORE_INDEX` in the labels).
        """
        file, row = self._find(index)
        tokens, supervised = self.stores[file].tokens(row)
        images = tokens == IMAGE_TOKEN_INDEX
        repeats = np.ones(len(tokens), np.int64)
        repeats[images] = self.image_tokens
        if self.max_tiles > 1:
            _, _, sizes = self.stores[file].names(row)
            tiles = [count_tiles(size, self.max_tiles, self.tile_size) for size in sizes]
            repeats[images] *= np.array(tiles, np.int64)
        labels = np.where(supervised, tokens, IGNORE_INDEX)
        return {
            "index": index,
            "id": self.record_id(index),
            "input_ids": np.repeat(tokens, repeats).astype(np.int64),
            "labels": np.repeat(labels, repeats).astype(np.int64),
        }

    def check_images(self, index: int) -> Problem | None:
        """Opens and decodes a sample's images; returns what is wrong with the first bad one."""
        try:
            for path, size in self._images(index):
                load_image(path, self.pad_image_to_square, size)
        except ImageProblem as problem:
            return Problem(self.record_id(index), str(problem))
        return None

    def record_id(self, index: int) -> str:
        """Returns a sample's record id; in a mixture, "file: id"."""
        file, row = self._find(index)
        return self._name(file, self.stores[file].names(row)[0])

    @property
    def fingerprint(self) -> str:
        """Hashes `encoding`: another one means other tokens, or other samples."""
        return hashlib.sha256(json.dumps(self.encoding, sort_keys=True).encode()).hexdigest()

    @property
    def distinct(self) -> list[int]:
        """The index of each sample, once where a mixture's weights repeat it."""
        return np.unique(self._rows, return_index=True)[1].tolist()

    @property
    def records(self) -> int:
        """Number of records in the data files, usable or not."""
        return sum(store.records for store in self.stores)

    @property
    def problems(self) -> list[Problem]:
        """The records that were left out when the stores were built."""
        return [
            replace(problem, record_id=self._name(file, problem.record_id))
            for file, store in enumerate(self.stores)
            for problem in store.problems
        ]

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
        counts = [np.diff(store.arrays["offsets"]) for store in self.stores]
        return np.concatenate(counts)[self._rows].tolist()

    @property
    def truncated(self) -> int:
        """Number of samples whose end is cut off, each counted once."""
        return int(self._column("truncated")[np.unique(self._rows)].sum())

    @property
    def _lengths(self) -> np.ndarray:
        return self._column("lengths")[self._rows]

    def _check_files(self, view: str, image_processor: Any) -> None:
        for file, folder, store in zip(self._files, self._folders, self.stores, strict=True):
            if not len(store):
                raise DPAError(f"data file {file} has no usable sample: {describe(store)}.")
            has_images = (store.arrays["lengths"] > 0).any()
            if has_images and (folder is None or image_processor is None):
                raise DPAError(
                    f"the {view} view of {file} has images: set image_folder (is {folder}) and "
                    f"image_processor (is {image_processor})."
                )

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([store.arrays[name] for store in self.stores])

    def _find(self, index: int) -> tuple[int, int]:
        """Returns the place of a sample's file, and of the sample in its store."""
        row = self._rows[index]
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, int(row - self._ends[file] + len(self.stores[file]))

    def _describe_epoch(self) -> str:
        parts = []
        for file, end, store in zip(self._files, self._ends, self.stores, strict=True):
            rows = self._rows[(self._rows >= end - len(store)) & (self._rows < end)]
            distinct = len(np.unique(rows))
            parts.append(f"{len(rows)} ({distinct} different ones of {len(store)}) of {file}")
        return f"{len(self)} samples an epoch: {'; '.join(parts)}"

    def _name(self, file: int, record_id: str) -> str:
        return record_id if len(self.stores) == 1 else f"{self._files[file]}: {record_id}"

    def _images(self, index: int) -> list[tuple[str, tuple[int, int] | None]]:
        """Returns the full path of each image of a sample and its size, None where not needed."""
        file, row = self._find(index)
        _, names, sizes = self.stores[file].names(row)
        paths = [os.path.join(self._folders[file], name) for name in names]
        return list(zip(paths, sizes or [None] * len(paths), strict=True))

    def _load(self, path: str, size: tuple[int, int] | None) -> list[torch.Tensor]:
        if size is None:
            return [load_pixels(path, self.image_processor, self.pad_image_to_square)]
        return load_tiles(
            path,
            self.image_processor,
            self.pad_image_to_square,
            self.max_tiles,
            self.tile_size,
            size,
        )


def _pair(data_path: Any, image_folder: Any) -> tuple[list[str | Path], list[str | Path | None]]:
    """Returns the data files and the image folder of each."""
    files = list(data_path) if isinstance(data_path, (list, tuple)) else [data_path]
    one_for_each = isinstance(image_folder, (list, tuple))
    folders = list(image_folder) if one_for_each else [image_folder] * len(files)
    if not files or len(files) != len(folders):
        raise DPAError(
            f"data_path has {len(files)} files and image_folder {len(folders)} folders; expected "
            "as many of each, at least one, or a single folder for all files."
        )
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise DPAError(
            f"data_path names a file twice: {', '.join(map(str, files))}; name it once, and have "
            "it seen more often by `weights`."
        )
    return files, folders


def _build(part: Any) -> Any:
    return BUILDER.build(part) if isinstance(part, Mapping) else part
