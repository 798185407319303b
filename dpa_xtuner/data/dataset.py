"""The data set of all three stages."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mmengine import print_log
from mmengine.registry import DATASETS
from torch.utils.data import Dataset
from xtuner.registry import BUILDER
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.images import ImageProblem, load_pixels
from dpa_xtuner.data.mixture import choose
from dpa_xtuner.data.places import joined
from dpa_xtuner.data.problems import (
    NothingUsableError,
    Problem,
    enforce_skip_limit,
    list_problems,
)
from dpa_xtuner.data.sampler import NOTHING
from dpa_xtuner.data.store import open_store
from dpa_xtuner.data.templates import SampleFormat
from dpa_xtuner.data.tiles import Tiling
from dpa_xtuner.errors import DPAError
from dpa_xtuner.pictures import WHITE


@DATASETS.register_module()
class DPADataset(Dataset):
    """Data in one of three sample formats, tokenised once and memory-mapped.

    Numbers that are out of range are answered where the settings are read.

    Args:
        data_path: a file or folder of any format of :mod:`dpa_xtuner.data.formats`. A list of
            files is a mixture.
        image_folder: folder that the records' image paths are relative to; None where the format
            has no images. Of a mixture, one for all files or a list with one for each.
        tokenizer: a Hugging Face tokenizer, or a config that ``xtuner.registry.BUILDER`` builds.
        image_processor: a Hugging Face image processor, or a config of one; None where the format
            has no images.
        sample_format: "caption_text", "caption" or "chat"; see :mod:`dpa_xtuner.data.templates`.
        image_tokens: tokens that an image, or each of its tiles, takes in the sequence.
        prompt_template: name or mapping; see :func:`resolve_template`. Only "chat" reads it.
        max_length: tokens that a sample may have, those of its images counted.
        pad_image_to_square: whether images (of tiled ones, the thumbnail) are padded to a square in
            the processor's mean colour.
        skip_limit: fraction of the records that may be unusable, 0 to 1.
        held_out: records that are kept out of training, drawn by a fixed seed: the same ones in
            every format of a file and for every ``share``.
        split: "train" for all others, "held_out" for these.
        max_tiles: tiles that an image may be cut into, a thumbnail not counted; see
            :class:`Tiling`. With 1 it is not cut.
        tile_size: side of a tile in pixels, that of the visual encoder's images; read where
            ``max_tiles`` is above 1.
        share: fraction of the records that is trained on, drawn by a fixed seed: the same ones in
            every format, and a smaller share is part of a larger one.
        weights: of a mixture, how large a part of an epoch each file gives, relative to the others;
            see :mod:`dpa_xtuner.data.mixture`. None takes every sample once.
        special_tokens: what a special token in a text is, "text" or a "token"; see
            :mod:`dpa_xtuner.data.special`.
        background: colour behind transparent images.
        num_proc: processes that tokenise at the first start; any number gives the same tokens.

    Attributes:
        files: the data files, one or more.
        stores: the tokenised store of each file.
        cache_key: what its tokens were made by and what was chosen of them: the key of
            :class:`RecordTokenizer`, the settings that choose, and a hash of the chosen samples,
            of their lengths and of all tokens.
        skip_limit: as given.

    Raises:
        DPAError: the data can't be read, no sample is left, or more than ``skip_limit`` of the
            records are unusable.
    """

    def __init__(
        self,
        data_path: str | Path | Sequence[str | Path],
        image_folder: str | Path | Sequence[str | Path] | None,
        tokenizer: Any,
        image_processor: Any,
        sample_format: SampleFormat,
        image_tokens: int = 0,
        prompt_template: str | Mapping[str, Any] | None = None,
        max_length: int = 2048,
        pad_image_to_square: bool = True,
        skip_limit: float = 0.01,
        held_out: int = 0,
        split: Literal["train", "held_out"] = "train",
        max_tiles: int = 1,
        tile_size: int = 336,
        share: float = 1.0,
        weights: Sequence[float] | None = None,
        special_tokens: Literal["text", "token"] = "text",
        background: str = WHITE,
        num_proc: int = 1,
    ) -> None:
        self.files: list[str | Path] = _listed(data_path)
        folders: list[str | Path | None] = _listed(image_folder)
        self._folders = folders if len(folders) > 1 else folders * len(self.files)
        if len({os.path.realpath(file) for file in self.files}) < len(self.files):
            raise DPAError(
                f"data_path names a file twice: {', '.join(map(str, self.files))}; name it once, "
                "and have it seen more often by weights."
            )
        tiling = Tiling(max_tiles, tile_size) if max_tiles > 1 else None
        tokenize = RecordTokenizer(
            _build(tokenizer), sample_format, image_tokens, prompt_template, max_length, tiling,
            special_tokens,
        )  # fmt: skip
        self.stores = [
            open_store(file, tokenize, folder, num_proc)
            for file, folder in zip(self.files, self._folders, strict=True)
        ]
        self.image_processor = _build(image_processor)
        self.image_tokens = image_tokens
        self.pad_image_to_square = pad_image_to_square
        self.skip_limit = skip_limit
        self.background = background
        self.tiling = tokenize.tiling
        self._ends = np.cumsum([len(store) for store in self.stores])
        enforce_skip_limit(self.problems, self.records, skip_limit, self.files)
        self._refuse_empty_files()
        choice: dict[str, Any] = {"held_out": held_out, "split": split, "share": share}
        choice["weights"] = None if weights is None else list(weights)
        self._rows = self._choose(choice)
        if len(self.stores) > 1 or share < 1:
            print_log(f"{split}: {self._describe_epoch()}", logger="current")
        hashes = "".join(store.sha256 for store in self.stores)  # stays if the files are moved
        chosen = self._rows.tobytes() + self._lengths.tobytes() + hashes.encode()
        chosen_hash = hashlib.sha256(chosen).hexdigest()
        self.cache_key = tokenize.cache_key() | choice | {"chosen": chosen_hash}

    def _choose(self, choice: dict[str, Any]) -> np.ndarray:
        positions = [store.arrays["positions"] for store in self.stores]
        rows = choose(positions, [store.records for store in self.stores], **choice)
        if not len(rows):
            how = ", ".join(
                f"{name}={value}" for name, value in choice.items() if value is not None
            )
            raise DPAError(
                f"no usable sample is left of data file {', '.join(map(str, self.files))}: "
                f"{self._ends[-1]} usable samples from {self.records} records, {how}."
            )
        return rows

    def _refuse_empty_files(self) -> None:
        for file, store in zip(self.files, self.stores, strict=True):
            if not len(store):
                told = f":\n{list_problems(store.problems)}" if store.problems else "."
                message = f"data file {file} has no usable sample: {store}{told}"
                raise NothingUsableError(message, self.problems, self.files)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any] | Problem | None:
        """Load a sample.

        Args:
            index: from 0 to ``len(self) - 1``, or ``sampler.NOTHING``.

        Returns:
            None for ``NOTHING``. Otherwise what :meth:`text` gives, and "pixel_values", a list of
            (3, H, W) float32 tensors: one per image, or its tiles in order and its thumbnail; or a
            :class:`Problem` where an image is missing, broken or not of the size that its tokens
            were counted for.
        """
        if index == NOTHING:
            return None
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record_id, images = self._names(index)
        try:
            pixels = [
                tensor
                for path, size in images
                for tensor in load_pixels(
                    path, self.image_processor, self.pad_image_to_square, self.background,
                    self.tiling, size,
                )
            ]  # fmt: skip
        except ImageProblem as problem:
            file, row = self._find(index)
            position = int(self.stores[file].arrays["positions"][row])
            where = str(self.files[file])
            return Problem(record_id, str(problem), position=position, file=where)
        return self.text(index) | {"pixel_values": pixels}

    def text(self, index: int) -> dict[str, Any]:
        """Load a sample without its images.

        Args:
            index: from 0 to ``len(self) - 1``.

        Returns:
            "index", "id" (the record's, in a mixture "file: id"), "input_ids" and "labels", (T,)
            int64. An image is ``image_tokens`` times ``IMAGE_TOKEN_INDEX`` for each of its tiles
            and its thumbnail; what is not supervised is ``IGNORE_INDEX`` in the labels.
        """
        file, row = self._find(index)
        tokens, supervised = self.stores[file].tokens(row)  # (n,), an image is one of them
        record_id, images = self._names(index)
        pictures = [self.tiling.count(size) if self.tiling and size else 1 for _, size in images]
        repeats = np.ones(len(tokens), np.int64)
        repeats[tokens == IMAGE_TOKEN_INDEX] = [self.image_tokens * n for n in pictures]
        labels = np.where(supervised, tokens, IGNORE_INDEX)
        return {
            "index": index,
            "id": record_id,
            "input_ids": np.repeat(tokens, repeats).astype(np.int64),  # (T,)
            "labels": np.repeat(labels, repeats).astype(np.int64),
        }

    def check_images(self, index: int) -> Problem | None:
        """Load a sample's images as training does; return what is wrong with the first bad one."""
        sample = self[index]
        return sample if isinstance(sample, Problem) else None

    def images_of(self, index: int) -> list[str]:
        """Return the names of a sample's images."""
        return [path for path, _ in self._names(index)[1]]

    @property
    def fingerprint(self) -> str:
        """Hash of ``cache_key``: another one means other tokens, or other samples."""
        return hashlib.sha256(json.dumps(self.cache_key, sort_keys=True).encode()).hexdigest()

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
            replace(
                problem,
                record_id=self._name(file, problem.record_id),
                file=problem.file or str(self.files[file]),
            )
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
        return self._column("counts")[self._rows].tolist()

    @property
    def _lengths(self) -> np.ndarray:
        return self._column("lengths")[self._rows]

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([store.arrays[name] for store in self.stores])

    def _find(self, index: int) -> tuple[int, int]:
        """Find the number of a sample's file, and its row in that file's store."""
        row = self._rows[index]
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, int(row - self._ends[file] + len(self.stores[file]))

    def _names(self, index: int) -> tuple[str, list[tuple[str, tuple[int, int] | None]]]:
        """Read a sample's record id, and each image's full path and, if it is tiled, its size."""
        file, row = self._find(index)
        record_id, names, sizes = self.stores[file].names(row)
        paths = [joined(self._folders[file], name) for name in names]
        known: Sequence[tuple[int, int] | None] = sizes or [None] * len(paths)
        return self._name(file, record_id), list(zip(paths, known, strict=True))

    def _name(self, file: int, record_id: str) -> str:
        return record_id if len(self.stores) == 1 else f"{self.files[file]}: {record_id}"

    def _describe_epoch(self) -> str:
        parts = []
        for file, end, store in zip(self.files, self._ends, self.stores, strict=True):
            rows = self._rows[(self._rows >= end - len(store)) & (self._rows < end)]
            distinct = len(np.unique(rows))
            parts.append(f"{len(rows)} ({distinct} different ones of {len(store)}) of {file}")
        return f"{len(self)} samples an epoch: {'; '.join(parts)}"


def _listed(value: Any) -> list:
    return [value] if value is None or isinstance(value, (str, Path)) else list(value)


def _build(part: Any) -> Any:
    return BUILDER.build(part) if isinstance(part, Mapping) else part
