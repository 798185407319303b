"""Ask the demo's model the held-out questions, before training and after it.

Prints a table, and draws drawings with question, answer given and expected answer. What
was answered once is kept: a second call prints it again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path


def main() -> int:
    """Print the table and name the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of tools/prepare_demo.py")
    parser.add_argument("work_dir", type=Path, help="folder of the training")
    arguments = parser.parse_args()
    table = arguments.work_dir / "report.txt"
    picture = arguments.work_dir / "answers.png"
    finished = arguments.work_dir / "tune" / "stage.json"
    if not table.is_file() or _changed(finished) > _changed(table):
        _evaluate(arguments.root, arguments.work_dir, table, picture)
    print(f"\n{table.read_text(encoding='utf-8')}\n\n{picture.resolve()}")
    return 0


def _changed(file: Path) -> float:
    return file.stat().st_mtime if file.is_file() else math.inf


def _evaluate(root: Path, work_dir: Path, table: Path, picture: Path) -> None:
    from dpa_xtuner.demo import report, trained
    from dpa_xtuner.demo.prepare import DATA_FOLDER
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.files import write_text

    with cli_errors():
        after = trained.after_training(root, work_dir)
        questions = report.load_questions(root / DATA_FOLDER / "heldout_questions.json")
        before = report.evaluate(trained.before_training(root), questions)
        answered = report.evaluate(after, questions)
        report.draw_answers(questions, answered.answers, picture)
        write_text(table, report.compare(before, answered))


if __name__ == "__main__":
    sys.exit(main())
