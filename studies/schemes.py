"""Weighting schemes that are candidates: none of them is part of the package."""

from dataclasses import dataclass

from torch import Tensor

from dpa_xtuner.loss import ContrastScheme, TokenLogProbs
from dpa_xtuner.registry import SCHEMES


@SCHEMES.register_module("unexplained")
@dataclass(frozen=True)
class Unexplained(ContrastScheme):
    """1 - p_wo: what the text alone does not tell, whether or not it is learned yet."""

    d_min: float = 0.05
    d_max: float = 1.0

    def difference(self, log_probs: TokenLogProbs, no_image: TokenLogProbs) -> Tensor:
        """Return 1 - p_wo."""
        return 1 - no_image.probability


@SCHEMES.register_module("log_ratio")
@dataclass(frozen=True)
class LogRatio(ContrastScheme):
    """log p_w - log p_wo: doubling a small probability counts as much as doubling a large one."""

    d_min: float = 0.1
    d_max: float = 2.0

    def difference(self, log_probs: TokenLogProbs, no_image: TokenLogProbs) -> Tensor:
        """Return log p_w - log p_wo."""
        return no_image.cross_entropy - log_probs.cross_entropy
