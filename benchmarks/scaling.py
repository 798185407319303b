"""Simulate many ranks: how even the sampler's work is, and what the ranks send each other.

    python benchmarks/scaling.py

prints the tables of docs/scaling.md. The micro-batches are those that ``GroupedSampler`` forms; the
lengths are drawn, some of them from those of published captions. Nothing is timed.
"""

import argparse
import json
import logging
import math
import random
from pathlib import Path
from typing import NamedTuple

from packing import (
    CONFIG,
    IMAGE_TOKENS,
    Sample,
    Stage,
    deal_out,
    draw,
    measure,
    savings,
)

from dpa_xtuner.layout import ALIGN, PROXY, TUNE
from dpa_xtuner.tables import markdown

# Ranks, and what a rank does in a step: micro-batches of so many samples. 256 samples a step are
# the paper's; 2,048 are for many GPUs.
SETUPS = {PROXY: ((1, 32, 8), (8, 1, 32), (8, 4, 8), (64, 1, 4), (64, 4, 1), (64, 4, 8))}
SETUPS |= {ALIGN: SETUPS[PROXY], TUNE: ((1, 64, 4), (8, 8, 4), (64, 1, 4), (64, 4, 1), (64, 8, 4))}
PEAK, SHARE = 989e12, 0.45  # an H100's dense bfloat16 FLOP/s, and the share that we aim at
LINKS = {8: 450e9, 64: 50e9}  # bytes/s each way: NVLink 4, and 400 Gbit/s of network a GPU


class Evenness(NamedTuple):
    """Shares of the ranks' time that are lost, where time is padded tokens.

    Attributes:
        padding: padded tokens that are none.
        per_step: padding, and waiting at the end of each step (DDP, ZeRO-1).
        per_micro_batch: padding, and waiting after each micro-batch (ZeRO-2 and 3).
    """

    padding: float
    per_step: float
    per_micro_batch: float


def evenness(dealt: list[list[list[Sample]]], counts: int) -> Evenness:
    """Count what is lost.

    Args:
        dealt: of each rank, its micro-batches.
        counts: micro-batches of a rank in a step.
    """
    useful = sum(s.text + s.images for parts in dealt for part in parts for s in part)
    padded = [
        [len(part) * max((s.text + s.images for s in part), default=0) for part in parts]
        for parts in dealt
    ]
    each = sum(max(column) for column in zip(*padded, strict=True))
    steps = range(0, len(padded[0]), counts)
    ends = sum(max(sum(row[k : k + counts]) for row in padded) for k in steps)
    everything = sum(map(sum, padded))
    ranks = len(dealt)
    return Evenness(*(1 - useful / x for x in (everything, ranks * ends, ranks * each)))


def long_captions(count: int, images: int) -> list[Sample]:
    """Draw captions of some 180 tokens, log-normal with sigma 0.3.

    ShareGPT4V's have 826 characters on average (arXiv 2311.12793). The spread of 23 captions from
    datasets/LocNar_Eval/data.jsonl in github.com/google/imageinwords is 0.29.
    """
    rng = random.Random(0)
    drawn = (rng.lognormvariate(math.log(180), 0.3) for _ in range(count))
    return [Sample(0, round(min(500, max(40, length))), images) for length in drawn]


def published_captions(name: str, count: int, images: int) -> list[Sample]:
    """Draw from the lengths of published captions, in tokens of SmolLM2's tokenizer and one end.

    lengths.json: ``coco``, the captions 506529 - 537483 of COCO's captions_val2014.json (155 in a
    row); ``iiw``, the first 42 human descriptions of datasets/DCI_TEST/data.jsonl in
    github.com/google/imageinwords.
    """
    lengths = json.loads(Path(__file__).with_name("lengths.json").read_text())[name]
    return [Sample(0, n, images) for n in random.Random(0).choices(lengths, k=count)]


def data_of(count: int) -> dict[str, tuple[str, list[Sample]]]:
    """Draw each kind of data: by name, the stage and ``count`` samples."""
    return {
        "proxy, captions of 20 - 80 tokens": (PROXY, draw(PROXY, count)),
        "proxy, captions of about 180": (PROXY, long_captions(count, 0)),
        "align, captions of 20 - 80": (ALIGN, draw(ALIGN, count)),
        "align, captions of about 180": (ALIGN, long_captions(count, IMAGE_TOKENS)),
        "proxy, COCO's captions": (PROXY, published_captions("coco", count, 0)),
        "align, COCO's captions": (ALIGN, published_captions("coco", count, IMAGE_TOKENS)),
        "proxy, ImageInWords": (PROXY, published_captions("iiw", count, 0)),
        "align, ImageInWords": (ALIGN, published_captions("iiw", count, IMAGE_TOKENS)),
        "tune, instructions": (TUNE, draw(TUNE, count)),
    }


def evenness_table(steps: int) -> str:
    """Tabulate what is lost, with samples dealt one by one and as they are dealt now.

    Those who wait after each micro-batch are dealt otherwise than those who wait at a step's end.
    """
    rows = []
    for ranks, kind in ((r, k) for r in (1, 8, 64) for k in data_of(1)):
        stage = data_of(1)[kind][0]
        for setup, counts, size in SETUPS[stage]:
            if setup != ranks:
                continue
            per_step = ranks * counts * size
            samples = data_of(max(2, steps * 256 // per_step) * per_step)[kind][1]
            before, at_end, each = (
                evenness(deal_out(samples, size, ranks, per_step, *how), counts)
                for how in ((False,), (True, False), (True, True))
            )
            pairs = (
                (before.padding, at_end.padding),
                (before.per_step, at_end.per_step),
                (before.per_micro_batch, each.per_micro_batch),
            )
            cells = (f"{share:.1%}" for pair in pairs for share in pair)
            rows.append([kind, str(ranks), f"{counts} x {size}", *cells])
    header = ["data", "ranks", "micro-batches"]
    for name in ("padding", "lost per step", "lost per micro-batch"):
        header += [f"{name}, before", "now"]
    return markdown(header, rows)


def sent(zero: int, ranks: int, counts: int, trained: int, weights: int, passes: int) -> float:
    """Return the bytes that each rank receives in an optimizer step (and sends as many).

    Rajbhandari et al. (arXiv 1910.02054, section 7): reducing and spreading n numbers costs a
    rank n each. ZeRO-1 reduces gradients and gathers new weights once a step. ZeRO-2 reduces after
    each micro-batch. ZeRO-3 gathers all weights, the frozen ones too, for each pass over them, and
    needs no gathering at the end.

    Args:
        zero: the stage of ZeRO.
        ranks: how many there are.
        counts: micro-batches of a rank in a step.
        trained: number of trained weights.
        weights: number of all weights.
        passes: passes over the weights in a micro-batch: forward, backward, and contrast.
    """
    numbers = {
        1: 2 * trained,
        2: (counts + 1) * trained,
        3: counts * (trained + passes * weights),
    }[zero]
    return 2 * numbers * (ranks - 1) / ranks  # bfloat16


def sending_table(costs: dict[str, Stage], steps: int) -> str:
    """Tabulate bytes and expected seconds of a step of ``dpa_internlm2_7b``."""
    from mmengine.config import Config

    from dpa_xtuner.planning.memory import stage_models

    rows = []
    for name, model in stage_models(Config.fromfile(CONFIG, import_custom_modules=False)).items():
        numbers = model.counts
        passes = 2 + (costs[name].contrast is not None)
        for ranks, counts, size in SETUPS[name]:
            if ranks == 1 or ranks * counts * size != 256:
                continue
            samples = draw(name, steps * 256)
            for zero in (1, 2, 3):
                dealt = deal_out(samples, size, ranks, 256, wait_each=zero > 1)
                batches = (part for parts in dealt for part in parts)
                ideal = savings(costs[name], batches)["all"] / steps / ranks / (PEAK * SHARE)
                lost = evenness(dealt, counts)
                wait = lost.per_step if zero == 1 else lost.per_micro_batch
                compute = ideal * (1 - lost.padding) / (1 - wait)
                volume = sent(
                    zero, ranks, counts, numbers.trained, numbers.trained + numbers.frozen, passes
                )
                rows.append([
                    name, str(ranks), f"{counts} x {size}", str(zero), f"{volume / 1e9:.2f}",
                    f"{volume / LINKS[ranks]:.2f}", f"{compute:.2f}",
                ])  # fmt: skip
    header = ["stage", "ranks", "micro-batches", "ZeRO", "GB received a rank", "s, sending",
              "s, computing"]  # fmt: skip
    return markdown(header, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 256 samples")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # the sampler logs
    print(evenness_table(args.steps))
    costs = {stage: measure(stage) for stage in (PROXY, ALIGN, TUNE)}
    print(f"\n{sending_table(costs, min(10, args.steps))}")


if __name__ == "__main__":
    main()
