"""List the configs whose names contain a pattern, like ``xtuner list-cfg``."""

import argparse
import sys

from _configs import CONFIGS, config_names, nearest, say

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="part of a name; all without it")
    pattern = parser.parse_args().pattern
    names = config_names(pattern)
    if not names:
        raise SystemExit(f"No config's name contains {pattern!r}.{nearest(pattern)}")
    say("\n".join(names))
    path = f"{CONFIGS}/{names[0]}.py"
    say(f"\nTrain:  xtuner train {path}\nChange: write a file with\n", sys.stderr)
    say(f"        _base_ = [{path!r}]\n\n        and what differs.", sys.stderr)
