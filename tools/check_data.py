"""Check all data of a config before training: every record, every image.

Exit code 1 if anything can't be used.
"""

import sys
from pathlib import Path

from _configs import find_config, parsed, parser_of, whole


def main() -> int:
    """Print a report on each data set, and return the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument(
        "--sample", type=whole(1), help="samples whose images are opened; default: all"
    )
    parser.add_argument("--report", type=Path, help="JSON lines to write: a line for each problem")
    parser.add_argument("--html", type=Path, help="page to write: samples as the model sees them")
    given = parsed(parser)
    given["path"] = find_config(given.pop("config"))

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.planning.check import check_config

    with cli_errors():
        return 0 if check_config(**given) else 1


if __name__ == "__main__":
    sys.exit(main())
