"""What each stage of a config needs on every GPU, as a Markdown table.

Nothing is loaded: models are counted by their published configuration, from a local folder, the
hub, or the sizes that come with this package.

    python tools/memory.py dpa_internlm2_7b --gpus 8 --zero 2 --length 1024
"""

from __future__ import annotations

import argparse

from _configs import find_config
from mmengine.config import Config, DictAction

CARDS = (24, 40, 80)  # GB
USABLE = 0.9  # of a card; the rest is for CUDA itself and for what fragmentation wastes
COLUMNS = ("stage", "trained", "frozen", "weights", "gradients", "optimizer", "buffers",
           "activations", "total", "fits into")  # fmt: skip


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
        fitting = [f"{card} GB" for card in CARDS if memory.total <= USABLE * card * 2**30]
        numbers = [*map(_gb, parts), activations, _gb(memory.total)]
        rows.append((name, *counts, *numbers, fitting[0] if fitting else "none of them"))
    return rows


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2,
                        help="DeepSpeed's ZeRO stage; 0: without DeepSpeed")  # fmt: skip
    parser.add_argument("--length", type=int,
                        help="tokens of a sample with its images (default: max_length, the most "
                        "there can be; captions are some 60 tokens and their image)")  # fmt: skip
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    arguments = parser.parse_args()
    if arguments.gpus < 1 or (arguments.length or 1) < 1:
        parser.error("--gpus and --length are numbers from 1 on")
    cfg = Config.fromfile(find_config(arguments.config))
    cfg.merge_from_dict(arguments.cfg_options)

    from dpa_xtuner import DPAError

    try:
        rows = table(cfg, arguments.gpus, arguments.zero, arguments.length)
    except DPAError as error:
        raise SystemExit(str(error)) from None
    how = f"ZeRO-{arguments.zero}" if arguments.zero else "no DeepSpeed"
    length = f"{arguments.length} tokens" if arguments.length else "samples of max_length"
    print(f"{cfg.llm_name_or_path}: GB on each of {arguments.gpus} GPUs, {how}, {length}\n")
    for row in (COLUMNS, ("---",) * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")
    kept = "kept" if cfg.model.get("use_activation_checkpointing", True) else "computed again"
    print(f"\nIn brackets: the activations if they were {kept}.")
    print(f"A stage fits into a card where it takes at most {USABLE:.0%} of it.")


if __name__ == "__main__":
    main()
