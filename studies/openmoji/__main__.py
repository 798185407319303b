"""The command of :mod:`studies.openmoji.run`, apart from it: its processes import that module."""

import sys

from dpa_xtuner.errors import cli_errors
from studies.openmoji.run import main

if __name__ == "__main__":
    with cli_errors():
        sys.exit(main())
