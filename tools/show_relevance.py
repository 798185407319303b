"""Show what a run's loss looks at, on one HTML page: pictures, and each token by its weight.

    python tools/show_relevance.py work_dirs/RUN

With --cfg-options align.loss=cal it shows what another scheme would make of the same model.
"""

from __future__ import annotations

from pathlib import Path

from _configs import find_run, parsed, parser_of, say, whole


def main() -> None:
    """Write the page, and say where to."""
    parser = parser_of(__doc__)
    parser.add_argument("run", metavar="CONFIG_OR_RUN", help="a run's folder, or its config")
    parser.add_argument("--stage", help="align or tune; default: the last that is finished")
    parser.add_argument("--samples", type=whole(1), default=24, help="default: 24, evenly spread")
    parser.add_argument("--out", type=Path, help="default: relevance.html in the stage's folder")
    parser.add_argument("--checkpoint", type=Path, help="a .pth file or DeepSpeed folder of the "
                        "stage, in place of what it wrote at its end")  # fmt: skip
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<config's name>")
    given = parsed(parser)
    given["given"] = find_run(given.pop("run"))
    count, out = given.pop("samples"), given.pop("out")

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.analysis.models import find_source
    from dpa_xtuner.analysis.relevance import show_relevance
    from dpa_xtuner.errors import cli_errors

    with cli_errors():
        say(f"Written: {show_relevance(find_source(**given), count, out)}")


if __name__ == "__main__":
    main()
