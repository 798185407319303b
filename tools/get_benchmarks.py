"""Fetch the benchmarks' data files, and say what is missing.

Usage: python tools/get_benchmarks.py [NAMES ... | all | text] [--data DIR] [--list]

A file appears under its name when it is whole and its md5 is right. What was fetched before a stop
is kept in NAME.partial and gone on with. Text-only data sets come in archives, which are unpacked.
Without a network, put the files that are listed into the folder by other means, and call it again.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("DPA_WITHOUT_XTUNER", "1")  # spares seconds

from tqdm import tqdm

from dpa_xtuner.errors import DPAError, check_installed, cli_errors
from dpa_xtuner.evaluation import text_benchmarks as text
from dpa_xtuner.evaluation.benchmarks import (
    Benchmark,
    DataFile,
    file_md5,
    find_benchmarks,
    missing_files,
)
from dpa_xtuner.evaluation.text_benchmarks import Archive
from dpa_xtuner.files import move_into_place

TIMEOUT = 30  # seconds without a byte


def main() -> None:
    """Parse arguments, fetch, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=["all"],
        help="benchmarks, all (default) for those with pictures, text",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("LMUData", "data/benchmarks")),  # noqa: SIM112, VLMEvalKit's
        help="folder of the files; $LMUData or data/benchmarks by default",
    )
    parser.add_argument("--list", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    with cli_errors():
        missing = get(args.names, args.data, fetch_them=not args.list)
    sys.exit(1 if missing else 0)


@dataclass(frozen=True)
class Item:
    """What one of the benchmarks is read from.

    Attributes:
        file: What is fetched.
        path: What has to be there: the file itself, or the folder of an archive.
        problem: Why it can't be used; empty if it can.
    """

    file: DataFile | Archive
    path: Path
    problem: str


def get(names: list[str], folder: Path, fetch_them: bool = True) -> bool:
    """Fetch what is not there, unpack archives, and print what there is.

    Args:
        names: Of benchmarks; "all" and "text" stand for those with pictures and without.
        folder: Of the data files; made where it is not there.
        fetch_them: Whether to fetch, and to unpack.

    Returns:
        Whether something is missing.

    Raises:
        DPAError: A name is unknown.
    """
    texts, names = text.choose(names)
    benchmarks = find_benchmarks(names, also=("text", *text.TEXT_BENCHMARKS))
    if texts:
        check_installed("eval", "opencompass")
    refused: dict[str, str] = {}
    if fetch_them:
        lacking = [item for item in survey(benchmarks, texts, folder) if item.problem]
        refused = fetch_missing(lacking, folder)
        refused |= unpack_missing(
            [item for item in lacking if isinstance(item.file, Archive)], folder
        )
    items = survey(benchmarks, texts, folder)
    for item in items:
        print(f"{'missing' if item.problem else 'here':8} {item.file.name}")
        if item.problem:
            print(f"         put it at {(folder / item.file.name).resolve()}")
            print(f"         md5       {item.file.md5 or 'any'}")
            print(f"         from      {item.file.url or 'nowhere: it is made on this machine'}")
            print(f"         problem   {refused.get(item.file.name, item.problem)}")
    here = sum(not item.problem for item in items)
    print(f"{here} of {len(items)} files are in {folder.resolve()}.")
    return here < len(items)


def survey(
    benchmarks: list[Benchmark], texts: list[text.TextBenchmark], folder: Path
) -> list[Item]:
    """List what benchmarks are read from, and what is wrong with it."""
    problems = {item.file: item.problem for item in missing_files(benchmarks, folder)}
    items = [
        Item(file, folder / file.name, problems.get(file, ""))
        for benchmark in benchmarks
        for file in benchmark.files
    ]
    for archive, lacking in text.archives(texts, folder).items():
        path, problem = folder / archive.folder, ""
        if lacking:
            problem = f"{path} is not there; this command unpacks a zip at this place"
        if lacking and path.exists():
            problem = f"{path} lacks {lacking[0].relative_to(path)}; move it away and try again"
        items.append(Item(archive, path, problem))
    return items


def fetch_missing(items: list[Item], folder: Path) -> dict[str, str]:
    """Fetch what is not there: what is there and wrong is the user's to move away.

    Returns:
        Why a file could not be fetched, by its name.
    """
    refused: dict[str, str] = {}
    unreachable: dict[str, str] = {}  # hosts: each is waited for once
    for item in items:
        path, host = folder / item.file.name, urlsplit(item.file.url).netloc
        if item.path.exists() or path.exists() or not item.file.url:
            continue
        if host in unreachable:
            refused[item.file.name] = unreachable[host]
            continue
        try:
            fetch(item.file, path)
        except (OSError, http.client.HTTPException, DPAError) as error:
            reason = str(getattr(error, "reason", "") or error)
            refused[item.file.name] = reason
            if isinstance(error, urllib.error.URLError) and not hasattr(error, "code"):
                unreachable[host] = reason
    return refused


def unpack_missing(items: list[Item], folder: Path) -> dict[str, str]:
    """Unpack archives that are there where their folders are not.

    Returns:
        Why an archive could not be unpacked, by its name.
    """
    refused: dict[str, str] = {}
    for item in items:
        if (folder / item.file.name).is_file() and not item.path.exists():
            try:
                text.unpack(item.file, folder)
            except (OSError, DPAError) as error:
                refused[item.file.name] = str(error)
    return refused


def fetch(file: DataFile | Archive, path: Path) -> None:
    """Fetch a file, going on with what an earlier call has got.

    Args:
        file: What to fetch.
        path: Where it goes when its md5 is right.

    Raises:
        OSError, HTTPException: No connection, or it broke off, or the disk is full.
        DPAError: What was fetched is not what was expected; it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    got = partial.stat().st_size if partial.exists() else 0
    total = None
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={got}-"} if got else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:  # all of it, from the start
                got = 0
            length = answer.headers.get("Content-Length")
            total = got + int(length) if length else None
            with (
                partial.open("ab" if got else "wb") as out,
                tqdm(total=total, initial=got, unit="B", unit_scale=True, desc=file.name) as bar,
            ):
                while block := answer.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not got:  # 416: nothing comes after what was got
            raise
    size = partial.stat().st_size
    if total is not None and size < total:
        raise DPAError(f"the connection broke off after {size:,} of {total:,} bytes; try again")
    if file.md5 and (found := file_md5(partial)) != file.md5:
        partial.unlink()
        if got:  # what was kept was of another version, or broken
            return fetch(file, path)
        raise DPAError(f"{file.url} gave {size:,} bytes with md5 {found}, expected {file.md5}")
    return move_into_place(partial, path)


if __name__ == "__main__":
    main()
