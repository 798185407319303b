"""What a token counts in an optimizer step, however long its answer; what the log says of it."""

import re
from types import SimpleNamespace

import pytest
import torch
from support import harness

from dpa_xtuner.data import GroupedSampler
from dpa_xtuner.data.sampler import NOTHING
from dpa_xtuner.engine.hooks import OptimizerStepHook
from dpa_xtuner.loss import Objective, TokenLogProbs

CLASSES = ((2, 5, 0.45), (15, 60, 0.35), (120, 401, 0.20))
SAMPLES, GLOBAL_BATCH, MICRO_BATCH = 10_240, 256, 4


class Answers:
    """Samples of which nothing matters but the number of supervised tokens."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.kind = torch.multinomial(
            torch.tensor([share for *_, share in CLASSES]), SAMPLES, True, generator=random
        )
        low, high = (torch.tensor([c[i] for c in CLASSES])[self.kind] for i in (0, 1))
        drawn = torch.rand(SAMPLES, generator=random)
        self.counts = (low + drawn * (high - low)).long()
        # Text in front of the answers, and pictures of 576 tokens for all but every fifth.
        self.modality_length = [
            int(count) + 30 + 576 if i % 5 else -int(count) - 30
            for i, count in enumerate(self.counts)
        ]

    def __len__(self):
        return SAMPLES


@pytest.fixture(scope="module")
def answers():
    return Answers()


def token_weights(answers: Answers, world: int, normalize: str, monkeypatch) -> torch.Tensor:
    """Per class, the gradient of its tokens' cross entropies relative to the step's mean.

    The ranks are simulated: each gives its sampler's micro-batches to the real objective, and the
    real hook divides; gradients of ranks and micro-batches are averaged, as DDP and MMEngine do.
    """
    where = "xtuner.dataset.samplers.length_grouped.get_dist_info"
    accumulate = GLOBAL_BATCH // (MICRO_BATCH * world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(where, lambda rank=rank: (rank, world))
        sampler = GroupedSampler(
            answers, MICRO_BATCH * accumulate, "modality_length", mega_batch_mult=1, seed=1
        )
        shares.append(list(sampler))
    total, tokens = torch.zeros(len(CLASSES), dtype=torch.float64), torch.zeros(len(CLASSES))
    per_rank = MICRO_BATCH * accumulate
    for step in range(len(shares[0]) // per_rank):
        part = slice(step * per_rank, (step + 1) * per_rank)
        gradients, counts = _step([share[part] for share in shares], answers, normalize, accumulate)
        total += gradients * counts.sum()  # relative to a token's part of the step's mean
        tokens += counts
    return total / tokens


def _step(shares, answers, normalize, accumulate) -> tuple[torch.Tensor, torch.Tensor]:
    objective = Objective("uniform", normalize)
    of_class = torch.ones(len(CLASSES), dtype=torch.float64, requires_grad=True)
    counts = torch.zeros(len(CLASSES))
    for share in shares:
        for start in range(0, len(share), MICRO_BATCH):
            rows = [i for i in share[start : start + MICRO_BATCH] if i != NOTHING]
            kinds = torch.cat([answers.kind[i].expand(answers.counts[i]) for i in rows] or
                              [torch.zeros(0, dtype=torch.long)])  # fmt: skip
            counts += torch.bincount(kinds, minlength=len(CLASSES))
            labels = torch.ones(1, len(kinds) + 1, dtype=torch.long)
            cross_entropy = of_class[kinds]
            scores = TokenLogProbs(cross_entropy, torch.zeros_like(cross_entropy))
            data = {"labels": labels, "ids": [], "image_mask": labels == 0}
            loss = objective(scores, None, data)["loss"]
            (loss / (accumulate * len(shares))).backward()
    wrapper = SimpleNamespace(
        param_groups=[{"params": [of_class]}], step=lambda: None, _accumulative_counts=accumulate
    )
    model = SimpleNamespace(objective=objective)
    OptimizerStepHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    wrapper.step()
    return of_class.grad, counts


@pytest.mark.parametrize("world", [1, 2, 8])
def test_a_token_counts_the_same_in_answers_of_any_length(answers, world, monkeypatch):
    weights = token_weights(answers, world, "global", monkeypatch)
    assert weights.tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.01)


def test_with_micro_batch_tokens_of_short_answers_count_more(answers, monkeypatch):
    short, _, long = token_weights(answers, 2, "micro_batch", monkeypatch).tolist()
    assert short > 5 and long < 0.8


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_log_is_that_of_whole_steps(tiny, tmp_path, ranks, deepspeed):
    """29 captions in steps of 8: the last has 5, and each caption's tokens are counted once."""
    options = ["precision=fp32", "proxy.max_steps=None", "proxy.batch_size=2", "proxy.lr=1e-9"]
    options += ["proxy.global_batch_size=8", "proxy.save_steps=100"]
    options += ["default_hooks.logger.interval=1", "log_processor.window_size=1"]
    work_dir = tmp_path / "run"
    how = dict(ranks=ranks, deepspeed=deepspeed)
    output = harness.finish("proxy", work_dir, *options, **how)
    assert "29 samples / global_batch_size 8 = 4 steps an epoch; the last is of 5" in output
    assert "takes only 4 steps" in output
    found = re.findall(r"cross_entropy: ([\d.]+).*?supervised_tokens: ([\d.]+)", output)
    assert len(found) >= 4
    seen = dict.fromkeys(found)  # a line is repeated until the next step's end
    tokens = sum(float(count) for _, count in seen)
    everything = harness.finish("proxy", tmp_path / "one", *options,
                                "proxy.global_batch_size=32", "proxy.batch_size=16")  # fmt: skip
    (whole,) = dict.fromkeys(
        re.findall(r"cross_entropy: ([\d.]+).*?supervised_tokens: ([\d.]+)", everything)
    )
    assert tokens == float(whole[1])
    mean = sum(float(ce) * float(count) for ce, count in seen) / tokens
    assert mean == pytest.approx(float(whole[0]), abs=2e-3)
