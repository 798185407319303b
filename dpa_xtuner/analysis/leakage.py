"""Style leakage: how much of the captions' style a projector carries in place of the picture."""

from dataclasses import dataclass, replace

import torch
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from dpa_xtuner.analysis.cross_entropy import Cost, caption_cost
from dpa_xtuner.analysis.models import split_data, spread
from dpa_xtuner.data import DPADataset
from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.source import Source
from dpa_xtuner.loss import TokenLogProbs
from dpa_xtuner.loss.held_out import HeldOutModel
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import model_config
from dpa_xtuner.stages.components import PROJECTOR


@dataclass(frozen=True)
class Leakage:
    """What captions cost the original LLM behind the projector of ``align``.

    Attributes:
        text: without any picture.
        own: with their own pictures.
        other: with the pictures of other captions.
        blank: with a blank picture, in the image processor's mean colour.
    """

    text: Cost
    own: Cost
    other: Cost
    blank: Cost

    def facts(self) -> dict[str, float]:
        """Nats per token: the four costs, and what a wrong and a blank picture take off."""
        costs = {name: getattr(self, name).per_token for name in ("text", "own", "other", "blank")}
        return costs | {
            "leaked_by_other": costs["text"] - costs["other"],
            "leaked_by_blank": costs["text"] - costs["blank"],
            "picture": costs["other"] - costs["own"],
        }


def style_leakage(source: Source, count: int) -> Leakage:
    """Measure it for a finished ``align``: with its projector, and the LLM as it was published.

    Args:
        source: of that stage.
        count: captions to measure, evenly spread over the held-out ones; where none are held out,
            over those that were trained on.

    Raises:
        DPAError: weights or data can't be read, or no caption has a picture to change.
    """
    train, held_out = split_data(source.run, source.stage)
    dataset = train if held_out is None else held_out
    projector = source.written(PROJECTOR)
    assert projector is not None, "a finished align has written it"
    row = replace(
        source.stage, loads={PROJECTOR: str(projector.absolute())}, trains=(), writes={}
    )  # no proxy
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = MODELS.build(model_config(source.run, row))
    model = model.requires_grad_(False).eval().to(get_device())
    return leakage_of(model, dataset, source.run.tokenizer, source.precision, count)


def leakage_of(
    model: DPALLaVAModel, dataset: DPADataset, tokenizer, precision: Precision, count: int
) -> Leakage:
    """Measure what captions cost a model with their own, other and blank pictures.

    Args:
        model: the original LLM behind a projector.
        dataset: captions with pictures.
        tokenizer: that made their tokens.
        precision: what to compute in.
        count: captions to measure, evenly spread.

    Raises:
        DPAError: no caption has a picture that can be changed for another's.
    """
    found = [(i, dataset[i]) for i in spread(len(dataset), count)]
    seen = [(sample, dataset.images_of(i)) for i, sample in found
            if isinstance(sample, dict) and sample["pixel_values"]]  # fmt: skip
    own, others = [], []
    for place, (sample, images) in enumerate(seen):
        turned = seen[place + 1 :] + seen[:place]
        size = len(sample["pixel_values"])  # tiles count: they decide the tokens
        fitting = (each["pixel_values"] for each, names in turned if names != images)
        other = next((pixels for pixels in fitting if len(pixels) == size), None)
        if other is not None:
            own.append(sample)
            others.append(sample | {"pixel_values": other})
    if not own:
        raise DPAError(
            f"Of {len(found)} captions none has a picture that can be changed for another's: "
            f"measure more, by --samples."
        )
    blanks = [sample | {"pixel_values": _blank(sample["pixel_values"])} for sample in own]
    how = (tokenizer, precision)

    def text_alone(_: HeldOutModel, data: dict) -> TokenLogProbs:
        return contrast_log_probs(model.llm, data)

    return Leakage(
        text=caption_cost(model, own, *how, ask=text_alone),
        own=caption_cost(model, own, *how),
        other=caption_cost(model, others, *how),
        blank=caption_cost(model, blanks, *how),
    )


def _blank(pictures: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(picture) for picture in pictures]  # normalised, the mean is 0
