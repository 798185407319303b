"""From scores to the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.loss.scores import TokenScores

EPS = 1e-6
"""Added to the sum of weights, as in the authors' code."""

NORMALIZE = ("micro_batch", "global")


class RelevanceLoss(NamedTuple):
    """The loss of a micro-batch and what it was made of.

    Attributes:
        loss: scalar with a graph.
        weights: (N,), one per supervised token.
        stats: scalars for the log, without a graph: ``cross_entropy`` (unweighted mean, to
            compare with vanilla runs), ``mean_weight`` and ``supervised_tokens``; from a
            contrast pass also ``share_at_d_min``, ``share_at_d_max`` (of the tokens, before
            pooling) and ``mean_p_difference`` (mean of p_w - p_wo).
    """

    loss: Tensor
    weights: Tensor
    stats: dict[str, Tensor]


def relevance_loss(
    scores: TokenScores,
    without: TokenScores | None,
    supervised: Tensor,
    scheme,
    normalize: str = "micro_batch",
) -> RelevanceLoss:
    """sum_j w_j CE_j / (sum_j w_j + 1e-6) over the N supervised tokens (arXiv 2509.14735).

    Args:
        scores: of the ordinary pass; gradients flow through its cross entropy and nowhere else.
        without: of the contrast pass; None for a scheme that needs none.
        supervised: (B, T) bool with N true places, the tokens' own, row by row.
        scheme: from :func:`dpa_xtuner.loss.build_scheme`.
        normalize: ``"micro_batch"``; or ``"global"``: the value is the same, but the gradient
            is that of the sum alone, for whoever divides by the weights of a whole optimizer
            step (:class:`dpa_xtuner.hooks.GlobalNormalizationHook`).

    Returns:
        The loss; without a supervised token exactly 0, with a graph.

    Raises:
        DPAError: ``normalize`` is unknown.
    """
    check_normalize(normalize)
    weights, relevance = scheme.weights(scores, without, supervised)
    total = (weights * scores.cross_entropy).sum()
    loss = total / (weights.sum() + EPS)
    if normalize == "global":
        loss = loss.detach() + (total - total.detach())
    with torch.no_grad():
        count = scores.cross_entropy.new_tensor(len(weights))
        stats = {
            "cross_entropy": _mean(scores.cross_entropy),
            "mean_weight": _mean(weights),
            "supervised_tokens": count,
        }
        if relevance is not None:
            stats["share_at_d_min"] = _mean((relevance <= scheme.d_min).to(weights.dtype))
            stats["share_at_d_max"] = _mean((relevance >= scheme.d_max).to(weights.dtype))
            stats["mean_p_difference"] = _mean(scores.probability - without.probability)
    return RelevanceLoss(loss, weights, stats)


def check_normalize(normalize: str) -> None:
    """Refuse what :func:`relevance_loss` does not know.

    Raises:
        DPAError: ``normalize`` is unknown.
    """
    if normalize not in NORMALIZE:
        raise DPAError(
            f"normalize={normalize!r}{nearest(str(normalize), NORMALIZE)}; expected 'micro_batch' "
            f"(the authors' way) or 'global' (over the whole optimizer step)."
        )


def _mean(values: Tensor) -> Tensor:
    return values.detach().sum() / max(len(values), 1)
