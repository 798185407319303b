"""The contrast pass: what the LLM says of the same tokens when it has not seen the pictures.

Image positions that are out of the attention have no part in what text becomes, so they need
not be in the sequence: the text tokens run alone, at the positions they had.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpa_xtuner.loss import TokenScores
from dpa_xtuner.model.llm import (
    base_model,
    check_finite,
    decode,
    output_head,
    supervised_places,
    token_scores_of,
)
from dpa_xtuner.model.packing import depends_on_length, pack, takes_pairs


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
        of_known = torch.zeros_like(supervised).masked_scatter(supervised, known)

        def alone() -> Tensor:
            return _hidden(llm, data, text, supervised, share_rows=False)[0]

        check_finite(llm, hidden, of_known, data["ids"], " without the images", alone)
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


def _inputs(
    llm: nn.Module, data: dict, text: Tensor, share_rows: bool
) -> tuple[dict[str, Tensor], Tensor]:
    # The decoder's inputs; and for each text token of the batch the place, in its flattened
    # output, of the text token before, -1 where there is none.
    config = base_model(llm).config
    inputs = {key: data[key] for key in ("input_ids", "position_ids")}
    if depends_on_length(config, text.shape[1]):
        # There the images keep their places in the sequence.
        mask = text | ~text.any(1, keepdim=True)
        inputs["attention_mask"] = mask.long()
        places = text.nonzero()
        slots = places[:, 0] * text.shape[1] + places[:, 1]
    else:
        masks_pairs = takes_pairs(config)
        packed = pack(text, config.hidden_size, share_rows and masks_pairs)
        inputs = packed.lay_out(inputs, text)
        if masks_pairs:
            dtype = llm.get_input_embeddings().weight.dtype
            inputs["attention_mask"] = packed.pairs(dtype)
        else:  # FlashAttention-2 leaves out padding by itself
            mask = packed.segments > 0
            mask[:, 0] = True  # a row of padding alone has to attend to something
            inputs["attention_mask"] = mask.long()
        slots = packed.slots
    before = torch.full(text.shape, -1, device=text.device)
    first = (text.cumsum(1) == 1)[text]
    before[text] = torch.where(first, -1, slots.roll(1))
    return inputs, before


@contextmanager
def _evaluating(llm: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
