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

    from dpa_xtuner.errors import told_plainly
    from dpa_xtuner.planning.from_stock import find_stock, write_config

    with told_plainly():
        stock = find_stock(arguments.stock)
        notes = write_config(stock, arguments.output, CONFIGS / "_base_" / "dpa.py")
    print(*notes, f"Wrote {arguments.output}. Next: xtuner train {arguments.output}", sep="\n")


if __name__ == "__main__":
    main()
