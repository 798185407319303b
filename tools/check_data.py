"""Check all data of a config before training: every record, every image.

Exit code 1 if anything can't be used.
"""

from __future__ import annotations

import argparse
import sys

from _configs import check_options, find_config, parse_options


def main() -> int:
    """Print a report on each data set, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--sample", type=int, help="samples whose images are opened; default: all")
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
        return 0 if check_config(path, options, arguments.sample) else 1


if __name__ == "__main__":
    sys.exit(main())
