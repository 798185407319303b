"""Fetch the benchmarks' data files, and say what is missing.

Usage: python tools/get_benchmarks.py [NAMES ... | all] [--data DIR] [--list]

A file appears under its name when it is whole and its md5 is right. What was fetched before a stop
is kept in NAME.tsv.partial and gone on with. Without a network, put the files that are listed into
the folder by other means.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("DPA_WITHOUT_XTUNER", "1")  # spares seconds

from tqdm import tqdm

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import (
    DataFile,
    Missing,
    file_md5,
    find_benchmarks,
    missing_files,
)
from dpa_xtuner.files import move_into_place

TIMEOUT = 30  # seconds without a byte


def main() -> None:
    """Parse arguments, fetch, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["all"], help="benchmarks; all by default")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("LMUData", "data/benchmarks")),  # noqa: SIM112, VLMEvalKit's
        help="folder of the files; $LMUData or data/benchmarks by default",
    )
    parser.add_argument("--list", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    try:
        missing = get(args.names, args.data, fetch_them=not args.list)
    except DPAError as error:
        raise SystemExit(f"error: {error}") from None
    sys.exit(1 if missing else 0)


def get(names: list[str], folder: Path, fetch_them: bool = True) -> bool:
    """Fetch what is not there, and print what there is.

    Args:
        names: Of benchmarks, or "all".
        folder: Of the data files; made where it is not there.
        fetch_them: Whether to fetch.

    Returns:
        Whether something is missing.

    Raises:
        DPAError: A name is unknown.
    """
    benchmarks = find_benchmarks(names)
    refused = fetch_missing(missing_files(benchmarks, folder)) if fetch_them else {}
    problems = {item.file: item.problem for item in missing_files(benchmarks, folder)}
    for file in (file for benchmark in benchmarks for file in benchmark.files):
        print(f"{'missing' if file in problems else 'here':8} {file.name}")
        if file in problems:
            print(f"         put it at {(folder / file.name).resolve()}")
            print(f"         md5       {file.md5 or 'any'}")
            print(f"         from      {file.url or 'nowhere: it is made on this machine'}")
            print(f"         problem   {refused.get(file.name, problems[file])}")
    count = sum(len(benchmark.files) for benchmark in benchmarks)
    print(f"{count - len(problems)} of {count} files are in {folder.resolve()}.")
    return bool(problems)


def fetch_missing(missing: list[Missing]) -> dict[str, str]:
    """Fetch what is not there: a file with another md5 is the user's to move away.

    Returns:
        Why a file could not be fetched, by its name.
    """
    refused: dict[str, str] = {}
    unreachable: dict[str, str] = {}  # hosts: each is waited for once
    for item in missing:
        host = urlsplit(item.file.url).netloc
        if item.path.exists() or not item.file.url:
            continue
        if host in unreachable:
            refused[item.file.name] = unreachable[host]
            continue
        try:
            fetch(item.file, item.path)
        except (OSError, http.client.HTTPException, DPAError) as error:
            reason = str(getattr(error, "reason", "") or error)
            refused[item.file.name] = reason
            if isinstance(error, urllib.error.URLError) and not hasattr(error, "code"):
                unreachable[host] = reason
    return refused


def fetch(file: DataFile, path: Path) -> None:
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
        raise DPAError(f"{file.url} gave {size:,} bytes with md5 {found}, expected {file.md5}")
    move_into_place(partial, path)


if __name__ == "__main__":
    main()
