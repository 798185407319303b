"""How much each supervised token counts: weighting schemes, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.loss.head import TokenLogProbs
from dpa_xtuner.registry import SCHEMES, build_named

BOUNDARIES = ("sample", "flat")


class TokenWeights(NamedTuple):
    """A scheme's answer for N supervised tokens.

    Attributes:
        values: (N,), the factors of the tokens' cross entropies.
        relevance: (N,), the clamped difference before pooling, or None without a contrast pass.
    """

    values: Tensor
    relevance: Tensor | None


class WeightingScheme(Protocol):
    """What the loss asks of a weighting scheme.

    Most schemes compare the two passes: derive those from :class:`ContrastScheme`, which has
    everything but the comparison.
    """

    @property
    def contrast(self) -> bool:
        """Whether the contrast pass is run for this scheme."""

    @property
    def d_min(self) -> float:
        """Lower bound of the relevance, for the log."""

    @property
    def d_max(self) -> float:
        """Upper bound of the relevance, for the log."""

    def weights(
        self, log_probs: TokenLogProbs, no_image: TokenLogProbs | None, supervised: Tensor
    ) -> TokenWeights:
        """Weigh the supervised tokens of a micro-batch.

        Args:
            log_probs: of N tokens, with the picture.
            no_image: of the same tokens without it; None where ``contrast`` is False.
            supervised: (B, T) bool, true at the N tokens, row by row.

        Returns:
            Weights without a graph.
        """


@SCHEMES.register_module("uniform")
@dataclass(frozen=True)
class Uniform:
    """Every token counts the same (vanilla); needs no contrast pass."""

    contrast: ClassVar[bool] = False
    d_min: ClassVar[float] = 1.0
    d_max: ClassVar[float] = 1.0

    def weights(
        self, log_probs: TokenLogProbs, no_image: TokenLogProbs | None, supervised: Tensor
    ) -> TokenWeights:
        """Return ones; see :meth:`WeightingScheme.weights`."""
        return TokenWeights(torch.ones_like(log_probs.cross_entropy), None)


@dataclass(frozen=True)
class ContrastScheme:
    """Base of schemes that weigh tokens by what the picture changes; they define ``difference``.

    The relevance of a token is its difference, clamped. Its weight is the mean relevance over a
    window around it (average pool, stride 1, padding not counted).

    Args:
        d_min: lower bound of the relevance, at least 0.
        d_max: upper bound of the relevance, above 0.
        window: odd number of neighbouring positions; 1 for no pooling.
        boundary: ``"sample"`` pools over the supervised tokens of one sample; ``"flat"`` over the
            flattened batch, where unsupervised positions count as ``d_min`` (the authors' code).

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
        if not 0 <= self.d_min <= self.d_max < float("inf") or self.d_max == 0:
            raise DPAError(
                f"d_min={self.d_min!r}, d_max={self.d_max!r}: expected numbers, 0 <= d_min <= "
                f"d_max and d_max above 0. Swap or change them."
            )
        if self.window < 1 or self.window % 2 == 0:
            raise DPAError(
                f"window={self.window!r}: expected an odd whole number above 0. The paper uses 3; "
                f"1 means no pooling."
            )
        if self.boundary not in BOUNDARIES:
            raise DPAError(
                f"boundary={self.boundary!r}{nearest(self.boundary, BOUNDARIES)}; expected "
                f"'sample' (pool within a sample) or 'flat' (the authors' way)."
            )

    def difference(self, log_probs: TokenLogProbs, no_image: TokenLogProbs) -> Tensor:
        """Compare the passes.

        Args:
            log_probs: of N tokens, with the picture; carries no graph.
            no_image: of the same tokens without it.

        Returns:
            (N,), large where the picture helps.
        """
        raise NotImplementedError

    def weights(
        self, log_probs: TokenLogProbs, no_image: TokenLogProbs | None, supervised: Tensor
    ) -> TokenWeights:
        """Clamp and pool the difference; see :meth:`WeightingScheme.weights`."""
        assert no_image is not None, "the contrast pass was not run"
        with torch.no_grad():
            relevance = self.difference(log_probs.detach(), no_image)  # (N,)
            relevance = relevance.clamp(self.d_min, self.d_max)
            if not len(relevance):  # rows of a single token leave avg_pool1d nothing to pool
                return TokenWeights(relevance, relevance)
            pool = self._pool_flat if self.boundary == "flat" else self._pool_sample
            return TokenWeights(pool(relevance, supervised), relevance)

    def _pool_sample(self, relevance: Tensor, supervised: Tensor) -> Tensor:
        # Pooling the mask too gives the number of supervised neighbours, the divisor of the mean.
        grid = relevance.new_zeros(supervised.shape)  # (B, T)
        grid = grid.masked_scatter(supervised, relevance)
        both = torch.stack([grid, supervised.to(grid.dtype)], dim=1)  # (B, 2, T)
        pooled = avg_pool1d(both, self.window, stride=1, padding=self.window // 2)
        total, count = pooled.unbind(1)  # (B, T) each
        return (total / count)[supervised]  # (N,); 0 / 0 elsewhere

    def _pool_flat(self, relevance: Tensor, supervised: Tensor) -> Tensor:
        grid = relevance.new_full(supervised.shape, self.d_min)  # (B, T)
        flat = grid.masked_scatter(supervised, relevance).view(1, -1)  # (1, B T)
        pooled = avg_pool1d(flat, self.window, 1, self.window // 2, count_include_pad=False)
        return pooled.view_as(supervised)[supervised]  # (N,)


Contrast = ContrastScheme
"""The former name; users' schemes may derive from it."""


@SCHEMES.register_module("cmo")
@dataclass(frozen=True)
class CMO(ContrastScheme):
    """Contrastive modality optimisation: how much the picture raises the token's probability.

    Bounds and window of arXiv 2509.14735.
    """

    d_min: float = 0.05
    d_max: float = 0.5

    def difference(self, log_probs: TokenLogProbs, no_image: TokenLogProbs) -> Tensor:
        """Return p_w - p_wo."""
        return log_probs.probability - no_image.probability


@SCHEMES.register_module("cal")
@dataclass(frozen=True)
class CAL(ContrastScheme):
    """Contrastive alignment: how much the picture raises the token's logit.

    Bounds and window of arXiv 2405.17871.
    """

    d_min: float = 1.0
    d_max: float = 5.0

    def difference(self, log_probs: TokenLogProbs, no_image: TokenLogProbs) -> Tensor:
        """Return the difference of the token's own logits."""
        return log_probs.logit - no_image.logit


def build_scheme(cfg: str | dict[str, Any]) -> WeightingScheme:
    """Build a weighting scheme from its name or ``dict(type=name, ...)``.

    Args:
        cfg: a name in :data:`dpa_xtuner.registry.SCHEMES`, or a dict of one and its arguments.

    Raises:
        DPAError: unknown name or argument, or a value out of range.
    """
    return build_named(SCHEMES, cfg)
