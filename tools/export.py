"""Write a trained model in a format that other programs open.

    python tools/export.py dpa_internlm2_7b

writes work_dirs/dpa_internlm2_7b/tune/hf, which transformers loads:
LlavaForConditionalGeneration and its processor, with the chat template of the training.
"""

from pathlib import Path

from _configs import find_config, parsed, parser_of

from dpa_xtuner.layout import ALIGN, PROXY, TUNE


def main() -> None:
    """Export, and print the folder."""
    parser = parser_of(__doc__)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--stage", default=TUNE, help=f"{PROXY}, {ALIGN} or {TUNE} (default)")
    parser.add_argument("--format", default="hf", dest="fmt",
                        help="hf: transformers' LLaVA (default); xtuner: for xtuner chat; parts: "
                        "what the stage trained, a folder each; llm: the LLM alone, to be tuned "
                        "further")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, help="default: <work dir>/<stage>/<format>")
    parser.add_argument("--checkpoint", type=Path,
                        help="a .pth file or DeepSpeed folder of the stage, in place of what it "
                        "wrote at its end")  # fmt: skip
    parser.add_argument(
        "--dtype", help="bfloat16, float16 or float32; default: the run's precision"
    )
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<config's name>")
    given = parsed(parser)
    given["config"] = find_config(given["config"])

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.export import export_config

    with cli_errors():
        export_config(**given)


if __name__ == "__main__":
    main()
