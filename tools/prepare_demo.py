"""Prepare the demo: write SmolLM2-135M-Instruct and the OpenMoji data under one folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpa_xtuner.demo.prepare import prepare
from dpa_xtuner.errors import cli_errors

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path("data"), help="default: data")
    root = parser.parse_args().root
    with cli_errors():
        prepare(root)
