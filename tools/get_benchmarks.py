"""Fetch the benchmarks' data files, and list what is missing.

Usage: python tools/get_benchmarks.py [NAMES ... | all | text] [--data DIR] [--list]

A file gets its name when it is complete and its md5 is right. An interrupted download is kept in
NAME.partial and resumed. Text-only data sets come in archives, which are unpacked. Without a
network, put the listed files into the folder by other means, and run the command again.
"""

import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from _configs import parser_of
from tqdm import tqdm

from dpa_xtuner.errors import DPAError, check_installed, cli_errors
from dpa_xtuner.evaluation import text_benchmarks as text
from dpa_xtuner.evaluation.benchmarks import DataFile, Missing, find_benchmarks
from dpa_xtuner.evaluation.cache_key import file_digest
from dpa_xtuner.files import move_into_place

TIMEOUT = 30  # seconds without a byte


def main() -> None:
    """Parse arguments, fetch, report."""
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", default=["all"],
                        help="benchmarks; all (default) for those with pictures, text for those "
                        "without")  # fmt: skip
    parser.add_argument("--data", type=Path,
                        default=os.environ.get("LMUData", "data/benchmarks"),  # noqa: SIM112
                        help="folder of the files; default: $LMUData or data/benchmarks"
                        )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    with cli_errors():
        missing = get(args.names, args.data, fetch_them=not args.list)
    sys.exit(1 if missing else 0)


def get(names: list[str], folder: Path, fetch_them: bool = True) -> bool:
    """Fetch missing files, unpack archives, and print a list of all files.

    Args:
        names: names of benchmarks; "all" means those with pictures, "text" those without.
        folder: folder of the data files; created if it is missing.
        fetch_them: whether to fetch and unpack.

    Returns:
        Whether something is missing.

    Raises:
        DPAError: a name is unknown.
    """
    texts, names = text.split_names(names)
    benchmarks = [*find_benchmarks(names, also=("text", *text.TEXT_BENCHMARKS)), *texts]
    if texts:
        check_installed("eval", "opencompass")
    refused = fetch_missing(survey(benchmarks, folder), folder) if fetch_them else {}
    found = survey(benchmarks, folder)
    for file, missing in found.items():
        print(f"{'missing' if missing else 'here':8} {file.name}")
        if missing:
            print(f"         put it at {(folder / file.name).resolve()}")
            print(f"         md5       {file.md5 or 'any'}")
            print(f"         from      {file.url or 'nowhere: make it on this machine'}")
            print(f"         problem   {refused.get(file) or f'{missing.path}: {missing.problem}'}")
    here = sum(missing is None for missing in found.values())
    print(f"{here} of {len(found)} files are in {folder.resolve()}.")
    return here < len(found)


def survey(benchmarks: list, folder: Path) -> dict[DataFile, Missing | None]:
    """List the files of benchmarks, and what is wrong with each."""
    missing = {m.file: m for benchmark in benchmarks for m in benchmark.missing(folder)}
    return {file: missing.get(file) for benchmark in benchmarks for file in benchmark.files}


def fetch_missing(found: dict[DataFile, Missing | None], folder: Path) -> dict[DataFile, str]:
    """Fetch and unpack missing files; the user must move wrong files away.

    Returns:
        File -> why it could not be fetched or unpacked.
    """
    refused: dict[DataFile, str] = {}
    unreachable: dict[str, str] = {}  # host -> error: wait for each host only once
    for file, missing in found.items():
        path, host = folder / file.name, urlsplit(file.url).netloc
        if missing is None or (file.is_archive and (folder / file.dataset).exists()):
            continue
        try:
            if not path.exists() and file.url:
                if host in unreachable:
                    raise DPAError(unreachable[host])
                fetch(file, path)
            if file.is_archive:
                text.unpack(file, folder)
        except (OSError, http.client.HTTPException, DPAError) as error:
            refused[file] = str(getattr(error, "reason", "") or error)
            if isinstance(error, urllib.error.URLError) and not hasattr(error, "code"):
                unreachable[host] = refused[file]
    return refused


def fetch(file: DataFile, path: Path) -> None:
    """Fetch a file, resuming an interrupted download.

    Args:
        file: the file to fetch.
        path: its path once its md5 is right.

    Raises:
        OSError, HTTPException: there is no connection, it broke off, or the disk is full.
        DPAError: the md5 is wrong; the file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    got = partial.stat().st_size if partial.exists() else 0
    total = None
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={got}-"} if got else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:  # the server sends the whole file
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
        if error.code != 416 or not got:  # 416: the file was complete already
            raise
    size = partial.stat().st_size
    if total is not None and size < total:
        raise DPAError(f"the connection broke off after {size:,} of {total:,} bytes; try again")
    if file.md5 and (found := file_digest(partial)) != file.md5:
        partial.unlink()
        if got:  # the partial file was of another version, or broken
            return fetch(file, path)
        raise DPAError(f"{file.url} gave {size:,} bytes with md5 {found}, expected {file.md5}")
    return move_into_place(partial, path)


if __name__ == "__main__":
    main()
