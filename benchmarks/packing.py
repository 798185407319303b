"""Count what sharing rows between samples would save of a training step's operations.

A row that holds several samples holds less padding, and its attention spans more positions. The
counts are those of InternLM2.5-7B with 32 layers and activation checkpointing, for the
micro-batches that the sampler forms with the batch sizes of a config:

    python benchmarks/packing.py
"""

import argparse
import functools
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from mmengine.config import Config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import dpa_xtuner.plugin  # noqa: F401  # before peft is imported
from dpa_xtuner.data import sampler as sampler_module
from dpa_xtuner.data.sampler import NOTHING, GroupedSampler, deal
from dpa_xtuner.families.base import LLAMA_LAYERS
from dpa_xtuner.layout import ALIGN, PROXY, TUNE
from dpa_xtuner.model.llm import add_lora, base_model, decode
from dpa_xtuner.tables import markdown

CONFIG = Path(__file__).parents[1] / "configs" / "dpa_internlm2_7b.py"
IMAGE_TOKENS = 576  # CLIP ViT-L/14-336
LLM = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=92544,
    attn_implementation="eager",  # so that its products are counted
)
ENCODER = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    attn_implementation="eager",
)
# Records of the usual data: BLIP-LCS 558k, and LLaVA-1.5's or Cambrian's 700k instructions.
RECORDS = {PROXY: 558_000, ALIGN: 558_000, TUNE: 737_000}


class Sample(NamedTuple):
    """Tokens of a sample.

    Attributes:
        prompt: text tokens that are not supervised.
        supervised: text tokens that are.
        images: image tokens.
    """

    prompt: int
    supervised: int
    images: int

    @property
    def text(self) -> int:
        """All text tokens."""
        return self.prompt + self.supervised


class Cost(NamedTuple):
    """Operations of a decoder pass over rows of equal width.

    Attributes:
        per_token: of the linear layers, for each position.
        per_pair: of the attention, for each pair of positions of a row.
    """

    per_token: float
    per_pair: float

    def __call__(self, rows: int, width: int) -> float:
        """Return the operations of ``rows`` rows."""
        return rows * width * (self.per_token + width * self.per_pair)


class Stage(NamedTuple):
    """Operations of a stage's passes.

    Attributes:
        main: of the decoder in the ordinary pass, with recomputation and gradients.
        head: for each supervised token.
        image: of the encoder, for each image.
        contrast: of the decoder in the contrast pass; None where there is none.
    """

    main: Cost
    head: float
    image: float
    contrast: Cost | None


def draw(stage: str, count: int) -> list[Sample]:
    """Draw samples of realistic lengths.

    Captions have 20 - 80 tokens. Instructions have a question and chat tokens of 20 - 70; a third
    of the answers has 2 - 4 tokens, a third 15 - 59, a third 120 - 400; a fifth has no image.

    Args:
        stage: of which the data is.
        count: of samples.
    """
    rng = random.Random(0)
    if stage != TUNE:
        images = IMAGE_TOKENS if stage == ALIGN else 0
        return [Sample(0, rng.randint(20, 80), images) for _ in range(count)]
    answers = ((2, 4), (15, 59), (120, 400))
    return [
        Sample(
            rng.randint(20, 70),
            rng.randint(*rng.choice(answers)),
            IMAGE_TOKENS * (rng.random() < 0.8),
        )
        for _ in range(count)
    ]


def deal_out(
    samples: list[Sample],
    batch_size: int,
    ranks: int,
    per_step: int,
    level: bool = True,
    wait_each: bool = False,
) -> list[list[list[Sample]]]:
    """Deal an epoch's samples to the ranks, by the sampler of training.

    Args:
        samples: of the data set.
        batch_size: samples of a micro-batch, on average.
        ranks: how many there are.
        per_step: the global batch size.
        level: whether several ranks get about as many tokens, as in training with
            ``normalize="global"``; else they get the samples one by one.
        wait_each: whether they wait for each other after each micro-batch (ZeRO-2 and 3).

    Returns:
        Of each rank its micro-batches; of an unfilled last step, some are empty.
    """
    # Samples without an image have a negative length, and form their own batches.
    data = _Lengths([s.text + s.images if s.images else -s.text for s in samples])
    level = level and ranks > 1
    places = 4 * batch_size if level else batch_size  # as stages/build.py sets them
    how = dict(micro_batch_size=batch_size, most=places, wait_each=wait_each) if level else {}
    once = functools.cache(deal)  # not anew for each rank
    dealt = []
    for rank in range(ranks):
        where = "xtuner.dataset.samplers.length_grouped.get_dist_info"
        with mock.patch(where, return_value=(rank, ranks)):
            sampler = GroupedSampler(
                data, per_step // ranks, "modality_length", mega_batch_mult=1, seed=42, **how
            )
        with mock.patch.object(sampler_module, "deal", lambda *a: once(tuple(a[0]), *a[1:])):
            order = list(sampler)
        cut = (order[start : start + places] for start in range(0, len(order), places))
        dealt.append([[samples[i] for i in part if i != NOTHING] for part in cut])
    return dealt


def micro_batches(samples: list[Sample], batch_size: int, ranks: int, per_step: int) -> Iterator:
    """Yield the micro-batches of all ranks that are not empty; see :func:`deal_out`."""
    for parts in deal_out(samples, batch_size, ranks, per_step):
        yield from (part for part in parts if part)


class _Lengths:
    def __init__(self, lengths: list[int]):
        self.modality_length = lengths

    def __len__(self) -> int:
        return len(self.modality_length)


def pack(lengths: list[int], cost: Cost) -> float:
    """Return the operations of the cheapest rows, shared or not.

    The longest samples are placed first, each in the first row that has room, for every width
    from the longest sample's to twice that at which rows come out full.

    Args:
        lengths: tokens of each sample.
        cost: of a pass.
    """
    longest, total = max(lengths), sum(lengths)
    widths = {min(max(longest, -(-total // rows)), 2 * longest) for rows in range(1, len(lengths))}
    best = cost(len(lengths), longest)
    for width in widths | {longest}:
        filled: list[int] = []
        for length in sorted(lengths, reverse=True):
            fits = (row for row, used in enumerate(filled) if used + length <= width)
            row = next(fits, len(filled))
            if row == len(filled):
                filled.append(0)
            filled[row] += length
        best = min(best, cost(len(filled), max(filled)))
    return best


def fit(count: Callable[[int, int], int]) -> Cost:
    """Find the cost of a pass from counts at two widths, and check it at a third.

    Args:
        count: counts the operations of so many rows of a width.
    """
    (narrow, wide), (few, many) = (64, 128), (count(1, 64), count(1, 128))
    per_pair = (many / wide - few / narrow) / (wide - narrow)
    cost = Cost(few / narrow - narrow * per_pair, per_pair)
    assert math.isclose(count(3, 200), cost(3, 200), rel_tol=1e-4), "not the formula"
    return cost


def count_operations(work: Callable[[], object]) -> int:
    """Count the operations of matrix products, multiplications and additions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(stage: str) -> Stage:
    """Count the operations of a stage's passes on fake tensors.

    Args:
        stage: trains the LLM by LoRA (proxy), in full (tune), or not at all (align).
    """
    with torch.device("meta"):
        llm: nn.Module = LlamaForCausalLM(LLM).requires_grad_(stage == TUNE)
        encoder = CLIPVisionModel(ENCODER).requires_grad_(False)
        if stage == PROXY:
            from peft import LoraConfig  # after dpa_xtuner, which works around bitsandbytes

            llm = add_lora(llm, LoraConfig(r=256, target_modules=list(LLAMA_LAYERS)))
    with FakeTensorMode(allow_non_fake_inputs=True):  # a CPU's operations, without its memory
        llm.to_empty(device="cpu")
        encoder.to_empty(device="cpu")
        pixels = torch.empty(1, 3, ENCODER.image_size, ENCODER.image_size)

        def hidden(rows: int, width: int) -> torch.Tensor:
            embeds = torch.empty(rows, width, LLM.hidden_size, requires_grad=True)
            return decode(llm, {"inputs_embeds": embeds})

        def forward(rows: int, width: int) -> int:
            return count_operations(lambda: hidden(rows, width))

        def step(rows: int, width: int) -> int:
            # Checkpointing computes the layers again before their gradients.
            both = count_operations(lambda: hidden(rows, width).sum().backward())
            return forward(rows, width) + both

        # A frozen head: its product and the hidden state's gradient. A trained head forms the
        # logits again, and its own gradient.
        products = 4 if base_model(llm).lm_head.weight.requires_grad else 2
        head = products * 2 * LLM.hidden_size * LLM.vocab_size
        if stage == PROXY:
            return Stage(fit(step), head, 0, None)
        return Stage(fit(step), head, count_operations(lambda: encoder(pixels)), fit(forward))


def savings(cost: Stage, batches: Iterator[list[Sample]]) -> dict[str, float]:
    """Add up the operations of a stage, and what shared rows save of them.

    Args:
        cost: of its passes.
        batches: its micro-batches.
    """
    sums = dict.fromkeys(("all", "main", "contrast", "places", "padding"), 0.0)
    for batch in batches:
        lengths = [sample.text + sample.images for sample in batch]
        places = len(lengths) * max(lengths)
        sums["places"] += places
        sums["padding"] += places - sum(lengths)
        padded = cost.main(len(lengths), max(lengths))
        sums["all"] += padded + sum(sample.supervised for sample in batch) * cost.head
        sums["all"] += sum(sample.images > 0 for sample in batch) * cost.image
        sums["main"] += padded - pack(lengths, cost.main)
        texts = [sample.text for sample in batch if sample.images]
        if cost.contrast and texts:
            padded = cost.contrast(len(texts), max(texts))
            answered = sum(sample.supervised for sample in batch if sample.images)
            sums["all"] += padded + answered * 2 * LLM.hidden_size * LLM.vocab_size
            sums["contrast"] += padded - pack(texts, cost.contrast)
    return sums


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each stage")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # the sampler logs
    config = Config.fromfile(CONFIG, import_custom_modules=False)
    costs = {stage: measure(stage) for stage in RECORDS}
    rows = []
    for ranks in (1, 8):
        run = dict.fromkeys(("all", "main", "contrast"), 0.0)
        for stage, cost in costs.items():
            size, per_step = config[stage].batch_size, config[stage].global_batch_size
            samples = draw(stage, args.steps * per_step)
            sums = savings(cost, micro_batches(samples, size, ranks, per_step))
            for key in run:
                run[key] += sums[key] * RECORDS[stage] / len(samples)
            padding = f"{sums['padding'] / sums['places']:.1%}"
            rows.append([stage, ranks, padding, *_shares(sums)])
        rows.append(["the whole run", ranks, "", *_shares(run)])
    header = ["stage", "ranks", "padding", "saved, main pass", "saved, contrast pass"]
    print(markdown(header, [[str(cell) for cell in row] for row in rows]))


def _shares(sums: dict[str, float]) -> list[str]:
    return [f"{sums[key] / sums['all']:.2%}" for key in ("main", "contrast")]


if __name__ == "__main__":
    main()
