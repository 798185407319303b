"""A fingerprint of weights: it tells models apart, and shows that frozen weights don't change."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpa_xtuner.versions import published_prefix

_CHUNK = 1 << 22  # elements at a time: some 130 MB of 64-bit words, however large the tensor
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash the parameters of ``module``.

    Each parameter's device forms two sums (plain, and weighted by position, both modulo 2**64), so
    that only 16 bytes per parameter leave it. The fingerprint is the SHA-256 of names, shapes and
    sums. It does not depend on the device. Under DeepSpeed ZeRO-3 every rank must call it, since
    partitioned parameters are gathered, one at a time.

    Args:
        module: any module; names include peft's prefixes.
        dtype: cast to this dtype first, so that the same published weights have the same
            fingerprint whether they were loaded in float32 or bfloat16. None hashes the weights
            as loaded.

    Returns:
        64 hexadecimal digits; empty for a model on the meta device, which ``xtuner convert`` uses.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return ""
    digest, prefix = hashlib.sha256(), published_prefix(module)
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            digest.update(
                f"{prefix}{name}{tuple(parameter.shape)}{_sums(parameter.detach(), dtype)}".encode()
            )
    return digest.hexdigest()


def gathered(parameters: Sequence[Tensor], modify: bool = False):
    """Gather parameters that DeepSpeed ZeRO-3 has split, inside the context.

    Args:
        parameters: the ones to gather; a collective if they are split.
        modify: keep what rank 0 writes to them.

    Returns:
        A context manager.
    """
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if modify else None)


def _sums(tensor: Tensor, dtype: torch.dtype | None) -> tuple[int, int]:
    plain = weighted = 0
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk = chunk if dtype is None else chunk.to(dtype)
        words = chunk.view(_WORDS[chunk.element_size()]).long()
        index = torch.arange(start, start + len(words), device=words.device)
        plain += int(words.sum())
        # An odd multiplier (Knuth) spreads the indices over all 64 bits.
        weighted += int((words * (index * 2654435761 + 1)).sum())
    return plain % 2**64, weighted % 2**64
