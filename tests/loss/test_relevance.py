"""The loss from log-probabilities, against hand-worked numbers and plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenLogProbs, build_scheme, relevance_loss, statistics

SUPERVISED = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)


def logits_of(p: list[float]) -> torch.Tensor:
    """Of two tokens each, the first with these probabilities."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1).requires_grad_()


def log_probs(logits, targets=None):
    """By plain PyTorch; the first token is the target where none is given."""
    targets = torch.zeros(len(logits), dtype=torch.int64) if targets is None else targets
    logit = logits.detach().gather(-1, targets[:, None])[:, 0]
    return TokenLogProbs(F.cross_entropy(logits, targets, reduction="none"), logit)


def random_batch(n: int = 60):
    torch.manual_seed(0)
    logits = torch.randn(n, 9, requires_grad=True)
    targets = torch.randint(0, 9, (n,))
    no_image = log_probs(torch.randn(n, 9), targets)
    return logits, targets, no_image, torch.ones(1, n, dtype=torch.bool)


def test_the_loss_and_what_it_saw_by_hand():
    one = log_probs(logits_of([0.9, 0.5, 0.4, 0.8]))
    other = log_probs(logits_of([0.1, 0.4, 0.6, 0.5]))
    loss, weights, sums = relevance_loss(one, other, SUPERVISED, build_scheme("cmo"))
    stats = statistics(sums)
    assert stats.pop("loss").item() == pytest.approx(loss.item())
    # d = 0.5 0.1 | 0.05 | 0.3, pooled 0.3 0.3 | 0.05 | 0.3
    assert weights.tolist() == pytest.approx([0.3, 0.3, 0.05, 0.3])
    nats = [-math.log(p) for p in (0.9, 0.5, 0.4, 0.8)]
    total = 0.3 * nats[0] + 0.3 * nats[1] + 0.05 * nats[2] + 0.3 * nats[3]
    assert loss.item() == pytest.approx(total / (0.95 + 1e-6), rel=1e-12)
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(
        {
            "cross_entropy": sum(nats) / 4,
            "mean_weight": 0.95 / 4,
            "supervised_tokens": 4,
            "share_at_d_min": 1 / 4,
            "share_at_d_max": 1 / 4,
            "mean_p_difference": (0.8 + 0.1 - 0.2 + 0.3) / 4,
        }
    )
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    "cfg",
    [
        "uniform",
        dict(type="cmo", d_min=0.5, d_max=0.5),
        dict(type="cmo", d_min=0.5, d_max=0.5, boundary="flat", window=5),
        dict(type="cal", d_min=2, d_max=2),
    ],
    ids=str,
)
def test_equal_weights_give_plain_cross_entropy(cfg):
    logits, targets, no_image, supervised = random_batch()
    scheme = build_scheme(cfg)
    ours, _, sums = relevance_loss(
        log_probs(logits, targets), no_image if scheme.contrast else None, supervised, scheme
    )
    theirs = F.cross_entropy(logits, targets)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert statistics(sums)["cross_entropy"].item() == pytest.approx(theirs.item(), abs=1e-6)
    (one,), (other,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["cmo", "cal"])
@pytest.mark.parametrize("normalize", ["micro_batch", "global"])
def test_the_gradient_is_that_of_constant_weights(name, normalize):
    logits, targets, no_image, supervised = random_batch()
    loss, weights, _ = relevance_loss(
        log_probs(logits, targets), no_image, supervised, build_scheme(name), normalize
    )
    w = weights.tolist()
    assert len({round(x, 6) for x in w}) > 20
    plain = F.cross_entropy(logits, targets, reduction="none")
    total = sum(factor * value for factor, value in zip(w, plain, strict=True))
    assert loss.item() == pytest.approx(total.item() / (sum(w) + 1e-6), rel=1e-5)
    (ours,) = torch.autograd.grad(loss, logits)
    (theirs,) = torch.autograd.grad(total, logits)
    # Under "global" whoever knows the weights of the whole step divides.
    divisor = sum(w) + 1e-6 if normalize == "micro_batch" else 1
    assert torch.allclose(ours, theirs / divisor, atol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "cmo", "cal"])
@pytest.mark.parametrize("normalize", ["micro_batch", "global"])
def test_no_supervised_token_gives_zero_and_a_graph(name, normalize):
    logits = torch.randn(0, 9, requires_grad=True)
    none = log_probs(logits, torch.zeros(0, dtype=torch.int64))
    scheme = build_scheme(name)
    supervised = torch.zeros(2, 5, dtype=torch.bool)
    loss, weights, sums = relevance_loss(
        none, none.detach() if scheme.contrast else None, supervised, scheme, normalize
    )
    assert loss.item() == 0 and weights.shape == (0,)
    loss.backward()
    assert set(map(float, statistics(sums).values())) == {0.0}


def test_an_unknown_normalization_is_refused():
    one = log_probs(logits_of([0.5] * 4))
    with pytest.raises(DPAError, match=r"normalize='globl'; did you mean 'global'.*'micro_batch'"):
        relevance_loss(one, None, SUPERVISED, build_scheme("uniform"), "globl")
