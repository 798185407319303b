"""Several samples of a batch in one row, so that little is computed for padding."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig


class Packed(NamedTuple):
    """Tokens of several samples in few rows.

    Attributes:
        slots: of each of the M tokens the place in the flattened rows, (M,) int64.
        segments: (rows, columns) int64, the sample's number from 1 on, 0 where there is none.
    """

    slots: Tensor
    segments: Tensor

    def lay_out(self, inputs: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """What (B, T, ...) holds at the true places of ``kept`` (B, T), in rows; zero elsewhere."""
        rows = {}
        for key, value in inputs.items():
            laid = value.new_zeros(self.segments.numel(), *value.shape[2:])
            laid = laid.index_copy(0, self.slots, value[kept])
            rows[key] = laid.view(*self.segments.shape, *value.shape[2:])
        return rows

    def pairs(self, dtype: torch.dtype) -> Tensor:
        """Attention mask (rows, 1, columns, columns).

        0 where a token sees another of its sample, and the lowest number of ``dtype`` elsewhere.
        """
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        seen = causal & (self.segments.unsqueeze(1) == self.segments.unsqueeze(2))
        lowest = torch.finfo(dtype).min
        return torch.where(seen, 0.0, lowest).to(dtype).unsqueeze(1)


def pack(kept: Tensor, share_rows: bool = True) -> Packed:
    """Lay the true places of ``kept`` (B, T) side by side, sample by sample, in order.

    No row is longer than the longest sample; the longest are placed first, each in the first
    row that has room.

    Args:
        kept: (B, T) bool.
        share_rows: whether several samples may stand in a row.
    """
    lengths = kept.sum(1).tolist()
    longest = max([1, *lengths])
    filled: list[int] = []
    starts = [0] * len(lengths)  # of each sample in the flattened rows
    for sample in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        length = lengths[sample]
        if not length:
            break
        fits = (row for row, used in enumerate(filled) if share_rows and used + length <= longest)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        starts[sample] = row * longest + filled[row]
        filled[row] += length
    samples, _ = kept.nonzero(as_tuple=True)
    slots = torch.tensor(starts, device=kept.device)[samples] + (kept.cumsum(1) - 1)[kept]
    segments = torch.zeros(max(1, len(filled)), longest, dtype=torch.int64, device=kept.device)
    segments.view(-1)[slots] = samples + 1
    return Packed(slots, segments)


def takes_pairs(config: PretrainedConfig) -> bool:
    """Whether the LLM's attention takes a mask of pairs; FlashAttention-2's does not."""
    return getattr(config, "_attn_implementation", None) != "flash_attention_2"


def depends_on_length(config: PretrainedConfig, length: int) -> bool:
    """Whether what an LLM makes of tokens depends on how long the rows are that they stand in.

    A sliding window counts positions in the sequence; and some rotary embeddings are stretched
    by the last position of a batch where it is beyond what they were made for.

    Args:
        config: the LLM's.
        length: of the batch's longest sample, in tokens.
    """
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and length > window:
        return True
    scaling = getattr(config, "rope_scaling", None) or {}
    stretched = scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    made_for = getattr(config, "original_max_position_embeddings", None)
    return stretched and length > (made_for or config.max_position_embeddings)
