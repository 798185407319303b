"""Check all data of a config before training: every record, every image.

Exit code 1 if anything can't be used.
"""

import argparse
import sys
from pathlib import Path

from _configs import check_options, find_config, parse_options, whole


def main() -> int:
    """Print a report on each data set, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument(
        "--sample", type=whole(1), help="samples whose images are opened; default: all"
    )
    parser.add_argument("--report", type=Path, help="JSON lines to write: a line for each problem")
    parser.add_argument("--html", type=Path, help="page to write: samples as the model sees them")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], help="as in xtuner train"
    )
    check_options(sys.argv[1:])
    arguments = parser.parse_args()
    path = find_config(arguments.config)

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.planning.check import check_config

    options = parse_options(arguments.cfg_options)
    with cli_errors():
        ok = check_config(path, options, arguments.sample, arguments.report, arguments.html)
        return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
