"""What nobody reads of the last decoder layer is not computed.

The head reads the hidden states in front of supervised tokens, a tenth of a sequence with an
image in it. In all layers but the last the other positions are keys and values to later
layers; in the last one their queries and their MLP lead nowhere. Neither do their gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpa_xtuner.model.replaced import forward_replaced

_AFTER_ATTENTION = (  # Gemma-2's names among them
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)


@contextmanager
def only_read(decoder: nn.Module, read: Tensor) -> Iterator[None]:
    """Compute the last layer at the positions that are read; elsewhere its output is arbitrary.

    Saved are queries, the projection behind the attention, norms, the MLP and, with SDPA, the
    attention of the other positions, as far as the layer has LLaMA's names for them. When
    activations are recomputed in the backward pass, this context is over and that pass
    computes all.

    Args:
        decoder: a decoder of transformers.
        read: (B, T) bool.
    """
    layer = decoder.layers[-1] if hasattr(decoder, "layers") else None
    attention = getattr(layer, "self_attn", None)
    with ExitStack() as stack:
        for module in _by_position(decoder, layer, attention):
            forward = partial(_on_rows, module.forward, read)
            stack.enter_context(forward_replaced(module, forward))
        if attention is not None:
            forward = partial(_with_few_queries, attention.forward, read)
            stack.enter_context(forward_replaced(attention, forward))
        yield


def _by_position(decoder: nn.Module, layer: nn.Module | None, attention) -> list[nn.Module]:
    # What takes each position by itself and is no key or value to others.
    found = [getattr(attention, name, None) for name in ("q_proj", "o_proj")]
    found += [getattr(layer, name, None) for name in _AFTER_ATTENTION]
    found.append(getattr(decoder, "norm", None) if attention is not None else None)
    return [module for module in found if module is not None]


def _on_rows(forward: Callable, read: Tensor, hidden: Tensor, *args, **kwargs) -> Tensor | tuple:
    # (B, T, C) to (B, T, C'), zero where nothing is read.
    out = forward(hidden[read], *args, **kwargs)
    rest = ()
    if isinstance(out, tuple):  # a mixture of experts' MLP gives its router's logits as well
        out, *rest = out
    whole = out.new_zeros(*read.shape, out.shape[-1]).masked_scatter(read.unsqueeze(-1), out)
    return (whole, *rest) if rest else whole


def _with_few_queries(forward: Callable, read: Tensor, *args, **kwargs):
    with _FewQueries(read):
        return forward(*args, **kwargs)


class _FewQueries(TorchFunctionMode):
    """Has SDPA answer the queries that are read."""

    def __init__(self, read: Tensor):
        super().__init__()
        self.read = read

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs
    ) -> Tensor:
        most = max(1, int(self.read.sum(1).max()))
        # Of each sample the positions that are read, filled up with others.
        places = self.read.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, S)
        index = places[:, None, :, None]
        if attn_mask is None:
            columns = torch.arange(key.shape[2], device=key.device)
            seen = (columns <= index) if is_causal else None  # (B, 1, S, T)
        else:
            mask = attn_mask.expand(len(places), -1, -1, -1)
            seen = mask.take_along_dim(index, dim=2)
        answers = F.scaled_dot_product_attention(
            query.take_along_dim(index, dim=2), key, value, seen, dropout_p, **kwargs
        )
        whole = answers.new_zeros(*query.shape[:3], answers.shape[-1])
        return whole.scatter(2, index.expand_as(answers), answers)
