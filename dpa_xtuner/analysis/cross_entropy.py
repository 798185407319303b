"""What captions cost a model, in nats, by word class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mmengine.device import get_device
from transformers import PreTrainedTokenizerBase

from dpa_xtuner.analysis.words import CLASSES, classes_of, token_texts
from dpa_xtuner.data import collate
from dpa_xtuner.loss import IGNORE_INDEX
from dpa_xtuner.loss.held_out import HeldOutModel, without_first
from dpa_xtuner.precision import Precision


@dataclass
class Cost:
    """Sums over the supervised tokens of some captions, each caption's first left out.

    Attributes:
        captions: the number of them.
        nats: cross entropy by word class.
        tokens: the number of tokens by word class.
    """

    captions: int = 0
    nats: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats.total() / max(self.tokens.total(), 1)

    @property
    def per_caption(self) -> float:
        """Nats per caption."""
        return self.nats.total() / max(self.captions, 1)

    def by_class(self) -> dict[str, float]:
        """Nats per token of each word class that occurs."""
        return {kind: self.nats[kind] / self.tokens[kind] for kind in CLASSES if self.tokens[kind]}


@torch.no_grad()
def caption_cost(
    model: HeldOutModel,
    samples: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    batch_size: int = 8,
) -> Cost:
    """Sum up the cross entropy of captions.

    Args:
        model: left in the mode it was in.
        samples: of a :class:`dpa_xtuner.data.DPADataset`.
        tokenizer: that made their tokens.
        precision: what to compute in.
        batch_size: samples at a time.
    """
    cost, training = Cost(captions=len(samples)), model.training
    model.train(False)
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        data = model.data_preprocessor(collate(rows), False)["data"]
        data = data | {"labels": without_first(data["labels"])}
        with precision.autocast(get_device()):
            nats = model.log_probs(data).cross_entropy.tolist()  # (N,)
        kinds = [kind for row in rows for kind in _classes(row, tokenizer)]
        for kind, value in zip(kinds, nats, strict=True):
            cost.nats[kind] += value
            cost.tokens[kind] += 1
    model.train(training)
    return cost


def _classes(sample: dict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the class of each supervised token of a sample but its first."""
    text = sample["input_ids"] >= 0
    kinds = classes_of(token_texts(tokenizer, sample["input_ids"][text].tolist()))
    supervised = sample["labels"][text] != IGNORE_INDEX
    return [kind for kind, counts in zip(kinds, supervised, strict=True) if counts][1:]
