"""From log-probabilities to the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.loss.head import TokenLogProbs
from dpa_xtuner.loss.weighting import WeightingScheme

EPS = 1e-6
"""Added to the sum of weights, as in the authors' code."""

NORMALIZE = ("micro_batch", "global")


class RelevanceLoss(NamedTuple):
    """The loss of a micro-batch, its weights and its sums.

    Attributes:
        loss: scalar, with a graph.
        weights: (N,), one per supervised token.
        sums: float64 scalars without a graph, over the tokens, for :func:`statistics`:
            ``supervised_tokens``, ``weight``, ``weighted`` (w CE) and ``cross_entropy``; from
            a contrast pass also ``at_d_min``, ``at_d_max`` (tokens, before pooling) and
            ``p_difference`` (p_w - p_wo).
    """

    loss: Tensor
    weights: Tensor
    sums: dict[str, Tensor]


def relevance_loss(
    log_probs: TokenLogProbs,
    no_image: TokenLogProbs | None,
    supervised: Tensor,
    scheme: WeightingScheme,
    normalize: str = "micro_batch",
) -> RelevanceLoss:
    """Compute sum_j w_j CE_j / (sum_j w_j + 1e-6) over N supervised tokens (arXiv 2509.14735).

    Args:
        log_probs: from the ordinary pass; gradients flow through its cross entropy only.
        no_image: from the contrast pass; None for a scheme that needs none.
        supervised: (B, T) bool, true at the N tokens, row by row.
        scheme: from :func:`dpa_xtuner.loss.build_scheme`.
        normalize: ``"micro_batch"`` divides by this micro-batch's own weights, so that a token
            counts for more in a micro-batch of short answers. ``"global"`` gives the same value,
            but the gradient of the sum: :class:`dpa_xtuner.engine.hooks.OptimizerStepHook` divides
            it by the weights of the whole optimizer step.

    Returns:
        The loss; without a supervised token exactly 0, with a graph.

    Raises:
        DPAError: ``normalize`` is unknown.
    """
    if normalize not in NORMALIZE:
        raise DPAError(
            f"normalize={normalize!r}{nearest(normalize, NORMALIZE)}; expected 'global' (over the "
            f"whole optimizer step) or 'micro_batch' (as stock XTuner)."
        )
    weights, relevance = scheme.weights(log_probs, no_image, supervised)  # (N,), (N,) or None
    total = (weights * log_probs.cross_entropy).sum()  # scalar
    loss = total / (weights.sum() + EPS)
    if normalize == "global":  # the value of the quotient, the gradient of the sum
        loss = loss.detach() + (total - total.detach())
    with torch.no_grad():
        per_token = {
            "supervised_tokens": torch.ones_like(weights),
            "weight": weights,
            "weighted": weights * log_probs.cross_entropy,
            "cross_entropy": log_probs.cross_entropy,
        }
        if relevance is not None and no_image is not None:
            per_token["at_d_min"] = relevance <= scheme.d_min
            per_token["at_d_max"] = relevance >= scheme.d_max
            per_token["p_difference"] = log_probs.probability - no_image.probability
        sums = {name: values.double().sum() for name, values in per_token.items()}
    return RelevanceLoss(loss, weights, sums)


FIGURES = (
    "loss", "cross_entropy", "mean_weight", "supervised_tokens",
    "share_at_d_min", "share_at_d_max", "mean_p_difference",
)  # fmt: skip
"""Names of the log's figures."""


def statistics(sums: dict) -> dict:
    """Compute the log's figures from the sums of any number of micro-batches.

    Args:
        sums: those of :class:`RelevanceLoss`, added up; tensors or numbers.

    Returns:
        ``loss`` (weighted, over all tokens), ``cross_entropy`` (unweighted mean, to compare
        with vanilla runs), ``mean_weight`` and ``supervised_tokens``; from a contrast pass also
        ``share_at_d_min``, ``share_at_d_max`` and ``mean_p_difference``.
    """
    # Without a token every sum is 0: divide by 1, so that every figure is 0 too.
    tokens = sums["supervised_tokens"] + (sums["supervised_tokens"] == 0)
    figures = {
        "loss": sums["weighted"] / (sums["weight"] + EPS),
        "cross_entropy": sums["cross_entropy"] / tokens,
        "mean_weight": sums["weight"] / tokens,
        "supervised_tokens": sums["supervised_tokens"],
    }
    if "p_difference" in sums:
        figures["share_at_d_min"] = sums["at_d_min"] / tokens
        figures["share_at_d_max"] = sums["at_d_max"] / tokens
        figures["mean_p_difference"] = sums["p_difference"] / tokens
    return figures
