"""Make the tables and pictures of docs/results.md from results files.

    python -m studies.report                      # studies/results/*.jsonl into docs/results.md
    python -m studies.report --results DIR --page PAGE.md --study smallest

A block of the page, between `<!-- NAME -->` and `<!-- end -->`, is replaced by the table NAME.
"""

import argparse
import re
from pathlib import Path

from dpa_xtuner.files import write_text
from studies.analysis import Results, drawn_runs
from studies.pictures import draw
from studies.plan import STUDIES
from studies.tables import drawings, tables

ROOT = Path(__file__).resolve().parents[1]


def fill(page: str, made: dict[str, str]) -> str:
    """Replace the blocks of a page by tables of their names."""
    for name, table in made.items():
        block = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if found := block.search(page):
            page = f"{page[: found.end(1)]}\n{table}\n\n{page[found.start(2) :]}"
    return page


def main() -> None:
    """Write tables and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "studies" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--study", choices=STUDIES, default="full")
    given = parser.parse_args()
    results = Results(given.results, STUDIES[given.study].sizes.protocol)
    if not results.runs:
        raise SystemExit(f"No results of {given.study} in {given.results}: run it first.")
    made = tables(results) | drawings(given.results)
    write_text(given.page, fill(given.page.read_text(encoding="utf-8"), made))
    draw(results, drawn_runs(given.results), given.page.parent)
    print("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()))


if __name__ == "__main__":
    main()
