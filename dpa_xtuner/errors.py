"""The error that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class DPAError(ValueError):
    """A user's mistake or a full disk: shown as one message, without a traceback.

    The message says what was wrong (argument, value, file or record id), what was
    expected, and what to do.
    """


def check_installed(extra: str, *packages: str) -> None:
    """Refuse to go on without packages of an extra of this project's.

    Raises:
        DPAError: one is not installed; the message says how it is.
    """
    for package in packages:
        if not find_spec(package):
            raise DPAError(f"{package} is not installed: pip install 'dpa_xtuner[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
