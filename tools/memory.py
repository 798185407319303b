"""What each stage of a config needs on every GPU, as a Markdown table.

Nothing is loaded: models are counted by their published configuration, from a local folder, the
hub, or the sizes that come with this package.

    python tools/memory.py dpa_internlm2_7b --gpus 8 --zero 2 --length 1024
    python tools/memory.py --table docs/memory.md   # all configs, on 1 to 16 GPUs
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from _configs import check_options, config_names, find_config
from mmengine.config import Config, DictAction

CARDS = (24, 40, 80)  # GB
USABLE = 0.9  # of a card; the rest is for CUDA itself and for what fragmentation wastes
COLUMNS = ("stage", "trained", "frozen", "weights", "gradients", "optimizer", "buffers",
           "activations", "total", "fits into")  # fmt: skip
# The table of all configs: GPUs and ZeRO stage, and the tokens of a sample.
SETUPS = ((1, 0), (4, 2), (4, 3), (8, 2), (8, 3), (16, 3))
LENGTH = 2048


def table(cfg: Config, gpus: int, zero: int, length: int | None) -> list[tuple[str, ...]]:
    """A row for each stage, in GB (2^30 bytes) and millions of parameters."""
    from dpa_xtuner.stages import Settings, stage_table
    from dpa_xtuner.stages.memory import StageModel

    settings = Settings.from_config(cfg)
    rows = []
    for name, stage in stage_table(settings).items():
        model = StageModel(cfg, settings, stage)
        memory, otherwise = model.memory(gpus, zero, length)
        counts = [f"{count / 1e6:,.1f} M" for count in (model.counts.trained, model.counts.frozen)]
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.buffers)
        activations = f"{_gb(memory.activations)} ({_gb(otherwise)})"
        numbers = [*map(_gb, parts), activations, _gb(memory.total)]
        rows.append((name, *counts, *numbers, _card(memory.total) or "none of them"))
    return rows


def totals(cfg: Config, length: int) -> dict[tuple[str, str], list[float | None]]:
    """Bytes on each GPU of :data:`SETUPS`, by stage and ``samples x tokens`` of a micro-batch.

    Args:
        cfg: a DPA config.
        length: tokens of a sample; a stage's ``max_length`` where that is less.

    Returns:
        None in the place of a set-up that can't be: ZeRO-3 shares out no weights of 4 bit.
    """
    from dpa_xtuner.stages import Settings, stage_table
    from dpa_xtuner.stages.memory import StageModel, state_memory

    settings, found = Settings.from_config(cfg), {}
    quantised = bool(cfg.model.llm.get("quantization_config"))
    for name, stage in stage_table(settings).items():
        own = getattr(settings, name)
        tokens = min(length, own.max_length)
        model = StageModel(cfg, settings, stage)
        # Of DeepSpeed, the activations depend on whether it is there, not on its stage.
        activations = {zero: model.memory(1, zero, tokens)[0].activations for zero in (0, 2)}
        found[name, f"{own.batch_size} x {tokens}"] = [
            None if quantised and zero == 3 else replace(
                state_memory(model.counts, gpus, zero), activations=activations[min(zero, 2)]
            ).total
            for gpus, zero in SETUPS
        ]  # fmt: skip
    return found


def page(names: list[str]) -> str:
    """What these configs need and are meant for, as Markdown."""
    from dpa_xtuner.tables import markdown

    named = [f"{gpus} GPU{'s' * (gpus > 1)}{_with(zero)}" for gpus, zero in SETUPS]
    meant, needs = [], []
    for name in names:
        print(name, flush=True)
        found = totals(Config.fromfile(find_config(name)), LENGTH)
        cards = [_card(max(column)) if None not in column else None
                 for column in zip(*found.values(), strict=True)]  # fmt: skip
        first = next(i for i, card in enumerate(cards) if card)
        gpus, zero = SETUPS[first]
        goal = f"{gpus} x {cards[first]}{_with(zero)}"
        meant.append((name, goal, *(card or "-" for card in cards)))
        for (stage, batch), sizes in found.items():
            needs.append((name, stage, batch, *(_gb(s) if s is not None else "-" for s in sizes)))
    return TEXT.format(
        length=LENGTH,
        usable=f"{USABLE:.0%}",
        cards=", ".join(map(str, CARDS)),
        meant=markdown(["config", "meant for", *named], meant),
        needs=markdown(["config", "stage", "samples x tokens", *named], needs),
    )


TEXT = """# What the configs need

Computed by `python tools/memory.py --table docs/memory.md`, not measured. The same tool shows one
config part by part (weights, gradients, optimizer, buffers, activations), with any number of GPUs,
length of the samples and settings:
`python tools/memory.py CONFIG --gpus 8 --zero 2 --length 1024 --cfg-options tune.batch_size=1`.

Samples are {length} tokens long with their images (of the stage's `max_length` where that is less),
which is the most there can be in `tune`. Micro-batches are the config's; a smaller
`<stage>.batch_size` needs less, and `global_batch_size` stays. Activations are computed again in
the backward pass, as the configs say. Where no ZeRO stage is named, DeepSpeed is not used.

## GPUs that they are meant for

The smallest cards ({cards} GB) that take all stages, each at most {usable} of a card. A config is
meant for the first set-up that there is, which has the fewest GPUs.

{meant}

## GB on each GPU

{needs}
"""


def _with(zero: int) -> str:
    return f", ZeRO-{zero}" if zero else ""


def _card(size: float) -> str | None:
    return next((f"{card} GB" for card in CARDS if size <= USABLE * card * 2**30), None)


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f}"


def main() -> None:
    """Print the table of one config, or write that of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="path or name of a config")
    parser.add_argument("--table", type=Path, metavar="FILE",
                        help="write the table of all configs; nothing else counts")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2,
                        help="DeepSpeed's ZeRO stage; 0: without DeepSpeed")  # fmt: skip
    parser.add_argument("--length", type=int,
                        help="tokens of a sample with its images (default: max_length, the most "
                        "there can be; captions are some 60 tokens and their image)")  # fmt: skip
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    check_options(sys.argv[1:])
    arguments = parser.parse_args()
    if bool(arguments.config) == bool(arguments.table):
        parser.error("give a config, or --table FILE for all of them")
    if arguments.gpus < 1 or (arguments.length or 1) < 1:
        parser.error("--gpus and --length are numbers from 1 on")

    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.files import write_text

    with cli_errors():
        if arguments.table:
            write_text(arguments.table, page(config_names()))
        else:
            show(arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the table of one config."""
    from dpa_xtuner.stages.settings import config_from_file
    from dpa_xtuner.tables import markdown

    cfg = config_from_file(find_config(arguments.config), arguments.cfg_options)
    rows = table(cfg, arguments.gpus, arguments.zero, arguments.length)
    how = f"ZeRO-{arguments.zero}" if arguments.zero else "no DeepSpeed"
    length = f"{arguments.length} tokens" if arguments.length else "samples of max_length"
    print(f"{cfg.llm_name_or_path}: GB on each of {arguments.gpus} GPUs, {how}, {length}\n")
    print(markdown(COLUMNS, rows))
    kept = "kept" if cfg.model.get("use_activation_checkpointing", True) else "computed again"
    print(f"\nIn brackets: the activations if they were {kept}.")
    print(f"A stage fits into a card where it takes at most {USABLE:.0%} of it.")


if __name__ == "__main__":
    main()
