"""The LLM's head over supervised tokens, without holding all logits at once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 25
"""Logits held at a time: 128 MB in float32, some hundred rows of a large head.

With fewer rows, a GPU would wait for the head's weights. Many more would save no time."""

LOGITS_AT_ONCE_ON_CPU = 1 << 22
"""The same on a CPU, where memory traffic makes larger blocks slow: 252 rows of a head of 49k took
2.3 times as long at once as in chunks of 85."""


class TokenLogProbs(NamedTuple):
    """Log-probabilities of the N supervised tokens of a batch, by one pass.

    Attributes:
        cross_entropy: (N,) float32 (float64 from float64), -log of the token's probability.
        logit: (N,) of the same dtype, the token's own logit; carries no gradient.
    """

    cross_entropy: Tensor
    logit: Tensor

    @property
    def probability(self) -> Tensor:
        """Probabilities (N,), in the dtype of the cross entropy."""
        return torch.exp(-self.cross_entropy)

    def detach(self) -> "TokenLogProbs":
        """Return the same numbers without a graph."""
        return TokenLogProbs(self.cross_entropy.detach(), self.logit.detach())

    def where(self, mask: Tensor, other: "TokenLogProbs") -> "TokenLogProbs":
        """Return these numbers where ``mask`` (N,) is true, and those of ``other`` elsewhere."""
        return TokenLogProbs(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))


def token_log_probs(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TokenLogProbs:
    """Compute head and cross entropy in one, a chunk of rows at a time.

    At most ``chunk_size`` x V logits exist at once, forwards and backwards. Where the head is
    frozen, the forward pass also forms the gradient of each row, while its logits exist: a row's
    cross entropy depends on that row's hidden state alone, so its weight in the loss only scales
    that gradient. The gradient of a trained head mixes the rows, so there the backward pass
    computes the logits again.

    :func:`torch.nn.functional.linear_cross_entropy` (torch 2.14) knows no soft-cap and returns
    no logit, which CAL compares; it would be a second code path.

    Under autocast the product is formed in autocast's dtype, otherwise in the weight's; the
    softmax and its sum always in float32 (float64 for float64). No argument is changed.

    Args:
        hidden: (N, H), the decoder's last hidden states before supervised tokens.
        targets: (N,) int64, these tokens.
        weight: (V, H), the head's weight.
        bias: (V,), if the head has one.
        softcap: Gemma-2's bound on the logits: ``cap * tanh(logits / cap)``.
        chunk_size: rows at a time; by default as many as :data:`LOGITS_AT_ONCE` (``_ON_CPU``)
            allows.

    Returns:
        One entry for each token. The cross entropy can be differentiated once, with respect to
        ``hidden``, ``weight`` and ``bias``.
    """
    device = hidden.device.type
    at_once = LOGITS_AT_ONCE_ON_CPU if device == "cpu" else LOGITS_AT_ONCE
    rows = chunk_size or max(1, at_once // len(weight))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if dtype != torch.float64 and weight.dtype == torch.float64:
        dtype = weight.dtype  # as autocast does
    return TokenLogProbs(*ChunkedHead.apply(hidden, weight, bias, targets, softcap, rows, dtype))


class ChunkedHead(torch.autograd.Function):
    """Head and cross entropy of N tokens, ``rows`` at a time; see :func:`token_log_probs`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, rows, dtype):
        """Compute cross entropies (N,) and logits (N,).

        Args:
            ctx: keeps what the backward pass needs.
            hidden: (N, H).
            weight: (V, H).
            bias: (V,) or None.
            targets: (N,) int64.
            softcap: bound on the logits, or None.
            rows: rows at a time.
            dtype: dtype of the product.
        """
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # A frozen head: a row's gradient is known up to its factor, so form it now (N, H).
        ctx.formed = ctx.needs_input_grad[0] and not head_trains
        ctx.softcap, ctx.rows, ctx.dtype = softcap, rows, dtype
        cross_entropy = hidden.new_empty(len(hidden), dtype=_accurate(hidden))
        logit = torch.empty_like(cross_entropy)
        row_gradients = torch.empty_like(hidden) if ctx.formed else None
        cast = _cast(weight, bias, dtype)
        for chunk in _chunks(len(hidden), rows):
            logits = _logits(hidden[chunk], *cast, softcap)  # (rows, V)
            log_p = logits.log_softmax(-1, dtype=_accurate(logits))
            index = targets[chunk].unsqueeze(-1)  # (rows, 1)
            logit[chunk] = logits.gather(-1, index).squeeze(-1).to(logit.dtype)  # (rows,)
            cross_entropy[chunk] = -log_p.gather(-1, index).squeeze(-1)
            if row_gradients is not None:
                slope = _slope(logits, log_p, index, softcap)  # (rows, V)
                row_gradients[chunk] = (slope.to(dtype) @ cast[0]).to(hidden.dtype)  # (rows, H)
        if ctx.formed:
            ctx.save_for_backward(row_gradients)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.mark_non_differentiable(logit)
        return cross_entropy, logit

    @staticmethod
    @once_differentiable
    def backward(ctx, outer, _):
        """Compute the gradients of hidden (N, H), weight (V, H) and bias (V,).

        Args:
            ctx: what the forward pass kept.
            outer: (N,), the gradient of the cross entropies.
            _: of the logits, which carry none.
        """
        if ctx.formed:
            (row_gradients,) = ctx.saved_tensors
            of_hidden = outer.unsqueeze(-1) * row_gradients  # (N, H)
            return of_hidden.to(row_gradients.dtype), None, None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_accurate(weight)) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=_accurate(bias)) if needs_bias else None
        cast = _cast(weight, bias, ctx.dtype)
        for chunk in _chunks(len(hidden), ctx.rows):
            logits = _logits(hidden[chunk], *cast, ctx.softcap)  # (rows, V)
            log_p = logits.log_softmax(-1, dtype=_accurate(logits))
            slope = _slope(logits, log_p, targets[chunk].unsqueeze(-1), ctx.softcap)  # (rows, V)
            slope *= outer[chunk].unsqueeze(-1)
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[chunk] = (slope @ cast[0]).to(hidden.dtype)  # (rows, H)
            if of_weight is not None:
                of_weight += slope.T @ hidden[chunk].to(ctx.dtype)  # (V, H)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _accurate(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(length: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, length, rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight, bias)
    if softcap is None:
        return logits
    return logits.to(_accurate(logits)).div_(softcap).tanh_().mul_(softcap)


def _slope(logits: Tensor, log_p: Tensor, index: Tensor, softcap: float | None) -> Tensor:
    """Compute (rows, V), the gradient of each row's cross entropy by its uncapped logits."""
    slope = log_p.exp_()  # in place: log_p is not needed any more
    slope.scatter_add_(-1, index, -torch.ones_like(index, dtype=slope.dtype))
    return slope if softcap is None else slope.mul_(1 - (logits / softcap).square_())
