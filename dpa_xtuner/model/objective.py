"""The loss as both models compute it from a batch's scores."""

import logging

from mmengine.logging import print_log
from torch import Tensor

from dpa_xtuner.loss import TokenScores, build_scheme, relevance_loss, statistics
from dpa_xtuner.loss.relevance import check_normalize
from dpa_xtuner.model.llm import supervised_places


class Objective:
    """A weighting scheme, how its loss is normalised, and what it has seen of an optimizer step.

    Args:
        loss: see :func:`dpa_xtuner.loss.build_scheme`.
        normalize: see :func:`dpa_xtuner.loss.relevance_loss`.

    Attributes:
        scheme: the weighting scheme.
        normalize: as given.
        seen: the sums of :class:`dpa_xtuner.loss.RelevanceLoss`, and ``micro_batch_loss`` and
            ``micro_batches``, of all micro-batches since it was last emptied, on this rank, for
            :class:`dpa_xtuner.hooks.OptimizerStepHook`.

    Raises:
        DPAError: one of the arguments can't be used.
    """

    def __init__(self, loss: str | dict, normalize: str):
        check_normalize(normalize)
        self.scheme, self.normalize = build_scheme(loss), normalize
        self.seen: dict[str, Tensor] = {}

    def __call__(
        self, scores: TokenScores, without: TokenScores | None, data: dict
    ) -> dict[str, Tensor]:
        """The loss and what goes into the log.

        Args:
            scores: of the ordinary pass.
            without: of the contrast pass, if the scheme needs one.
            data: a batch of :func:`dpa_xtuner.data.collate`.

        Returns:
            ``loss`` and the other figures of :func:`dpa_xtuner.loss.statistics`.
        """
        supervised = supervised_places(data["labels"])
        if without is not None:
            # Without an image both passes are the same, to the last bit.
            imaged = data["image_mask"].any(1, keepdim=True).expand_as(supervised)[supervised]
            without = without.where(imaged, scores.detach())
        if not len(scores.cross_entropy) and data["ids"]:
            names = ", ".join(repr(name) for name in data["ids"])
            print_log(
                f"No token of the samples {names} is supervised: they train nothing.",
                "current",
                logging.WARNING,
            )
        loss, _, sums = relevance_loss(scores, without, supervised, self.scheme, self.normalize)
        counted = sums["weight"].new_tensor(1.0)
        more = {"micro_batch_loss": loss.detach().double(), "micro_batches": counted}
        for name, value in (sums | more).items():
            self.seen[name] = self.seen[name] + value if name in self.seen else value
        return statistics(sums) | {"loss": loss}
