"""The cross entropy of held-out captions, per token."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_dist_info
from torch import Tensor, nn

from dpa_xtuner.data import collate
from dpa_xtuner.loss.head import TokenLogProbs
from dpa_xtuner.loss.objective import IGNORE_INDEX


class HeldOutModel(Protocol):
    """What the measurement asks of a model; both models of this package have it."""

    training: bool
    data_preprocessor: nn.Module

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode."""

    def log_probs(self, data: dict) -> TokenLogProbs:
        """Return the log-probabilities of a batch's supervised tokens."""


@torch.no_grad()
def cross_entropy_per_token(
    model: HeldOutModel,
    dataset,
    batch_size: int,
    amp: torch.autocast,
    ask: Callable[[dict], TokenLogProbs] | None = None,
) -> float:
    """Average the cross entropy of a data set's supervised tokens, each sample's first left out.

    Each rank takes its share of the batches, and all take the same number, as ZeRO-3 needs.

    Args:
        model: not wrapped; keeps its mode.
        dataset: a :class:`dpa_xtuner.data.DPADataset`.
        batch_size: samples at a time on a device.
        amp: context to compute in.
        ask: gives a batch's log-probabilities; by default the model's own.

    Returns:
        Nats per token over all ranks.
    """
    rank, world = get_dist_info()
    every = range(len(dataset))
    batches = [every[i : i + batch_size] for i in every[::batch_size]]
    total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    training = model.training
    model.train(False)
    for start in range(0, len(batches), world):
        mine = start + rank
        batch = collate([dataset[i] for i in batches[min(mine, len(batches) - 1)]])
        data = model.data_preprocessor(batch, False)["data"]
        data = data | {"labels": without_first(data["labels"])}
        with amp:
            losses = (ask or model.log_probs)(data).cross_entropy  # (N,)
        if mine < len(batches):
            total += torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
    model.train(training)
    total = total.to(get_device())
    all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


def without_first(labels: Tensor) -> Tensor:
    """Return labels (B, T) with the first supervised token of each row ignored; a new tensor."""
    first = (labels != IGNORE_INDEX).int().argmax(dim=1, keepdim=True)  # (B, 1)
    return labels.scatter(1, first, IGNORE_INDEX)
