"""The error that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class DPAError(ValueError):
    """A user's mistake or a full disk: shown as one message, without a traceback.

    The message says what was wrong (argument, value, file or record id), what was
    expected, and what to do.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
