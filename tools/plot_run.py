"""Draw the curves of runs, stages side by side: loss, cross entropy, learning rate, weights, speed.

python tools/plot_run.py work_dirs/RUN [work_dirs/OTHER ...]
"""

from __future__ import annotations

from pathlib import Path

from _configs import parser_of, say

if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="work dir of a run")
    parser.add_argument(
        "--out", type=Path, help="default: RUN/curves.png; of several runs, ./curves.png"
    )
    given = parser.parse_args()

    from dpa_xtuner.curves import CURVES_FILE, draw_curves
    from dpa_xtuner.errors import cli_errors

    folder = given.runs[0] if len(given.runs) == 1 else Path()
    with cli_errors():
        say(f"Written: {draw_curves(given.runs, given.out or folder / CURVES_FILE)}")
