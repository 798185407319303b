"""The files that docs/extending.md shows, as they stand there."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/extending.md"


def files() -> dict[str, str]:
    """Name -> content of each code block that begins with a comment naming a file."""
    blocks = re.findall(r"^```python\n(# (my_\w+\.py)\n.*?)^```$", PAGE.read_text(), re.S | re.M)
    return {name: content for content, name in blocks}
