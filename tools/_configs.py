"""Find configs by name and print text, without importing torch."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_names(pattern: str = "") -> list[str]:
    """List the configs whose names contain ``pattern``, without the base configs."""
    paths = (p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.py"))
    return sorted(p.stem for p in paths if "_base_" not in p.parts and pattern in p.stem)


def find_config(name: str, expected: str = "a config's file or its name") -> Path:
    """Find the file of a config that is given by path or by name.

    Args:
        name: as given.
        expected: what could have been given, for the message.

    Raises:
        SystemExit: there is no such config; the message has the nearest names.
    """
    path, known = Path(name), config_names()
    if path.is_file() and path.suffix == ".py":
        return path
    if (stem := name.removesuffix(".py")) in known:
        return next(CONFIGS.rglob(f"{stem}.py"))
    there = "is a folder" if path.is_dir() else "is no .py file"
    wrong = there if path.exists() else "is not there"
    raise SystemExit(f"{name!r} {wrong}: expected {expected}.{nearest(path.stem)}")


def nearest(name: str) -> str:
    """Say which configs have nearly this name, and what lists all of them."""
    known = config_names()
    near = [name] if name in known else difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} python tools/list_configs.py lists the configs."


def find_run(name: str, expected: str = "a run's folder, or its config's file or name") -> Path:
    """Find a run's folder or its config; raise as :func:`find_config`."""
    return Path(name) if Path(name).is_dir() else find_config(name, expected)


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parsed(parser: argparse.ArgumentParser) -> dict:
    """Parse a command line that may have ``--cfg-options``: these are ``options``, parsed too.

    Raises:
        SystemExit: as :func:`check_options`.
    """
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], help="as in training"
    )
    given = vars(parser.parse_args())
    check_options(given["cfg_options"])
    return given | {"options": parse_options(given.pop("cfg_options"))}


def check_options(given: list[str]) -> None:
    """Refuse ``--cfg-options`` on which MMEngine's parser would fail with a traceback.

    Raises:
        SystemExit: an option does not have the form SETTING=VALUE, or its brackets don't close.
    """
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise SystemExit(
                f"--cfg-options {option}: expected SETTING=VALUE, such as align.lr=1e-3."
            )
        if any(value.count(a) != value.count(b) for a, b in ("()", "[]")):
            raise SystemExit(f"--cfg-options {option}: its brackets don't close.")


def parse_options(given: list[str]) -> dict:
    """Parse ``--cfg-options`` that :func:`check_options` has passed, as MMEngine does."""
    from mmengine.config import DictAction

    pairs = (option.partition("=") for option in given)
    return {key: DictAction._parse_iterable(value) for key, _, value in pairs}


def whole(low: int, high: float = float("inf")) -> Callable[[str], int]:
    """Make an argparse type that reads a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    read.__name__ = f"whole number ({low} {'or more' if high == float('inf') else f'to {high}'})"
    return read


def numbers(kind: Callable) -> Callable:
    """Make an argparse type that reads numbers above 0 separated by commas, such as 4,16,64."""

    def read(text: str) -> list:
        found = [kind(part) for part in text.split(",")]
        if min(found) <= 0:
            raise ValueError
        return found

    read.__name__ = "list of numbers above 0, such as 4,16,64:"  # in argparse's message
    return read


def say(text: str, stream=None) -> None:
    """Print to a stream (default: stdout); do nothing if its reader is gone."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # Python would try to write its buffer again at exit.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
