"""Style leakage: how much of the captions' style a projector carries in place of the picture."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from mmengine.logging import print_log
from torch import Tensor
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.loss.held_out import cross_entropy_per_token
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.dpa_llava import DPALLaVAModel


class Captions(Protocol):
    """What is asked of a data set; :class:`dpa_xtuner.data.DPADataset` has it."""

    def __len__(self) -> int:
        """Count the captions."""

    def __getitem__(self, index: int) -> Any:
        """Load a caption with its pictures, or what is wrong with it."""

    def text(self, index: int) -> dict:
        """Load a caption without its pictures."""

    def images_of(self, index: int) -> list[str]:
        """Return the names of its pictures."""


class _Changed:
    """Captions with changed pictures, made when they are asked for.

    Args:
        captions: with their own pictures.
        pairs: places of a caption and of that whose pictures it gets.
        change: makes the pictures of those; None to keep the caption's own.
    """

    def __init__(
        self,
        captions: Captions,
        pairs: list[tuple[int, int]],
        change: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.captions, self.pairs, self.change = captions, pairs, change

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        this, other = self.pairs[index]
        sample = self.captions[this]
        if self.change is None:
            return sample
        return sample | {"pixel_values": self.change(self.captions[other]["pixel_values"])}


def style_leakage(
    model: DPALLaVAModel, captions: Captions, batch_size: int, amp: torch.autocast
) -> dict[str, float]:
    """Measure what captions cost the original LLM with right and wrong pictures, and with none.

    What a picture of *another* caption takes off can't be what the picture shows: it is style, or
    what all pictures have in common.

    Args:
        model: the original LLM behind a projector.
        captions: not trained on.
        batch_size: captions at a time on a device.
        amp: context to compute in.

    Returns:
        Nats per token, each caption's first token left out: ``without_picture``, ``own_picture``,
        ``other_picture`` (that of another caption), ``blank_picture`` (the image processor's mean
        colour), and ``leakage``, what another picture takes off. Empty if no caption has a picture
        that can be changed for another's. Captions whose own picture can't be read are left out.
    """
    pairs = _pairs(captions)
    if not pairs:
        return {}

    def cost(change=None, ask=model.log_probs) -> float:
        changed = _Changed(captions, pairs, change)
        return cross_entropy_per_token(model, changed, batch_size, amp, ask)

    found = {
        "without_picture": cost(ask=lambda data: contrast_log_probs(model.llm, data)),
        "own_picture": cost(),
        "other_picture": cost(list),
        # Pictures are normalised: 0 is the mean colour.
        "blank_picture": cost(lambda pictures: [torch.zeros_like(each) for each in pictures]),
    }
    return found | {"leakage": found["without_picture"] - found["other_picture"]}


def _pairs(captions: Captions) -> list[tuple[int, int]]:
    """Give each caption with a picture the next one that has another in as many tokens."""
    names = [captions.images_of(i) for i in range(len(captions))]
    texts = (captions.text(i)["input_ids"] for i in range(len(captions)))
    tokens = [int((text == IMAGE_TOKEN_INDEX).sum()) for text in texts]
    shown = [i for i, count in enumerate(tokens) if count]
    seen = [i for i in shown if isinstance(captions[i], dict)]
    if len(seen) < len(shown):
        print_log(
            f"The style leakage leaves out {len(shown) - len(seen)} of {len(shown)} held-out "
            f"captions, whose pictures can't be read.",
            "current",
            logging.WARNING,
        )
    pairs = []
    for place, this in enumerate(seen):
        turned = seen[place + 1 :] + seen[:place]
        fits = (i for i in turned if tokens[i] == tokens[this] and names[i] != names[this])
        if (other := next(fits, None)) is not None:
            pairs.append((this, other))
    return pairs
