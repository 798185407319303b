"""Tables as people read them, on the screen and in a file."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Lay cells out as a Markdown table that also reads well as text.

    Args:
        header: The columns' titles.
        rows: Cells as they are to be shown.
        numbers: Whether all columns but the first are aligned to the right.
    """
    others = "right" if numbers else "left"
    return tabulate(
        rows,
        header,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=("left", *[others] * (len(header) - 1)) if rows else None,
    )
