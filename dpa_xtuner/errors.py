"""The error for mistakes of the user, and how it is shown."""

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

from safetensors import SafetensorError

from dpa_xtuner.streams import outlive_readers


class DPAError(ValueError):
    """A user's mistake or a full disk: shown as one message, without a traceback.

    The message says what was wrong (argument, value, file or record id), what was
    expected, and what to do.
    """


def check_installed(extra: str, *packages: str) -> None:
    """Refuse to continue without the packages of an extra.

    Args:
        extra: name of the extra in ``setup.cfg``.
        packages: the packages to look for.

    Raises:
        DPAError: one is not installed; the message says how to install it.
    """
    for package in packages:
        if not find_spec(package):
            raise DPAError(f"{package} is not installed: {install(extra)}")


def install(extra: str) -> str:
    """Return the command that installs an extra, in the versions that are tested together."""
    stack = "stock" if version("transformers").startswith("4.") else "default"
    return f"pip install -c constraints/{stack}.txt -e '.[{extra}]' (see docs/environments.md)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing if no name is near; case does not count."""
    lower = {each.lower(): each for each in known}
    match = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[match[0]]!r}?" if match else ""


def refuse(config: str, wrong: Mapping[str, str]) -> None:
    """Report all problems of a config in one error; do nothing if there are none.

    Args:
        config: what has the problems, for the message.
        wrong: dotted key -> message.

    Raises:
        DPAError: there are problems; lists them, one a line.
    """
    if wrong:
        lines = "\n".join(f"  {key}: {what}" if key else f"  {what}" for key, what in wrong.items())
        raise DPAError(f"{config} has what can't be used:\n{lines}")


# Errors that a user can mend; any other OSError is a bug or a broken machine: show its traceback.
_MENDABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    None,  # transformers: a model or a file of it is missing
}  # fmt: skip


@contextmanager
def cli_errors(every_rank: bool = False) -> Iterator[None]:
    """Show a user's mistake, or a full disk, as one message; exit code 1, no traceback.

    Args:
        every_rank: each rank shows its own error, since it may be the only one that fails.
            Otherwise all ranks fail alike, and the first of each node shows the error.
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
            print("\nStopped. Run the same command again to continue.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def is_first_of_node() -> bool:
    """Tell whether this process is the first of its node."""
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
