"""What a run's loss looks at: each token's weight, on one HTML page that needs no other file."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa_xtuner import pages
from dpa_xtuner.analysis.models import split_data, spread, trained_model
from dpa_xtuner.analysis.words import CLASSES, PART, classes_of, token_texts
from dpa_xtuner.data import collate
from dpa_xtuner.data.formats import data_sha256
from dpa_xtuner.data.places import open_bytes
from dpa_xtuner.data.problems import list_problems
from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.source import Source
from dpa_xtuner.files import prepare_to_write, write_text
from dpa_xtuner.loss import TokenLogProbs, supervised_mask
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.llm import supervised_log_probs

BINS = 12
"""Bars of a histogram."""

_TEMPLATE = Path(__file__).with_name("relevance.html")


class Weights(NamedTuple):
    """What the loss makes of a sample's N supervised tokens; each float32 on the CPU.

    Attributes:
        weight: (N,), what each cross entropy is multiplied by.
        p_w: (N,), the token's probability with the picture.
        p_wo: (N,), without it.
        d: (N,), the scheme's clamped comparison before pooling; for a scheme that compares
            nothing, ``p_w - p_wo``.
    """

    weight: Tensor
    p_w: Tensor
    p_wo: Tensor
    d: Tensor


@dataclass(frozen=True)
class Token:
    """A supervised token as the page shows it; the numbers as of :class:`Weights`."""

    text: str
    kind: str
    weight: float
    p_w: float
    p_wo: float
    d: float


@dataclass(frozen=True)
class Sample:
    """A sample as the page shows it.

    Attributes:
        name: the record's id.
        images: the files of its pictures.
        pieces: its text in order: tokens that are supervised, and text between them that is not.
    """

    name: str
    images: list[str]
    pieces: list[Token | str] = field(default_factory=list)

    @property
    def tokens(self) -> list[Token]:
        """The supervised ones."""
        return [piece for piece in self.pieces if isinstance(piece, Token)]


def both_passes(
    llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], data: dict
) -> tuple[TokenLogProbs, TokenLogProbs]:
    """Compute the log-probabilities of a batch's N supervised tokens with the pictures and without.

    Args:
        llm: the LLM, wrapped by peft or not.
        inputs: the decoder's inputs, pictures spliced in.
        data: a batch of :func:`dpa_xtuner.data.collate`.

    Returns:
        Both; they are the same for samples without a picture.
    """
    log_probs, supervised = supervised_log_probs(llm, inputs, data), supervised_mask(data["labels"])
    has_image = data["image_mask"].any(1, keepdim=True).expand_as(supervised)[supervised]
    return log_probs, contrast_log_probs(llm, data).where(has_image, log_probs)


@torch.no_grad()
def weigh(model: DPALLaVAModel, data: dict) -> Weights:
    """Weigh a batch's tokens as its training does; the pass without pictures is run for any scheme.

    Args:
        model: in evaluation mode.
        data: a batch of :func:`dpa_xtuner.data.collate`.
    """
    scheme, supervised = model.objective.scheme, supervised_mask(data["labels"])
    log_probs, no_image = both_passes(model.llm, model.splice(data), data)
    found = scheme.weights(log_probs, no_image if scheme.contrast else None, supervised)
    p_w, p_wo = log_probs.probability, no_image.probability
    d = p_w - p_wo if found.relevance is None else found.relevance
    return Weights(*(each.float().cpu() for each in (found.values, p_w, p_wo, d)))


def read_sample(
    sample: dict, weights: Weights, tokenizer: PreTrainedTokenizerBase, images: list[str]
) -> Sample:
    """Put a sample's text and its weights together.

    Args:
        sample: of a :class:`dpa_xtuner.data.DPADataset`.
        weights: of its supervised tokens.
        tokenizer: the run's.
        images: the files of its pictures.
    """
    ids, labels = sample["input_ids"], sample["labels"].copy()
    labels[0] = -100  # predicted from nothing
    is_text = ids >= 0
    texts = token_texts(tokenizer, ids[is_text].tolist())
    numbers = iter(zip(*(each.tolist() for each in weights), strict=True))
    found = Sample(sample["id"], images)
    supervised = (labels[is_text] >= 0).tolist()
    for text, kind, counts in zip(texts, classes_of(texts), supervised, strict=True):
        if counts:
            found.pieces.append(Token(text, kind, *next(numbers)))
        elif found.pieces and isinstance(found.pieces[-1], str):
            found.pieces[-1] += text.rstrip(PART)
        else:
            found.pieces.append(text.rstrip(PART))
    return found


def by_class(samples: Iterable[Sample], bounds: tuple[float, float]) -> list[dict]:
    """Count and average the tokens of each word class that occurs.

    Args:
        samples: whose tokens.
        bounds: between which the histogram's :data:`BINS` lie.

    Returns:
        Each class's ``kind``, number of ``tokens``, ``share`` of all weight, mean ``weight``,
        ``p_w``, ``p_wo`` and ``d``, and ``bars``, the histogram of its weights, the highest 1.
    """
    tokens = [token for sample in samples for token in sample.tokens]
    total = sum(token.weight for token in tokens) or 1.0
    rows = []
    for kind in CLASSES:
        of_kind = [token for token in tokens if token.kind == kind]
        if not of_kind:
            continue
        means = {
            name: float(np.mean([getattr(token, name) for token in of_kind]))
            for name in ("weight", "p_w", "p_wo", "d")
        }
        low, high = bounds
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        values = np.clip([token.weight for token in of_kind], edges[0], edges[-1])
        counts, _ = np.histogram(values, edges)
        share = sum(token.weight for token in of_kind) / total
        bars = (counts / counts.max()).tolist()
        rows.append(dict(kind=kind, tokens=len(of_kind), share=share, bars=bars, **means))
    return rows


def page(samples: list[Sample], title: str, facts: dict[str, str]) -> str:
    """Make the page.

    Args:
        samples: to show.
        title: of the page.
        facts: what it says of the run, by name.
    """
    weights = [token.weight for sample in samples for token in sample.tokens]
    low, high = min(weights, default=0.0), max(weights, default=1.0)
    shown = [
        {
            "sample": sample,
            "pictures": [pages.embedded(open_bytes(image)) for image in sample.images],
        }
        for sample in samples
    ]
    return pages.render(
        _TEMPLATE,
        title=title,
        facts=facts,
        shown=shown,
        classes=by_class(samples, (low, high)),
        low=low,
        high=high,
        spread=(high - low) or 1.0,
        is_token=lambda piece: isinstance(piece, Token),
    )


def _kind(source: Source, held_out: bool) -> str:
    """Name the samples that a page shows, by what the stage was trained on."""
    settings, trained = source.run.settings, source.stage_provenance.get("data", {})
    data = settings.data_of(source.stage.sample_format)
    if trained.get("sha256") not in (None, [data_sha256(file) for file in data.files]):
        return f"samples of {', '.join(data.files)}, which the stage was not trained on"
    if not held_out:
        return "samples that it was trained on"
    if trained and trained.get("held_out", 0) < settings.captions.held_out:
        return "samples, some of which it was trained on"
    return "held-out samples"


def show_relevance(source: Source, count: int, out: Path | None) -> Path:
    """Write the page of a run's stage.

    Args:
        source: of :func:`dpa_xtuner.analysis.models.find_source`.
        count: samples to show, evenly spread.
        out: the page's file; None for ``relevance.html`` in the stage's folder.

    Returns:
        The page's file.

    Raises:
        DPAError: weights or data can't be read, or none of the samples.
    """
    file = out or source.run.work_dir / source.stage.name / "relevance.html"
    prepare_to_write(file)
    train, held_out = split_data(source.run, source.stage)
    dataset = train if held_out is None else held_out
    what = _kind(source, held_out is not None)
    model, tokenizer = trained_model(source), source.run.tokenizer
    samples, problems = [], []
    for index in spread(len(dataset), count):
        if not isinstance(sample := dataset[index], dict):
            problems += [sample] if sample else []
            continue
        data = model.data_preprocessor(collate([sample]), False)["data"]
        with source.run.precision.autocast(get_device()):
            weights = weigh(model, data)
        samples.append(read_sample(sample, weights, tokenizer, dataset.images_of(index)))
    if not samples:
        raise DPAError(f"None of the {what} can be read:\n{list_problems(problems)}")
    facts = {
        "run": f"{source.run.work_dir}, method {source.run.settings.method}",
        "stage": f"{source.stage.name}, {source.checkpoint or 'as it ended'}",
        "loss": str(model.objective.scheme),
        "LLM": source.run.settings.llm_name_or_path,
        "shown": f"{len(samples)} of {len(dataset)} {what}",
    }
    if problems:
        facts["left out"] = f"{len(problems)} that can't be read: {list_problems(problems)}"
        print_log(f"The page leaves out {facts['left out']}", "current", logging.WARNING)
    write_text(file, page(samples, f"What {source.stage.name} looks at", facts))
    return file
