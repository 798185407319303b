"""Show the memory of each stage of a config on every GPU, as a Markdown table.

No weights are loaded: sizes come from the published configurations, in a local folder, on the hub,
or in this package.

    python tools/memory.py dpa_internlm2_7b --gpus 8 --zero 2 --length 1024
    python tools/memory.py --table docs/memory.md   # all configs, on 1 to 16 GPUs
"""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from _configs import config_names, find_config, parsed, parser_of, whole

if TYPE_CHECKING:  # it takes seconds to import
    from mmengine.config import Config

CARDS = (24, 40, 80)  # GB
USABLE = 0.9  # fraction of a card; the rest is for CUDA itself and fragmentation
COLUMNS = ("stage", "trained", "frozen", "weights", "gradients", "optimizer", "buffers",
           "activations", "total", "fits into")  # fmt: skip
# The tables of all configs: GPUs and ZeRO stage, and the tokens of a sample.
SETUPS = ((1, 0), (4, 2), (4, 3), (8, 2), (8, 3), (16, 3))
LENGTH = 2048


def show(cfg: Config, gpus: int, zero: int, length: int | None) -> None:
    """Print the table of one config, in GB (2^30 bytes) and millions of parameters."""
    from dpa_xtuner.planning.memory import stage_models
    from dpa_xtuner.tables import markdown

    rows = []
    for name, model in stage_models(cfg).items():
        memory = model.memory(gpus, zero, length)
        counts = [f"{count / 1e6:,.1f} M" for count in (model.counts.trained, model.counts.frozen)]
        sizes = [*astuple(memory), memory.total]
        rows.append((name, *counts, *map(_gb, sizes), _card(memory.total) or "none of them"))
    how = f"ZeRO-{zero}" if zero else "no DeepSpeed"
    tokens = f"{length} tokens" if length else "samples of max_length"
    print(f"{cfg.llm_name_or_path}: GB on each of {gpus} GPUs, {how}, {tokens}\n")
    print(markdown(COLUMNS, rows))
    print(f"\nA stage fits into a card if it takes at most {USABLE:.0%} of it.")


def tables(names: list[str]) -> list[str]:
    """Make the tables of docs/memory.md.

    Args:
        names: configs.

    Returns:
        The cards that each config needs, and the GB that each of its stages needs.
    """
    from dpa_xtuner.planning.memory import stage_models
    from dpa_xtuner.stages.settings import config_from_file
    from dpa_xtuner.tables import markdown

    setups = [f"{gpus} GPU{'s' * (gpus > 1)}{_with(zero)}" for gpus, zero in SETUPS]
    meant, needs = [], []
    for name in names:
        sizes = []
        for stage, model in stage_models(config_from_file(find_config(name))).items():
            settings = model.stage_settings
            length = min(LENGTH, settings.max_length)
            sizes.append([model.memory(*setup, length).total for setup in SETUPS])
            needs.append((name, stage, f"{settings.batch_size} x {length}", *map(_gb, sizes[-1])))
        cards = [_card(max(column)) for column in zip(*sizes, strict=True)]
        first = next(i for i, card in enumerate(cards) if card)
        gpus, zero = SETUPS[first]
        goal = f"{gpus} x {cards[first]}{_with(zero)}"
        meant.append((name, goal, *(card or "-" for card in cards)))
    return [
        markdown(["config", "meant for", *setups], meant),
        markdown(["config", "stage", "samples x tokens", *setups], needs),
    ]


def _with(zero: int) -> str:
    return f", ZeRO-{zero}" if zero else ""


def _card(size: float) -> str | None:
    return next((f"{card} GB" for card in CARDS if size <= USABLE * card * 2**30), None)


def _gb(size: float) -> str:
    return "-" if size == float("inf") else f"{size / 2**30:.1f}"


def main() -> None:
    """Print the table of one config, or write those of all."""
    parser = parser_of(__doc__)
    parser.add_argument("config", nargs="?", help="path or name of a config")
    parser.add_argument("--table", type=Path, metavar="FILE",
                        help="replace the tables in this Markdown file by those of all configs; "
                        "ignores other options")  # fmt: skip
    parser.add_argument("--gpus", type=whole(1), default=8, help="default: 8")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2,
                        help="DeepSpeed's ZeRO stage (default: 2); 0: none")  # fmt: skip
    parser.add_argument("--length", type=whole(1),
                        help="tokens of a sample with its images (default: max_length; captions "
                        "are some 60 tokens and their image)")  # fmt: skip
    given = parsed(parser)
    config, table = given.pop("config"), given.pop("table")
    if bool(config) == bool(table):
        parser.error("give a config, or --table FILE for all of them")

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.files import write_text
    from dpa_xtuner.stages.settings import config_from_file

    with cli_errors():
        if table:
            made = iter(tables(config_names()))
            page = table.read_text(encoding="utf-8")
            page = re.sub(r"(^\|.*\n)+", lambda _: f"{next(made)}\n", page, flags=re.MULTILINE)
            write_text(table, page)
        else:
            show(config_from_file(find_config(config), given.pop("options")), **given)


if __name__ == "__main__":
    main()
