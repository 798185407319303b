"""Markdown tables that read well on the screen too."""

from collections.abc import Sequence

from tabulate import tabulate


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Lay out cells as a Markdown table that also reads well as text.

    Args:
        header: titles of the columns.
        rows: the cells, as they are shown.
        numbers: whether all columns but the first are aligned to the right.
    """
    others = "right" if numbers else "left"
    return tabulate(
        rows,
        header,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=("left", *[others] * (len(header) - 1)) if rows else None,
    )
