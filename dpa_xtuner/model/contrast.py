"""The contrast pass: what the LLM says of the same tokens when it has not seen the pictures.

Image positions that are out of the attention have no part in what text becomes, so they need
not be in the sequence: the text tokens run alone, at the positions they had.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenScores
from dpa_xtuner.model.llm import (
    base_model,
    check_finite,
    decode,
    output_head,
    supervised_places,
    token_scores_of,
)


@torch.no_grad()
def contrast_scores(llm: PreTrainedModel | PeftModel, data: dict) -> TokenScores:
    """Scores of a batch's N supervised tokens without its images.

    The token after an image is predicted from the last text token before it; where there
    is none, its probability is 1 / vocabulary size. Samples without an image are left out.
    Every rank runs the pass once for each micro-batch, over a single token where nothing
    is to be compared, so that ZeRO-3's collectives match.

    Dropout is off in this pass, LoRA's too, and so is gradient checkpointing: the LLM is put
    in evaluation mode and back. In the ordinary pass dropout stays on, so with dropout p_w is
    that of the network as thinned out, p_wo that of the whole one.

    Args:
        llm: the LLM with the weights of the ordinary pass, wrapped by peft or not.
        data: a batch of :func:`dpa_xtuner.data.collate`; not changed.

    Returns:
        Scores without a graph; zeros for the tokens of samples without an image.

    Raises:
        DPAError: a hidden state is not finite; the message names the samples.
    """
    labels = data["labels"]
    supervised = supervised_places(labels)
    concerned = data["image_mask"].any(1) & supervised.any(1)  # (B,)
    text = data["attention_mask"].bool() & ~data["image_mask"] & concerned.unsqueeze(1)
    with _evaluating(llm):
        hidden, known = _hidden(llm, data, text, supervised, share_rows=True)
        _check(llm, data, text, supervised, hidden, known)
        found = token_scores_of(llm, hidden, labels[:, 1:][supervised][known])
    # What has no text before it: all V tokens are alike to the LLM.
    uniform = math.log(output_head(llm).out_features)
    imaged = concerned.unsqueeze(1).expand_as(supervised)[supervised]
    cross_entropy = imaged * torch.full_like(imaged, uniform, dtype=found.cross_entropy.dtype)
    logit = torch.zeros_like(cross_entropy)
    return TokenScores(
        cross_entropy.masked_scatter(known, found.cross_entropy),
        logit.masked_scatter(known, found.logit),
    )


def _hidden(
    llm: nn.Module, data: dict, text: Tensor, supervised: Tensor, share_rows: bool
) -> tuple[Tensor, Tensor]:
    # (M, H) of the M supervised tokens that have text before them; and which they are, (N,).
    inputs, before = _inputs(llm, data, text, share_rows)
    places = before[:, 1:][supervised]  # (N,)
    known = places >= 0
    return decode(llm, inputs).flatten(0, 1)[places[known]], known


def _check(
    llm: nn.Module, data: dict, text: Tensor, supervised: Tensor, hidden: Tensor, known: Tensor
) -> None:
    of_known = torch.zeros_like(supervised).masked_scatter(supervised, known)
    where = " without the images"
    try:
        check_finite(hidden, of_known, data["ids"], where)
    except DPAError:
        # A spoilt sample spoils its whole row, since 0 x NaN is NaN: alone, each speaks for
        # itself. Under ZeRO-3 the other ranks would not take part.
        if not any(hasattr(parameter, "ds_id") for parameter in llm.parameters()):
            alone, _ = _hidden(llm, data, text, supervised, share_rows=False)
            check_finite(alone, of_known, data["ids"], where)
        raise


class Packed(NamedTuple):
    """Text tokens of several samples in few rows.

    Attributes:
        rows: of each of the M tokens, (M,) int64.
        columns: of each, (M,) int64.
        size: rows and columns in all.
        segments: (rows, columns) int64, the sample's number from 1 on, 0 where there is none.
    """

    rows: Tensor
    columns: Tensor
    size: tuple[int, int]
    segments: Tensor


def pack(text: Tensor, share_rows: bool) -> Packed:
    """Lay the true places of ``text`` (B, T) side by side, sample by sample, in order.

    No row is longer than the longest sample; the longest are placed first, each in the first
    row that has room.

    Args:
        text: (B, T) bool.
        share_rows: whether several samples may stand in a row.
    """
    lengths = text.sum(1).tolist()
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
    size = max(1, len(filled)), longest
    samples, _ = text.nonzero(as_tuple=True)
    slots = torch.tensor(starts, device=text.device)[samples] + (text.cumsum(1) - 1)[text]
    segments = torch.zeros(size, dtype=torch.int64, device=text.device)
    segments.view(-1)[slots] = samples + 1
    return Packed(slots // longest, slots % longest, size, segments)


def _inputs(
    llm: nn.Module, data: dict, text: Tensor, share_rows: bool
) -> tuple[dict[str, Tensor], Tensor]:
    # The decoder's inputs; and for each text token of the batch the place, in its flattened
    # output, of the text token before, -1 where there is none.
    config = base_model(llm).config
    if _depends_on_length(config, text.shape[1]):
        # There the images keep their places in the sequence.
        mask = text | ~text.any(1, keepdim=True)
        keys = ("input_ids", "position_ids")
        inputs = {key: data[key] for key in keys} | {"attention_mask": mask.long()}
        places = text.nonzero()
        slots = places[:, 0] * text.shape[1] + places[:, 1]
    else:
        flash = getattr(config, "_attn_implementation", None) == "flash_attention_2"
        packed = pack(text, share_rows=share_rows and not flash)
        inputs = {}
        for key in ("input_ids", "position_ids"):
            rows = torch.zeros(packed.size, dtype=torch.int64, device=text.device)
            rows[packed.rows, packed.columns] = data[key][text]
            inputs[key] = rows
        if flash:  # which takes no mask of pairs; it leaves out padding by itself
            mask = packed.segments > 0
            mask[:, 0] = True  # a row of padding alone has to attend to something
            inputs["attention_mask"] = mask.long()
        else:
            dtype = llm.get_input_embeddings().weight.dtype
            inputs["attention_mask"] = _pairs(packed.segments, dtype)
        slots = packed.rows * packed.size[1] + packed.columns
    before = torch.full(text.shape, -1, device=text.device)
    first = (text.cumsum(1) == 1)[text]
    before[text] = torch.where(first, -1, slots.roll(1))
    return inputs, before


def _pairs(segments: Tensor, dtype: torch.dtype) -> Tensor:
    # (R, 1, L, L), 0 where a token sees another of its sample and the lowest number elsewhere.
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & (segments.unsqueeze(1) == segments.unsqueeze(2))
    lowest = torch.finfo(dtype).min
    return torch.where(seen, 0.0, lowest).to(dtype).unsqueeze(1)


def _depends_on_length(config: PretrainedConfig, length: int) -> bool:
    # A sliding window counts positions in the sequence; and some rotary embeddings are
    # stretched by the last position of a batch where it is beyond what they were made for.
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and length > window:
        return True
    scaling = getattr(config, "rope_scaling", None) or {}
    stretched = scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    made_for = getattr(config, "original_max_position_embeddings", None)
    return stretched and length > (made_for or config.max_position_embeddings)


@contextmanager
def _evaluating(llm: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
