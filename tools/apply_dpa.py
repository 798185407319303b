"""Turn a stock XTuner LLaVA config into an editable config of Decoupled Proxy Alignment.

The new config keeps the model, data and schedule. A stock config trains one of the stages align
and tune; the other stage is taken from the stock config that it continues, or that continues it.
Keys that are not taken over are printed, and listed at the top of the new file:

    python tools/apply_dpa.py llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain \
        -o my_config.py
"""

from pathlib import Path

from _configs import CONFIGS, parser_of


def main() -> None:
    """Write the config, and print its notes."""
    parser = parser_of(__doc__)
    parser.add_argument("stock", help="a LLaVA config of XTuner, by name or path")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the config to write")
    arguments = parser.parse_args()

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.planning.from_stock import find_stock, write_config

    with cli_errors():
        stock = find_stock(arguments.stock)
        notes = write_config(stock, arguments.output, CONFIGS / "_base_" / "dpa.py")
    print(*notes, f"Wrote {arguments.output}. Next: xtuner train {arguments.output}", sep="\n")


if __name__ == "__main__":
    main()
