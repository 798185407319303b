"""Tokenised samples on disk: built once for all ranks and runs, memory-mapped from then on."""

import functools
import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock
from mmengine import print_log
from tqdm import tqdm

from dpa_xtuner.data.encode import RecordTokenizer, TokenizedRecords
from dpa_xtuner.data.formats import open_source, read_source
from dpa_xtuner.data.formats.source import Source
from dpa_xtuner.data.images import ImageProblem, read_size
from dpa_xtuner.data.places import joined
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Record
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json, whole_folder, write_json

FORMAT = 8  # raise it whenever other bytes would be written for the same input
_HEADER_READERS = 16  # threads that read image sizes; they mostly wait for the disk
_NOTED = 10  # records of a kind whose ids are kept
_BATCH_CHARACTERS = 500_000  # text tokenised at once; bounds the memory that a build takes
_named: set[Path] = set()  # the stores that this process's log names
_COLUMNS = {
    "tokens": np.int32,  # of all samples, one after the other
    "supervised": np.bool_,  # one per token
    "counts": np.int32,  # one per sample: its tokens
    "positions": np.int32,  # one per sample: its record's place in the data file
    "lengths": np.int32,  # one per sample: with its images expanded, negative without images
    "truncated": np.bool_,  # one per sample
    "names": np.uint8,  # of all samples: JSON [id, images, their sizes if read] in UTF-8
    "name_sizes": np.int32,  # one per sample: its bytes there
}


class TokenStore:
    """A finished store of S samples; pickled, it takes nothing but its folder's name.

    Args:
        folder: the store's folder.

    Attributes:
        folder: the same.
        records: number of records in the data file, usable or not.
        problems: the records that were left out, in no particular order.
        notes: what is special about usable records, by kind: how many there are, and the first ids.
        format: what kind of data file they are from.
        sha256: hash of all tokens and of which are supervised.
        arrays: the memory-mapped columns by name: "tokens" and "supervised" of all samples one
            after the other, and of shape (S,) "counts" (a sample's tokens, an image being one),
            "positions" (its record's place in the data file), "lengths" (its tokens with its images
            expanded, negative without images) and "truncated".

    Raises:
        OSError, ValueError, KeyError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_json(folder / "meta.json", "Remove its folder.")
        self.records: int = meta["records"]
        self.problems = [Problem(*fields) for fields in meta["problems"]]
        self.notes: dict[str, tuple[int, list[str]]] = {
            kind: (count, ids) for kind, (count, ids) in meta["notes"].items()
        }
        self.format: str = meta["format"]
        self.sha256: str = meta["sha256"]
        self.arrays: dict[str, np.ndarray] = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in _COLUMNS
        }
        self._token_ends = np.cumsum(self.arrays["counts"], dtype=np.int64)
        self._name_ends = np.cumsum(self.arrays["name_sizes"], dtype=np.int64)

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        """Leave the mapped arrays behind: pickled, they would be copied whole."""
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        """Count the usable samples."""
        return len(self._token_ends)

    def __str__(self) -> str:
        """Describe the store in a line: samples, truncated ones, problems by kind."""
        kinds = Counter(problem.kind for problem in self.problems).most_common()
        problems = ", ".join(f"{count} {kind}" for kind, count in kinds) or "none"
        return (
            f"{len(self)} samples from {self.records} records "
            f"({self.arrays['truncated'].sum()} truncated; left out: {problems})"
        )

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's tokens (n,) int32 and supervised (n,) bool, views of the files.

        An image is one placeholder.
        """
        end = self._token_ends[index]
        sample = slice(end - self.arrays["counts"][index], end)
        return self.arrays["tokens"][sample], self.arrays["supervised"][sample]

    def names(self, index: int) -> tuple[str, list[str], list[tuple[int, int]]]:
        """Read a sample's id, the paths of its images as written in the data, and their sizes.

        A size is (width, height) in pixels. The list of sizes is empty where images are not tiled.
        """
        end = self._name_ends[index]
        sample = slice(end - self.arrays["name_sizes"][index], end)
        record_id, images, sizes = json.loads(self.arrays["names"][sample].tobytes())
        return record_id, images, [tuple(size) for size in sizes]


def open_store(
    data_path: str | Path,
    tokenizer: RecordTokenizer,
    image_folder: str | Path | None = None,
    num_proc: int = 1,
) -> TokenStore:
    """Open the store of a data file; build it first where there is none.

    The store is keyed by the data file (path, size, time of change), by what decides the tokens
    and, where images are tiled, by the image folder, so a change of any of these leads to another
    store. Processes that start at once build it once.

    Where images are tiled, the store keeps their sizes: no image is opened at a later start, but
    for those that could not be read. If one of them can be read by now, the store is built again.

    Args:
        data_path: a data file or folder of any format of :mod:`dpa_xtuner.data.formats`.
        tokenizer: makes the tokens.
        image_folder: folder that the images' paths are relative to; read where images are tiled.
        num_proc: processes that tokenise where a store is built; any number gives the same one.

    Raises:
        OSError: the data file can't be read.
        DPAError: it is of no format that is read, broken, or changes meanwhile; or the cache can't
            be written.
    """
    source = open_source(data_path)
    files = _identify(source)
    images = os.path.realpath(image_folder or "") if tokenizer.tiling else ""
    key = json.dumps([FORMAT, files, tokenizer.cache_key(), images], sort_keys=True)
    folder = cache_root() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    store, how = _usable_store(folder), "read"
    if store is None:
        with _lock(folder):
            store = _usable_store(folder)  # another process may have built it meanwhile
            if store is None:
                with whole_folder(folder) as partial:
                    _write(source, tokenizer, images, num_proc, partial)
                    if _identify(open_source(data_path)) != files:
                        raise DPAError(f"data file {data_path} changed while it was read; retry.")
                store, how = TokenStore(folder), "built"
    if folder not in _named:
        _named.add(folder)
        print_log(
            f"{how} {store} of {data_path} ({tokenizer.sample_format}), {folder}", logger="current"
        )
    return store


def cache_root() -> Path:
    """Return ``$DPA_CACHE``, or ``~/.cache/dpa_xtuner`` if it is unset."""
    return Path(os.environ.get("DPA_CACHE") or "~/.cache/dpa_xtuner").expanduser().absolute()


def _identify(source: Source) -> list[list[Any]]:
    stats = [(os.path.realpath(file), os.stat(file)) for file in source.files]
    found: list[list[Any]] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return [[os.path.realpath(source.path), source.format], *found]


def _usable_store(folder: Path) -> TokenStore | None:
    """Return the store if it is complete and no image that it lacks has appeared since."""
    try:
        store = TokenStore(folder)
    except (OSError, ValueError, KeyError):
        return None
    for problem in store.problems:
        if problem.image is not None:
            with suppress(ImageProblem):
                read_size(problem.image)
                return None
    return store


def _lock(folder: Path) -> AcquireReturnProxy:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_suffix(".lock")).acquire()
    except OSError as error:
        raise DPAError(
            f"cannot write to the cache folder {folder.parent} ({error}); set DPA_CACHE to one "
            "that can be written."
        ) from error


def _write(
    source: Source, tokenizer: RecordTokenizer, image_folder: str, num_proc: int, folder: Path
) -> None:
    problems: list[Problem] = []
    notes: dict[str, tuple[int, list[str]]] = {}
    digest, records = hashlib.sha256(), 0
    what = tokenizer.sample_format + (", reading image sizes" if tokenizer.tiling else "")
    raw = {name: folder / f"{name}.raw" for name in _COLUMNS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in raw.items()}
        pool = stack.enter_context(ThreadPoolExecutor(_HEADER_READERS))
        progress = stack.enter_context(
            tqdm(desc=f"Tokenising {source.path.name} ({what})", unit=" records", delay=2)
        )
        batches = _batches(read_source(source))
        if tokenizer.tiling:
            measure = functools.partial(_measure, image_folder)
            batches = (list(pool.map(measure, batch)) for batch in batches)
        for tokenized in _tokenized(batches, tokenizer, num_proc):
            for name, values in _columns(tokenized).items():
                files[name].write(np.ascontiguousarray(values, _COLUMNS[name]).data)
            digest.update((2 * tokenized.tokens + tokenized.supervised).tobytes())
            problems += tokenized.problems
            for note in tokenized.notes:
                count, ids = notes.get(note.kind, (0, []))
                notes[note.kind] = (count + 1, [*ids, note.record_id] if count < _NOTED else ids)
            size = len(tokenized.records) + len(tokenized.problems)
            progress.update(size)
            records += size  # progress counts nothing where TQDM_DISABLE is set
    for name, path in raw.items():
        dtype = _COLUMNS[name]
        column = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
        np.save(folder / f"{name}.npy", column)
        path.unlink()
    meta = {
        "data": str(source.path),
        "format": source.format,
        "sample_format": tokenizer.sample_format,
        "records": records,
        "sha256": digest.hexdigest(),
        "notes": notes,
        "problems": list(map(astuple, problems)),
    }
    write_json(folder / "meta.json", meta)


def _tokenized(
    batches: Iterator[list[Record | Problem]], tokenizer: RecordTokenizer, num_proc: int
) -> Iterator[TokenizedRecords]:
    """Tokenise batches in order."""
    if num_proc == 1:
        yield from map(tokenizer, batches)
        return
    # Forked, the processes share the tokenizer and need not import XTuner again.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, fork, _begin, (tokenizer,)) as pool:
        begun: deque[Future] = deque()
        try:
            for batch in batches:
                begun.append(pool.submit(_tokenize_here, batch))
                if len(begun) > 2 * num_proc:  # else all of the data would wait in memory
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        except BrokenProcessPool:
            raise DPAError(
                f"a process that tokenises was killed, perhaps for want of memory; lower "
                f"num_proc={num_proc}."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_in_process: list[RecordTokenizer] = []  # of a process that tokenises


def _begin(tokenizer: RecordTokenizer) -> None:
    # XTuner sets it to true; a forked process would wait for threads that only its parent has.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _in_process[:] = [tokenizer]


def _tokenize_here(batch: list[Record | Problem]) -> TokenizedRecords:
    return _in_process[0](batch)


def _measure(image_folder: str, item: Record | Problem) -> Record | Problem:
    """Give a record the sizes of its images, or tell which one can't be read."""
    if isinstance(item, Problem):
        return item
    sizes = []
    for name in item.images:
        path = joined(image_folder, name)
        try:
            sizes.append(read_size(path))
        except ImageProblem as problem:
            return Problem.of(item, str(problem), path)
    return replace(item, sizes=tuple(sizes))


def _columns(tokenized: TokenizedRecords) -> dict[str, np.ndarray]:
    """Make the values that a batch adds to each column."""
    names = [
        json.dumps([record.id, record.images, record.sizes], ensure_ascii=False).encode()
        for record in tokenized.records
    ]
    has_image = np.array([bool(record.images) for record in tokenized.records], bool)
    return {
        "tokens": tokenized.tokens,
        "supervised": tokenized.supervised,
        "counts": tokenized.counts,
        "positions": np.array([record.position for record in tokenized.records], np.int32),
        "lengths": np.where(has_image, tokenized.lengths, -tokenized.lengths),
        "truncated": tokenized.truncated,
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_sizes": np.array([len(name) for name in names], np.int32),
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
