"""The key of a cached answer or score: a short hash of everything it depends on."""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import xxhash

from dpa_xtuner import __version__

_PACKAGES = ("opencompass", "ms-vlmeval", "transformers")


def cache_key(files: Iterable[Path], *settings: object) -> str:
    """Hash names and contents of files, settings, and the versions of this and other packages.

    The hash does not see a change of code within a version: use ``tools/eval.py --fresh`` then.

    Returns:
        Eight hexadecimal digits.
    """
    contents = [(path.name, file_digest(path, "xxh3_64")) for path in files]
    versions = [__version__, *map(version, _PACKAGES)]
    return xxhash.xxh3_64(json.dumps([contents, settings, versions]).encode()).hexdigest()[:8]


def module_files(module: str | None) -> list[Path]:
    """Find the file of a user's module, so that a change in it changes the key."""
    spec = importlib.util.find_spec(module) if module else None
    return [Path(spec.origin)] if spec and spec.origin else []


def file_digest(path: str | Path, algorithm: str = "md5") -> str:
    """Hash a file's content, in hexadecimal digits: ``md5`` or ``xxh3_64``, which is faster.

    A process reads each file once, unless its size or time of change differs.
    """
    state = Path(path).stat()
    return _digest(str(path), algorithm, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest(path: str, algorithm: str, size: int, changed: int) -> str:
    digest = hashlib.md5() if algorithm == "md5" else xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
