"""Measure, before any training, whether captions conflict with an LLM's own way of writing.

    python tools/conflict.py CONFIG
    python tools/conflict.py CONFIG --captions plain.json ornate.json --llm A B
    python tools/conflict.py CONFIG --ranks 4,16,64 --shares 0.25,1

Prints a table, and writes conflict.json and conflict.png. Of a run with a finished align it also
says how much of the captions' style the projector carries.
"""

from __future__ import annotations

from pathlib import Path

from _configs import find_config, numbers, parsed, parser_of, say, whole


def main() -> None:
    """Measure, print, and say where the files are."""
    parser = parser_of(__doc__)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--captions", nargs="+", default=[], help="files in place of the config's")
    parser.add_argument("--llm", nargs="+", default=[], help="LLMs in place of the config's")
    parser.add_argument(
        "--samples", type=whole(1), default=128, help="held-out captions to measure; default: 128"
    )
    parser.add_argument(
        "--steps", type=whole(1), default=200, help="of a quick LoRA fit, at most; default: 200"
    )
    parser.add_argument("--ranks", type=numbers(int), default=[], help="of LoRA, to compare")
    parser.add_argument("--shares", type=numbers(float), default=[], help="of the captions")
    parser.add_argument("--out", type=Path, help="default: <work dir>/conflict")
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<config's name>")
    given = parsed(parser)
    if given["shares"] and not given["ranks"]:
        parser.error("--shares is read with --ranks alone")
    given["config"] = find_config(given["config"])

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.analysis.report import compare
    from dpa_xtuner.errors import cli_errors

    with cli_errors():
        say(compare(**given))


if __name__ == "__main__":
    main()
