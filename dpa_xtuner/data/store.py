"""Tokenised samples on disk: built once for all ranks and runs, memory-mapped from then on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from mmengine import print_log
from tqdm import tqdm

from dpa_xtuner.data.encode import Encoded, Encoder
from dpa_xtuner.data.images import ImageProblem, read_size
from dpa_xtuner.data.records import Problem, Record, read_records
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder

FORMAT = 3  # raise it whenever other bytes would be written for the same input
_HEADER_READERS = 16  # threads that read image sizes; they mostly wait for the disk
_BATCH_CHARACTERS = 500_000  # text tokenised at once; bounds the memory that a build takes
_ARRAYS = {
    "tokens": np.int32,  # of all samples, one after the other
    "supervised": np.bool_,  # one per token
    "offsets": np.int64,  # where each sample begins in them, and the end
    "positions": np.int32,  # one per sample: its record's place in the data file
    "lengths": np.int32,  # one per sample: with its images expanded, negative without images
    "truncated": np.bool_,  # one per sample
    "names": np.uint8,  # of all samples: JSON [id, images, their sizes if read] in UTF-8
    "name_offsets": np.int64,  # where each sample begins in them, and the end
}


class TokenStore:
    """A finished store; cheap to pickle and to fork, as each process maps the files itself.

    Args:
        folder: The store's folder.

    Attributes:
        folder: The same.
        records: Number of records in the data file, usable or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: int = _read_meta(folder)["records"]

    def __len__(self) -> int:
        """Returns the number of usable samples."""
        return len(self.arrays["lengths"])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the mapped arrays behind: pickled, they would be copied whole."""
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The memory-mapped arrays by name; see `_ARRAYS`."""
        return {name: _map(self.folder / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}

    @functools.cached_property
    def problems(self) -> list[Problem]:
        """The records that were left out, in no particular order."""
        return [Problem(*pair) for pair in json.loads((self.folder / "problems.json").read_text())]

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sample's tokens (n,) int32 and supervised (n,) bool, views of the files.

        An image is one placeholder.
        """
        start, end = self.arrays["offsets"][index : index + 2]
        return self.arrays["tokens"][start:end], self.arrays["supervised"][start:end]

    def names(self, index: int) -> tuple[str, list[str], list[tuple[int, int]]]:
        """Returns a sample's id, the paths of its images as written in the data, and their sizes.

        A size is (width, height) in pixels. The list of sizes is empty where images are not tiled.
        """
        start, end = self.arrays["name_offsets"][index : index + 2]
        record_id, images, sizes = json.loads(self.arrays["names"][start:end].tobytes())
        return record_id, images, [tuple(size) for size in sizes]


def open_store(
    data_path: str | Path, encoder: Encoder, image_folder: str | Path | None = None
) -> TokenStore:
    """Opens the store of a data file, building it first where there is none.

    The store is keyed by the data file (path, size, time of change), by the encoder's content and,
    where images are tiled, by the image folder, so a change of any of these leads to another store.
    Processes that start at once build it once.

    Where images are tiled, the store keeps their sizes: no image is opened at a later start, but
    for those that could not be read. If one of them can be read by now, the store is built again.

    Args:
        data_path: LLaVA-format JSON or JSON lines.
        encoder: Tokenizer, view, template, lengths and tiles.
        image_folder: Folder that the images' paths are relative to; needed where images are tiled.

    Returns:
        The store.

    Raises:
        DPAError: The data file cannot be read or changes meanwhile, or the cache cannot be written.
    """
    source = _identify(data_path)
    if image_folder is not None:
        image_folder = os.path.realpath(image_folder)
    images = image_folder if encoder.has_tiles else None
    key = hashlib.sha256(
        f"{FORMAT} {source} {encoder.fingerprint()} {images}".encode()
    ).hexdigest()[:32]
    folder = cache_root() / "tokens" / key
    how = "read"
    if not _is_usable(folder):
        with FileLock(_lock_file(folder)):
            if not _is_usable(folder):
                _build(Path(data_path), source, encoder, image_folder, folder)
                how = "built"
    store = TokenStore(folder)
    print_log(
        f"{how} {describe(store)} of {data_path} ({encoder.view}), {folder}", logger="current"
    )
    return store


def cache_root() -> Path:
    """Returns `$DPA_CACHE`, or `~/.cache/dpa_xtuner` where it is unset."""
    return Path(os.environ.get("DPA_CACHE") or "~/.cache/dpa_xtuner").expanduser().absolute()


def describe(store: TokenStore) -> str:
    """Returns one line: samples, truncated ones, problems by kind."""
    kinds = Counter(problem.kind for problem in store.problems).most_common()
    problems = ", ".join(f"{count} {kind}" for kind, count in kinds) or "none"
    truncated = int(store.arrays["truncated"].sum())
    return (
        f"{len(store)} samples from {store.records} records ({truncated} truncated; left out: "
        f"{problems})"
    )


def enforce_skip_limit(
    problems: list[Problem], total: int, limit: float, files: Sequence[str | Path]
) -> None:
    """Stops where too many records cannot be used.

    Args:
        problems: What is wrong with them.
        total: Number of records they were found among.
        limit: The share that may be left out, 0 to 1.
        files: Where the records are, for the message.

    Raises:
        DPAError: There are more; the message lists the counts and the first ids of each kind.
    """
    if len(problems) > limit * total:
        raise DPAError(
            f"{len(problems)} of {total} records of {', '.join(map(str, files))} cannot be used, "
            f"more than skip_limit={limit:g} allows; mend or remove them, or raise skip_limit:\n"
            f"{list_problems(problems)}"
        )


def list_problems(problems: Iterable[Problem]) -> str:
    """Returns a line for each kind of problem: its count, the first 10 ids, the first details."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda pair: -len(pair[1])):
        ids = ", ".join(problem.record_id for problem in found[:10])
        more = ", ..." if len(found) > 10 else ""
        lines.append(f"{len(found):>8}  {kind}: {ids}{more}")
        if found[0].reason != kind:
            lines.append(f"{'':>10}first: {found[0].reason}")
    return "\n".join(lines)


def _identify(data_path: str | Path) -> str:
    try:
        stat = os.stat(data_path)
    except OSError as error:
        raise DPAError(
            f"data file {data_path} cannot be read ({error}); check `data_path`."
        ) from error
    return json.dumps([os.path.realpath(data_path), stat.st_size, stat.st_mtime_ns])


def _lock_file(folder: Path) -> Path:
    path = folder.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise DPAError(
            f"cannot write to the cache folder {path.parent} ({error}); set DPA_CACHE to one that "
            "can be written."
        ) from error
    return path


def _build(
    data_path: Path, source: str, encoder: Encoder, image_folder: str | None, folder: Path
) -> None:
    """Builds a store beside its place and moves it there; the caller holds its lock."""
    with whole_folder(folder) as part:
        _write(data_path, encoder, image_folder, part)
        if _identify(data_path) != source:
            raise DPAError(f"data file {data_path} changed while it was read; start again.")


def _write(data_path: Path, encoder: Encoder, image_folder: str | None, part: Path) -> None:
    problems: list[Problem] = []
    unread: list[str] = []
    ends = {"offsets": 0, "name_offsets": 0}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((part / f"{name}.bin").open("wb")) for name in _ARRAYS}
        for name in ends:
            _append(files[name], np.zeros(1, _ARRAYS[name]))
        tiles = ", reading image sizes" if encoder.has_tiles else ""
        progress = stack.enter_context(
            tqdm(desc=f"Tokenising {data_path.name} ({encoder.view}{tiles})", unit=" records")
        )
        pool = stack.enter_context(ThreadPoolExecutor(_HEADER_READERS))
        for batch in _batches(read_records(data_path)):
            if encoder.has_tiles:
                batch, paths = _measure(batch, image_folder, pool)
                unread += paths
            encoded = encoder(batch)
            for name, values in _columns(encoded).items():
                if name in ends:
                    values = ends[name] + np.cumsum(values)
                    ends[name] = int(values[-1]) if len(values) else ends[name]
                _append(files[name], values.astype(_ARRAYS[name], copy=False))
            problems += encoded.problems
            progress.update(len(batch))
        meta = {
            "data": str(data_path),
            "view": encoder.view,
            "records": progress.n,
            "sizes": {name: file.tell() for name, file in files.items()},
        }
    _write_json(part / "problems.json", [[p.record_id, p.reason] for p in problems])
    _write_json(part / "unread.json", unread)
    _write_json(part / "meta.json", meta)


def _measure(
    batch: list[Record | Problem], image_folder: str | None, pool: ThreadPoolExecutor
) -> tuple[list[Record | Problem], list[str]]:
    """Gives records the sizes of their images; returns them, and the paths that can't be read."""

    def measure(item: Record | Problem) -> tuple[Record | Problem, str | None]:
        if isinstance(item, Problem):
            return item, None
        if item.images and image_folder is None:
            raise DPAError(f"record {item.id} has an image: set image_folder.")
        sizes = []
        for name in item.images:
            path = os.path.join(image_folder, name)
            try:
                sizes.append(read_size(path))
            except ImageProblem as problem:
                return Problem(item.id, str(problem)), path
        return replace(item, sizes=tuple(sizes)), None

    measured = list(pool.map(measure, batch))
    return [item for item, _ in measured], [path for _, path in measured if path]


def _columns(encoded: Encoded) -> dict[str, np.ndarray]:
    """Returns what a batch adds to each array; to the offsets, the sizes that are to be summed."""
    names = [
        json.dumps([record.id, record.images, record.sizes], ensure_ascii=False).encode()
        for record in encoded.records
    ]
    has_image = np.array([bool(record.images) for record in encoded.records], bool)
    return {
        "tokens": encoded.tokens,
        "supervised": encoded.supervised,
        "offsets": encoded.counts,
        "positions": np.array([record.position for record in encoded.records], np.int32),
        "lengths": np.where(has_image, encoded.lengths, -encoded.lengths),
        "truncated": encoded.truncated,
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_offsets": np.fromiter(map(len, names), np.int64, len(names)),
    }


def _batches(items: Iterable[Record | Problem]) -> Iterator[list[Record | Problem]]:
    batch: list[Record | Problem] = []
    characters = 0
    for item in items:
        batch.append(item)
        turns = item.turns if isinstance(item, Record) else ()
        characters += 100 + sum(len(human) + len(gpt) for human, gpt in turns)
        if characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_usable(folder: Path) -> bool:
    """Tells whether a store is there, whole, and no image that it lacks has appeared since."""
    try:
        sizes = _read_meta(folder)["sizes"]
        unread = json.loads((folder / "unread.json").read_text())
        whole = all((folder / f"{name}.bin").stat().st_size == sizes[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError):
        return False
    return whole and not any(map(_is_readable, unread))


def _is_readable(path: str) -> bool:
    try:
        read_size(path)
    except ImageProblem:
        return False
    return True


def _read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


def _map(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _append(file: IO[bytes], values: np.ndarray) -> None:
    file.write(np.ascontiguousarray(values).data)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
