"""The loss as both models compute it from a batch's scores."""

import logging

import torch
from mmengine.logging import print_log
from torch import Tensor

from dpa_xtuner.loss import TokenScores, build_scheme, relevance_loss
from dpa_xtuner.loss.relevance import check_normalize
from dpa_xtuner.model.llm import supervised_places


class Objective:
    """A weighting scheme, how its loss is normalised, and the weight it has seen.

    Args:
        loss: see :func:`dpa_xtuner.loss.build_scheme`.
        normalize: see :func:`dpa_xtuner.loss.relevance_loss`.

    Attributes:
        scheme: the weighting scheme.
        normalize: as given.
        weight_sum: float64, of all weights since it was last set to 0; summed up under
            ``"global"`` for :class:`dpa_xtuner.hooks.GlobalNormalizationHook`.

    Raises:
        DPAError: one of the arguments can't be used.
    """

    def __init__(self, loss: str | dict, normalize: str):
        check_normalize(normalize)
        self.scheme, self.normalize = build_scheme(loss), normalize
        self.weight_sum = torch.zeros((), dtype=torch.float64)

    def __call__(
        self, scores: TokenScores, without: TokenScores | None, data: dict
    ) -> dict[str, Tensor]:
        """The loss and what goes into the log.

        Args:
            scores: of the ordinary pass.
            without: of the contrast pass, if the scheme needs one.
            data: a batch of :func:`dpa_xtuner.data.collate`.

        Returns:
            ``loss`` and the stats of :class:`dpa_xtuner.loss.RelevanceLoss`.
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
        loss, weights, stats = relevance_loss(
            scores, without, supervised, self.scheme, self.normalize
        )
        if self.normalize == "global":
            self.weight_sum = self.weight_sum.to(weights.device) + weights.detach().double().sum()
        return {"loss": loss} | stats
