"""Turn a stock XTuner LLaVA config into an editable config of Decoupled Proxy Alignment.

It keeps the stock config's model, data and schedule, and takes the other of the stages align
and tune from the stock config that it continues, or that continues it. What can't be kept is
printed, and stands at the top of the new file:

    python tools/apply_dpa.py llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain \
        -o my_config.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _configs import CONFIGS


def main() -> None:
    """Write the config and say what was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stock", help="a LLaVA config of XTuner, by name or path")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the config to write")
    arguments = parser.parse_args()

    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.stages.from_stock import find_stock, write_config

    with cli_errors():
        stock = find_stock(arguments.stock)
        converted = write_config(stock, arguments.output, CONFIGS / "_base_" / "dpa.py")
    print("\n".join(converted.header))
    if converted.not_kept:
        print("Not kept:", *converted.not_kept, sep="\n  - ")
    print(f"Wrote {arguments.output}. Next: xtuner train {arguments.output}")


if __name__ == "__main__":
    main()
