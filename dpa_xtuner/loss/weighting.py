"""How much each supervised token counts: weighting schemes, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.loss.scores import TokenScores
from dpa_xtuner.registry import SCHEMES, build_named

BOUNDARIES = ("sample", "flat")


class Weights(NamedTuple):
    """A scheme's answer for N supervised tokens.

    Attributes:
        values: (N,), what each token's cross entropy is multiplied by.
        relevance: (N,), the clamped difference before pooling, or None without a contrast pass.
    """

    values: Tensor
    relevance: Tensor | None


@SCHEMES.register_module("uniform")
@dataclass(frozen=True)
class Uniform:
    """Every token counts the same (vanilla); no contrast pass is run."""

    contrast: ClassVar[bool] = False

    def weights(self, scores: TokenScores, without: None, supervised: Tensor) -> Weights:
        """Ones; see :meth:`Contrast.weights`."""
        return Weights(torch.ones_like(scores.cross_entropy), None)


@dataclass(frozen=True)
class Contrast:
    """Weights from what the picture changes; a scheme derives from it and says how to compare.

    ``d`` is the comparison, clamped; a token's weight is the mean of ``d`` over a window
    around it (average pool, stride 1, padding not counted).

    Args:
        d_min: lower bound of ``d``, at least 0.
        d_max: upper bound of ``d``, above 0.
        window: odd number of neighbouring positions; 1 for no pooling.
        boundary: ``"sample"`` pools over the supervised tokens of the same sample alone;
            ``"flat"`` over the flattened batch, where unsupervised positions count with
            ``d_min``, as the authors' code does.

    Raises:
        DPAError: an argument is out of range.
    """

    d_min: float
    d_max: float
    window: int = 3
    boundary: str = "sample"
    contrast: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        numbers = all(isinstance(bound, (int, float)) for bound in (self.d_min, self.d_max))
        if not numbers or not 0 <= self.d_min <= self.d_max < float("inf") or self.d_max == 0:
            raise DPAError(
                f"d_min={self.d_min!r}, d_max={self.d_max!r}: expected numbers, 0 <= d_min <= "
                f"d_max and d_max above 0. Swap or change them."
            )
        if type(self.window) is not int or self.window < 1 or self.window % 2 == 0:
            raise DPAError(
                f"window={self.window!r} is not an odd whole number from 1 on; the paper's is 3, "
                f"and 1 stands for no pooling."
            )
        if self.boundary not in BOUNDARIES:
            raise DPAError(
                f"boundary={self.boundary!r}{nearest(str(self.boundary), BOUNDARIES)}; expected "
                f"'sample' (pool within a sample) or 'flat' (the authors' way)."
            )

    def difference(self, scores: TokenScores, without: TokenScores) -> Tensor:
        """Compare the passes.

        Args:
            scores: of N tokens, with the picture; carries no graph.
            without: of the same tokens without it.

        Returns:
            (N,), large where the picture helps.
        """
        raise NotImplementedError

    def weights(self, scores: TokenScores, without: TokenScores, supervised: Tensor) -> Weights:
        """Weights of the supervised tokens.

        Args:
            scores: of N tokens, with the picture.
            without: of the same tokens, without it.
            supervised: (B, T) bool with N true places, the tokens' own, row by row.

        Returns:
            Weights without a graph.
        """
        with torch.no_grad():
            d = self.difference(scores.detach(), without).clamp(self.d_min, self.d_max)
            if not len(d):  # of a batch whose rows hold a single token there is nothing to pool
                return Weights(d, d)
            pool = _pool_flat if self.boundary == "flat" else _pool_sample
            return Weights(pool(d, supervised, self.window, self.d_min), d)


def _pool_sample(d: Tensor, supervised: Tensor, window: int, _: float) -> Tensor:
    places = d.new_zeros(supervised.shape).masked_scatter(supervised, d)  # (B, T)
    both = torch.stack([places, supervised.to(d.dtype)], dim=1)  # (B, 2, T)
    total, count = avg_pool1d(both, window, stride=1, padding=window // 2).unbind(1)
    return total[supervised] / count[supervised]


def _pool_flat(d: Tensor, supervised: Tensor, window: int, d_min: float) -> Tensor:
    places = d.new_full(supervised.shape, d_min).masked_scatter(supervised, d).view(1, -1)
    pooled = avg_pool1d(places, window, stride=1, padding=window // 2, count_include_pad=False)
    return pooled.view_as(supervised)[supervised]


@SCHEMES.register_module("cmo")
@dataclass(frozen=True)
class CMO(Contrast):
    """Contrastive modality optimisation: by how much the picture raises the token's probability.

    Bounds and window of arXiv 2509.14735.
    """

    d_min: float = 0.05
    d_max: float = 0.5

    def difference(self, scores: TokenScores, without: TokenScores) -> Tensor:
        """p_w - p_wo."""
        return scores.probability - without.probability


@SCHEMES.register_module("cal")
@dataclass(frozen=True)
class CAL(Contrast):
    """Contrastive alignment: by how much the picture raises the token's logit.

    Bounds and window of arXiv 2405.17871.
    """

    d_min: float = 1.0
    d_max: float = 5.0

    def difference(self, scores: TokenScores, without: TokenScores) -> Tensor:
        """Difference of the token's own logits."""
        return scores.logit - without.logit


def build_scheme(cfg: str | dict[str, Any]):
    """The weighting scheme of a name or of ``dict(type=name, ...)``.

    Args:
        cfg: a name in :data:`dpa_xtuner.registry.SCHEMES`, or a dict of one and its arguments.

    Raises:
        DPAError: unknown name or argument, or a value out of range.
    """
    return build_named(SCHEMES, cfg)
