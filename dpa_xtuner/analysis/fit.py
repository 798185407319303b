"""A proxy that is fitted quickly, to learn how well a LoRA can write like some captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from mmengine.device import get_device
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpa_xtuner.analysis.cross_entropy import Cost, caption_cost
from dpa_xtuner.data import DPADataset, collate
from dpa_xtuner.model.proxy_llm import ProxyLLM
from dpa_xtuner.precision import Precision

BATCH = 8
"""Captions of a step."""
LOWEST_RATE = 2e-4
"""The least learning rate: that of a run is often meant for batches of 256 and many steps."""
LOOK = 20
"""Steps between two measurements of the held-out captions."""
NEAR = 0.01
"""A cost within 1 % of the best counts as equal."""


@dataclass(frozen=True)
class Fit:
    """How a fit went.

    Attributes:
        curve: held-out nats per token by optimizer step; step 0 is the original LLM.
        original: what the held-out captions cost that.
        best: what they cost at the best step.
    """

    curve: dict[int, float]
    original: Cost
    best: Cost

    @property
    def floor(self) -> float:
        """Held-out nats per token at the best step."""
        return min(self.curve.values())

    @property
    def best_step(self) -> int:
        """The step of the floor."""
        return min(self.curve, key=self.curve.__getitem__)

    @property
    def over_fits(self) -> bool:
        """Whether it ended more than 1 % above its floor."""
        return list(self.curve.values())[-1] > (1 + NEAR) * self.floor

    @property
    def converged(self) -> bool:
        """Whether the last two looks brought no more than 1 %."""
        values = list(self.curve.values())
        return len(values) > 2 and min(values[-2:]) > (1 - NEAR) * min(values[:-2])

    @property
    def verdict(self) -> str:
        """How far to believe it, in words."""
        last = max(self.curve)
        if self.over_fits:
            return f"over-fits after step {self.best_step}"
        if self.converged:
            return f"converged by step {last}"
        return f"still falling at step {last}: give more --steps"


def fit(
    model: ProxyLLM,
    train: DPADataset,
    held_out: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    steps: int,
    rate: float,
) -> Fit:
    """Train a proxy's adapter on captions until held-out ones get no cheaper.

    Plain AdamW at a constant rate, in batches of :data:`BATCH` drawn by a fixed seed. It ends when
    two looks in a row brought no more than 1 %.

    Args:
        model: with its adapter; trained in place.
        train: the captions, without pictures.
        held_out: samples that are not among them.
        tokenizer: that made their tokens.
        precision: what to compute in.
        steps: of the optimizer, at most.
        rate: learning rate, raised to :data:`LOWEST_RATE`.
    """
    device = get_device()
    model.to(device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, max(rate, LOWEST_RATE), weight_decay=0.0)
    draw = np.random.default_rng(0)
    original = caption_cost(model, held_out, tokenizer, precision)
    found = Fit({0: original.per_token}, original, best=original)
    order: list[int] = []
    model.train()
    progress = tqdm(range(1, steps + 1), "Fitting a proxy", unit="step", delay=2)
    for step in progress:
        if len(order) < BATCH:
            order += draw.permutation(len(train)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        batch = collate([train.text(index) for index in rows])
        data = model.data_preprocessor(batch, True)["data"]
        with precision.autocast(device):
            loss = model.log_probs(data).cross_entropy.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOOK and step < steps:
            continue
        cost = caption_cost(model, held_out, tokenizer, precision)
        found.curve[step] = cost.per_token
        progress.set_postfix_str(f"held-out captions: {cost.per_token:.3f} nats per token")
        if found.best_step == step:
            found = replace(found, best=cost)
        if found.converged:
            break
    progress.close()
    return found


def recommend(fits: Mapping[int, Fit]) -> int:
    """Return the smallest rank whose floor is within 1 % of the best.

    Args:
        fits: by rank.
    """
    best = min(each.floor for each in fits.values())
    return min(rank for rank, each in fits.items() if each.floor <= (1 + NEAR) * best)
