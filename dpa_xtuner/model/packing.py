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


def pack(kept: Tensor, hidden_size: int, share_rows: bool = True) -> Packed:
    """Lay the true places of ``kept`` (B, T) side by side, sample by sample, in order.

    The longest samples are placed first, each in the first row that has room. Of the widths that
    a row may have, from the longest sample's to twice that, the one is taken that costs least: a
    decoder layer of width H takes some 4 H (6 H + W) operations for each place of a row of W
    (linear layers of 12 H², and its attention to the W places of the row).

    Args:
        kept: (B, T) bool.
        hidden_size: H, of the LLM.
        share_rows: whether several samples may stand in a row.
    """
    lengths = kept.sum(1).tolist()
    longest, total = max([1, *lengths]), sum(lengths)
    widths = {longest}
    if share_rows:
        widths |= {min(max(longest, -(-total // n)), 2 * longest) for n in range(1, len(lengths))}

    def cost(layout: tuple[list[int], list[int]]) -> int:
        columns = max(layout[0], default=1)
        return len(layout[0]) * columns * (6 * hidden_size + columns)

    filled, starts = min((_rows(lengths, w, share_rows) for w in sorted(widths)), key=cost)
    columns = max(filled, default=1)
    samples, _ = kept.nonzero(as_tuple=True)
    begins = [row * columns + start for row, start in starts]
    slots = torch.tensor(begins, device=kept.device)[samples] + (kept.cumsum(1) - 1)[kept]
    segments = torch.zeros(max(1, len(filled)), columns, dtype=torch.int64, device=kept.device)
    segments.view(-1)[slots] = samples + 1
    return Packed(slots, segments)


def _rows(lengths: list[int], width: int, share: bool) -> tuple[list[int], list[tuple[int, int]]]:
    # How far each row is filled; and of each sample its row and where it begins there.
    filled: list[int] = []
    starts = [(0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        length = lengths[sample]
        if not length:
            break
        fits = (row for row, used in enumerate(filled) if share and used + length <= width)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        starts[sample] = row, filled[row]
        filled[row] += length
    return filled, starts


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
