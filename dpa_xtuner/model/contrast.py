"""The contrast pass: the log-probabilities of the same tokens without the pictures."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpa_xtuner.loss import TokenLogProbs, supervised_mask
from dpa_xtuner.model.llm import base_model, check_finite, decode, head_log_probs, output_head


@torch.no_grad()
def contrast_log_probs(llm: PreTrainedModel | PeftModel, data: dict) -> TokenLogProbs:
    """Compute the log-probabilities of a batch's N supervised tokens without its images.

    The token after an image is predicted from the last text token before it. A token with no
    text before it gets the uniform probability 1 / V. Samples without an image are left out.
    Every rank runs the pass once for each micro-batch, over a single token if there is nothing to
    compare, so that ZeRO-3's collectives match.

    The LLM is in evaluation mode: no dropout, LoRA's included, and no gradient checkpointing. The
    ordinary pass keeps its dropout, so p_w is then that of the thinned network and p_wo that of
    the whole one.

    Args:
        llm: the LLM with the weights of the ordinary pass, wrapped by peft or not.
        data: a batch of :func:`dpa_xtuner.data.collate`; not changed.

    Returns:
        Log-probabilities without a graph; zeros for the tokens of samples without an image.

    Raises:
        DPAError: a hidden state is not finite; the message names the samples.
    """
    labels = data["labels"]
    supervised = supervised_mask(labels)  # (B, T - 1)
    needs_contrast = data["image_mask"].any(1) & supervised.any(1)  # (B,)
    text = data["attention_mask"].bool() & ~data["image_mask"]  # (B, T)
    # Reading these numbers is what a GPU waits for: all at once. 0 for samples left out.
    lengths = torch.where(needs_contrast, text.sum(1), 0).tolist()
    rows = (~needs_contrast).int().argsort(stable=True)[: sum(map(bool, lengths))]  # (R,)
    config, longest = base_model(llm).config, max(1, *lengths)
    inputs, before = _text_only(config, data, text, rows, longest)  # (R, S), (B, T - 1)
    asked = supervised & needs_contrast.unsqueeze(1)  # (B, T - 1)
    has_context = asked & (before >= 0)  # (B, T - 1), K true
    with _evaluating(llm):
        hidden = decode(llm, inputs)  # (R, S, H)
        # Sample b is row (number of compared samples before b) of the decoder's inputs.
        row = needs_contrast.cumsum(0) - 1  # (B,)
        sample, column = has_context.nonzero(as_tuple=True)  # (K,) each
        hidden = hidden[row[sample], before[sample, column]]  # (K, H)
        check_finite(hidden, has_context, data["ids"], " without the images")
        found = head_log_probs(llm, hidden, labels[sample, column + 1])  # (K,)
    uniform = math.log(output_head(llm).out_features)
    cross_entropy = asked.to(found.cross_entropy.dtype) * uniform  # (B, T - 1)
    cross_entropy = cross_entropy.masked_scatter(has_context, found.cross_entropy)
    logit = torch.zeros_like(cross_entropy).masked_scatter(has_context, found.logit)
    both = torch.stack([cross_entropy, logit], dim=-1)[supervised]  # (N, 2)
    return TokenLogProbs(*both.unbind(-1))  # (N,) each


def _text_only(
    config: PretrainedConfig, data: dict, text: Tensor, rows: Tensor, longest: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Select the text tokens (B, T) of some rows (R,), which have at most ``longest``.

    Returns:
        The decoder's inputs (R, S); and (B, T - 1), for each position but the last, the column of
        the last text token up to it, -1 if there is none.
    """
    length = text.shape[1]
    if _depends_on_length(config, length):
        columns = torch.arange(length, device=text.device).expand_as(text)  # (B, T)
        before = torch.where(text, columns, -1).cummax(1).values  # (B, T)
    else:
        # Masked image positions don't influence the text. So the text tokens run alone, at their
        # old position ids: T text tokens in place of T + 576.
        # A stable sort brings the text to the front, in order: (B, longest).
        columns = (~text).int().argsort(dim=1, stable=True)[:, :longest]
        before = text.cumsum(1) - 1  # (B, T)
    if not len(rows):  # a single token, so that this rank joins the collectives
        rows, columns = rows.new_zeros(1), columns[:, :1]
    index = rows.unsqueeze(1), columns[rows]  # (R, 1), (R, S)
    mask = text[index]  # (R, S)
    mask[:, 0] |= ~mask.any(1)  # a row of padding alone must attend to something, or it is NaN
    inputs = {key: data[key][index] for key in ("input_ids", "position_ids")}
    return inputs | {"attention_mask": mask.long()}, before[:, :-1]


def _depends_on_length(config: PretrainedConfig, length: int) -> bool:
    """Tell whether an LLM's output depends on the length of the rows.

    A sliding window counts positions in the sequence. Some rotary embeddings stretch when the last
    position of a batch exceeds their limit. For such LLMs the images keep their positions, masked.
    """
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
