"""Plain next-token cross entropy."""

import torch.nn.functional as F
from torch import Tensor

from dpa_xtuner.registry import LOSSES


@LOSSES.register_module()
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross entropy over the supervised tokens.

    Args:
        logits: (N, V), any floating dtype, one row per supervised token.
        targets: (N,), int64, the token that stands at each position.

    Returns:
        A float32 scalar. With N = 0 it is exactly 0 and still carries a graph, so that
        a rank whose batch has no supervised token takes part in the step.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="sum")
    return losses / max(len(targets), 1)
