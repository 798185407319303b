"""Writes files and folders completely or not at all; reads, locks and hashes them."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dpa_xtuner.errors import DPAError


def prepare_to_write(file: Path) -> None:
    """Make a file's folder, before the long work whose result the file will hold.

    Raises:
        DPAError: the file can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise DPAError(f"{file} can't be written: {file.parent}: {error.strerror}.") from None
    if file.is_dir():
        raise DPAError(f"{file} can't be written: it is a folder. Give the name of a file.")


def write_text(path: Path, content: str, writer: str = "") -> None:
    """Write a text file completely or not at all.

    Args:
        path: the file.
        content: its text.
        writer: name of this process, where several may write the file at once.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
    partial.write_text(content, encoding="utf-8")
    move_into_place(partial, path)


def write_json(path: Path, content: dict, writer: str = "") -> None:
    """Write a JSON file completely or not at all; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n", writer)


def read_json(path: Path, advice: str) -> dict:
    """Read a JSON file; return an empty dict if there is none.

    Args:
        path: the file.
        advice: what to do if it is broken, for the message.

    Raises:
        DPAError: it is broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:  # neither JSON nor UTF-8
        raise DPAError(f"{path} is broken ({error}). {advice}") from None
    if not isinstance(content, dict):
        raise DPAError(f"{path} is broken (no object in it). {advice}")
    return content


def acquire_lock(path: Path, taken: str) -> FileLock:
    """Acquire a lock for this process; it ends with the process, however that ends.

    Args:
        path: the lock's file. It stays: if it were removed, two processes could hold the lock.
        taken: the message if another process holds the lock.

    Raises:
        DPAError: another process holds the lock.
    """
    prepare_to_write(path)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DPAError(taken) from None
    return lock


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write to, and rename it to ``folder`` at the end.

    It is renamed when all of it is on disk. After a failure it is removed at once; after a killed
    process, at the next try.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_into_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_into_place(partial: Path, final: Path) -> None:
    """Flush a written file or folder to disk, then give it its name."""
    files = [partial] if partial.is_file() else [p for p in partial.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = final.with_name(f".{final.name}.old.partial")
    if final.is_dir():  # a folder can't be replaced in one step, and must never be half there
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


@functools.cache
def file_sha256(path: str | Path) -> str:
    """Hash (SHA-256) a file's content; each file is read once in a process."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
