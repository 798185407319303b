"""Finds configs by name, and prints, without importing torch."""

from __future__ import annotations

import difflib
import os
import sys
from itertools import takewhile
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_names(pattern: str = "") -> list[str]:
    """Names of all configs that hold ``pattern``, bases left out."""
    paths = (p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.py"))
    return sorted(p.stem for p in paths if "_base_" not in p.parts and pattern in p.stem)


def find_config(name: str) -> Path:
    """The file of a config that is given by path or by name.

    Raises:
        SystemExit: there is none; the message lists the nearest and the known ones.
    """
    if Path(name).is_file():
        return Path(name)
    known = config_names()
    if (stem := name.removesuffix(".py")) in known:
        return next(CONFIGS.rglob(f"{stem}.py"))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SystemExit(f"{name!r} is neither a file nor a config.{hint} Known: {', '.join(known)}.")


def check_options(arguments: list[str]) -> None:
    """Refuse ``--cfg-options`` that MMEngine's parser answers with a traceback.

    Args:
        arguments: of a command line.

    Raises:
        SystemExit: one is not of the form SETTING=VALUE, or its brackets don't close.
    """
    for i, argument in enumerate(arguments):
        if argument.startswith("--cfg-options="):
            given = [argument.removeprefix("--cfg-options=")]
        elif argument == "--cfg-options":
            given = list(takewhile(lambda a: not a.startswith("--"), arguments[i + 1 :]))
        else:
            continue
        for option in given:
            key, equals, value = option.partition("=")
            if not equals or not key:
                raise SystemExit(
                    f"--cfg-options {option}: expected SETTING=VALUE, such as align.lr=1e-3."
                )
            if any(value.count(a) != value.count(b) for a, b in ("()", "[]")):
                raise SystemExit(f"--cfg-options {option}: its brackets don't close.")


def say(text: str, stream=None) -> None:
    """Print, to stdout if ``stream`` is left out; nothing happens where nobody reads it."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # What Python has not got rid of it would try to write again at its end.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
