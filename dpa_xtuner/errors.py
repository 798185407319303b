"""The error that is meant for the person at the keyboard, and how it is shown."""

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from safetensors import SafetensorError

from dpa_xtuner.streams import outlive_readers


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
            raise DPAError(f"{package} is not installed: {install(extra)}")


def install(extra: str) -> str:
    """The command that installs an extra of this project's, in the versions tested together."""
    return f"pip install -c constraints/stock.txt -e '.[{extra}]' (see the README's Install)"


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where nothing is near; case does not count."""
    lower = {each.lower(): each for each in known}
    match = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[match[0]]!r}?" if match else ""


def refuse(config: str, wrong: Mapping[str, str]) -> None:
    """Tell all that is wrong with a config in one error; do nothing where nothing is.

    Args:
        config: what is refused, for the message.
        wrong: dotted key -> what to say of it.

    Raises:
        DPAError: something is wrong; each on a line of its own.
    """
    if wrong:
        lines = "\n".join(f"  {key}: {what}" if key else f"  {what}" for key, what in wrong.items())
        raise DPAError(f"{config} has what can't be used:\n{lines}")


# What a person can mend; another OSError is a bug or a broken machine and keeps its traceback.
_MENDABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    None,  # transformers: a model or a file of it is missing
}  # fmt: skip


@contextmanager
def cli_errors(every_rank: bool = False) -> Iterator[None]:
    """Show a user's mistake, or a full disk, as one message; exit code 1, no traceback.

    Args:
        every_rank: any rank may be the only one in trouble, so each speaks for itself.
            Without it all are in the same trouble and the first of each node speaks.
    """
    outlive_readers()
    try:
        yield
    except (DPAError, OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _MENDABLE:
            raise
        if every_rank or is_first_of_node():
            print(f"\ndpa_xtuner: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if is_first_of_node():
            print("\nStopped. To go on, call the same command again.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def is_first_of_node() -> bool:
    """Whether this process is the first of its node."""
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
