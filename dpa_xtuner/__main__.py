"""Run a tool by name: ``python -m dpa_xtuner train CONFIG`` is ``python tools/train.py CONFIG``.

An installation without a checkout has the tools inside the package.
"""

import os
import sys

from dpa_xtuner.errors import nearest
from dpa_xtuner.layout import shipped


def main() -> None:
    """Become the process of the tool that the first argument names."""
    tools = {path.stem: path for path in shipped("tools").glob("[!_]*.py")}
    listed = f"usage: python -m dpa_xtuner TOOL ...\nTools: {', '.join(sorted(tools))}"
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(listed)
    elif name not in tools:
        sys.exit(f"{name!r} is not a tool{nearest(name, tools)}\n{listed}")
    else:
        os.execv(sys.executable, [sys.executable, str(tools[name]), *arguments])


if __name__ == "__main__":
    main()
