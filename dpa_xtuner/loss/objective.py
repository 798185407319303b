"""The loss of a batch, as both models compute it."""

import logging

from mmengine.logging import print_log
from torch import Tensor

from dpa_xtuner.loss.head import TokenLogProbs
from dpa_xtuner.loss.relevance import relevance_loss, statistics
from dpa_xtuner.loss.weighting import build_scheme

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in PyTorch and XTuner."""


def supervised_mask(labels: Tensor) -> Tensor:
    """Return (B, T - 1) bool, true if the token *after* a position is supervised.

    Args:
        labels: (B, T) int64.
    """
    return labels[:, 1:] != IGNORE_INDEX


class Objective:
    """A weighting scheme, the normalisation of its loss, and the sums of an optimizer step.

    Args:
        loss: see :func:`dpa_xtuner.loss.build_scheme`.
        normalize: see :func:`dpa_xtuner.loss.relevance_loss`.

    Attributes:
        scheme: the weighting scheme.
        normalize: as given.
        seen: the sums of :class:`dpa_xtuner.loss.RelevanceLoss`, ``micro_batch_loss`` and
            ``micro_batches`` over this rank's micro-batches of the current step;
            :class:`dpa_xtuner.engine.hooks.OptimizerStepHook` reads and empties it.

    Raises:
        DPAError: ``loss`` can't be used.
    """

    def __init__(self, loss: str | dict, normalize: str):
        self.scheme, self.normalize = build_scheme(loss), normalize
        self.seen: dict[str, Tensor] = {}

    def __call__(
        self, log_probs: TokenLogProbs, no_image: TokenLogProbs | None, data: dict
    ) -> dict[str, Tensor]:
        """Compute the loss and what goes into the log.

        Args:
            log_probs: from the ordinary pass, for the batch's N supervised tokens.
            no_image: from the contrast pass, if the scheme needs one.
            data: a batch of :func:`dpa_xtuner.data.collate`.

        Returns:
            ``loss`` and the other figures of :func:`dpa_xtuner.loss.statistics`.
        """
        supervised = supervised_mask(data["labels"])
        if no_image is not None:
            # Without an image both passes must agree to the last bit, so take the same numbers.
            has_image = data["image_mask"].any(1, keepdim=True)  # (B, 1)
            has_image = has_image.expand_as(supervised)[supervised]  # (N,)
            no_image = no_image.where(has_image, log_probs.detach())
        if not len(log_probs.cross_entropy) and data["ids"]:
            names = ", ".join(repr(name) for name in data["ids"])
            print_log(
                f"The samples {names} have no supervised token: they train nothing.",
                "current",
                logging.WARNING,
            )
        loss, _, sums = relevance_loss(log_probs, no_image, supervised, self.scheme, self.normalize)
        counted = sums["weight"].new_tensor(1.0)
        more = {"micro_batch_loss": loss.detach().double(), "micro_batches": counted}
        for name, value in (sums | more).items():
            self.seen[name] = self.seen[name] + value if name in self.seen else value
        return statistics(sums) | {"loss": loss}
