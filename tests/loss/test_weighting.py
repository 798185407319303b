"""Weights, worked by hand and by loops."""

import math

import pytest
import torch

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import (
    CAL,
    CMO,
    Contrast,
    TokenLogProbs,
    TokenWeights,
    Uniform,
    build_scheme,
    relevance_loss,
)

# Two samples. The first has two turns: a token that is not supervised stands between them.
SUPERVISED = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
WITH = [0.9, 0.35, 0.1, 0.5, 0.45, 0.12, 0.25]
WITHOUT = [0.2, 0.1, 0.4, 0.05, 0.1, 0.1, 0.1]
CLAMPED = [0.5, 0.25, 0.05, 0.45, 0.35, 0.05, 0.15]


def of(p=None, logit=None) -> TokenLogProbs:
    p = torch.tensor(p if p is not None else [0.5] * len(logit))
    return TokenLogProbs(-p.log(), torch.tensor(logit) if logit else torch.zeros(len(p)))


def weights(scheme, one: TokenLogProbs, other: TokenLogProbs, supervised=SUPERVISED) -> list[float]:
    return pytest.approx(scheme.weights(one, other, supervised).values.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (CMO(window=1), CLAMPED),
        # (50 + 25) / 2, the same, (5 + 45) / 2, (5 + 45 + 35) / 3, (45 + 35) / 2; (5 + 15) / 2
        (CMO(), [0.375, 0.375, 0.25, 0.85 / 3, 0.4, 0.1, 0.1]),
        # Five positions: the second turn lies within reach of the first one's last token.
        (CMO(window=5), [0.375, 0.8 / 3, 0.275, 0.85 / 3, 0.85 / 3, 0.1, 0.1]),
        # (50 + 25) / 2, (50 + 25 + 5) / 3, (5 + 5 + 45) / 3, (5 + 45 + 35) / 3,
        # (45 + 35 + 5) / 3 over the edge of the sample; (5 + 5 + 15) / 3, (5 + 15 + 5) / 3
        (
            CMO(boundary="flat"),
            [0.375, 0.8 / 3, 0.55 / 3, 0.85 / 3, 0.85 / 3, 0.25 / 3, 0.25 / 3],
        ),
        (CMO(d_min=0.0, d_max=0.3, window=1), [0.3, 0.25, 0.0, 0.3, 0.3, 0.02, 0.15]),
    ],
)
def test_cmo_by_hand(scheme, expected):
    assert weights(scheme, of(WITH), of(WITHOUT)) == expected
    relevance = scheme.weights(of(WITH), of(WITHOUT), SUPERVISED).relevance
    if scheme.d_min == 0.05:
        assert relevance.tolist() == pytest.approx(CLAMPED, abs=1e-6)


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        # Clamped to [1, 5]: 5, 2.5, 1, 4, 3; 1, 2.
        ("sample", [3.75, 3.75, 2.5, 8 / 3, 3.5, 1.5, 1.5]),
        ("flat", [3.75, 8.5 / 3, 2.0, 8 / 3, 8 / 3, 4 / 3, 4 / 3]),
    ],
)
def test_cal_by_hand(boundary, expected):
    one = of(logit=[9.0, 1.0, -3.0, 4.5, 2.0, 0.3, -1.0])
    other = of(logit=[2.0, -1.5, 2.0, 0.5, -1.0, 0.1, -3.0])
    assert weights(CAL(boundary=boundary), one, other) == expected


def pooled_by_loops(d, supervised, window, d_min, boundary) -> list[float]:
    given, rows = iter(d), []
    for row in supervised.tolist():
        rows.append([next(given) if there else None for there in row])
    if boundary == "flat":
        rows = [[d_min if x is None else x for row in rows for x in row]]
    means = []
    for row in rows:
        for i in range(len(row)):
            near = row[max(0, i - window // 2) : i + window // 2 + 1]
            near = [x for x in near if x is not None]
            means.append(sum(near) / len(near) if near else None)
    flags = supervised.flatten().tolist()
    return [mean for mean, there in zip(means, flags, strict=True) if there]


@pytest.mark.parametrize("boundary", ["sample", "flat"])
@pytest.mark.parametrize("window", [1, 3, 7, 41])
@pytest.mark.parametrize("seed", range(5))
def test_weights_of_random_batches_are_those_of_loops(boundary, window, seed):
    torch.manual_seed(seed)
    supervised = torch.rand(4, 11) < 0.6
    supervised[seed % 4] = False  # a sample without a supervised token
    n = int(supervised.sum())
    one, other = of(torch.rand(n).tolist()), of(torch.rand(n).tolist())
    pairs = zip(one.probability.tolist(), other.probability.tolist(), strict=True)
    d = [min(max(p_w - p_wo, 0.1), 0.4) for p_w, p_wo in pairs]
    scheme = CMO(d_min=0.1, d_max=0.4, window=window, boundary=boundary)
    expected = pooled_by_loops(d, supervised, window, 0.1, boundary)
    assert weights(scheme, one, other, supervised) == expected


@pytest.mark.parametrize("boundary", ["sample", "flat"])
@pytest.mark.parametrize("scheme", [CMO, CAL])
def test_a_sample_without_a_picture_has_the_least_weight(scheme, boundary):
    scheme = scheme(boundary=boundary)
    assert weights(scheme, of(WITH), of(WITH)) == [scheme.d_min] * len(WITH)


def test_uniform_needs_no_second_pass():
    scheme = build_scheme("uniform")
    assert scheme == Uniform() and not scheme.contrast
    assert scheme.weights(of(WITH), None, SUPERVISED).values.tolist() == [1.0] * len(WITH)


class Unsure:
    """A scheme that derives from nothing: what the model is unsure of counts."""

    contrast = False
    d_min = d_max = 0.0

    def weights(self, log_probs, no_image, supervised) -> TokenWeights:
        return TokenWeights(1 - log_probs.probability.detach(), None)


def test_a_scheme_of_ones_own_needs_no_parent():
    loss, found, sums = relevance_loss(of(WITH), None, SUPERVISED, Unsure())
    assert found.tolist() == pytest.approx([1 - p for p in WITH])
    weighted = sum((1 - p) * -math.log(p) for p in WITH)
    assert loss.item() == pytest.approx(weighted / sum(1 - p for p in WITH), rel=1e-5)
    assert "at_d_min" not in sums


def test_schemes_written_for_the_earlier_name_work():
    class Doubled(Contrast):
        def difference(self, scores, without):
            return 2 * (scores.probability - without.probability)

    half = CMO(d_min=0.025, d_max=0.25)
    expected = [2 * w for w in half.weights(of(WITH), of(WITHOUT), SUPERVISED).values.tolist()]
    assert weights(Doubled(d_min=0.05, d_max=0.5), of(WITH), of(WITHOUT)) == expected


def test_weights_carry_no_gradient_and_nothing_is_changed():
    given = [x.requires_grad_() for x in (*of(WITH), *of(WITHOUT))]
    before = [x.detach().clone() for x in given]
    found, _ = CMO().weights(TokenLogProbs(*given[:2]), TokenLogProbs(*given[2:]), SUPERVISED)
    assert not found.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="cmo", d_min=0.6), r"d_min=0\.6, d_max=0\.5: expected .*0 <= d_min <= d_max"),
        (dict(type="cal", d_max=-1), r"d_min=1\.0, d_max=-1: .* Swap or change"),
        (dict(type="cmo", d_min=-0.1), r"d_min=-0\.1"),
        (dict(type="cmo", d_min=0, d_max=0), r"d_max above 0"),
        (dict(type="cmo", d_max=float("inf")), "d_max=inf"),
        (dict(type="cmo", d_min=float("nan")), "d_min=nan"),
        (dict(type="cmo", d_min="small"), r"d_min: expected float \(got 'small'\)"),
        (dict(type="cmo", window=-3), "window=-3 is not an odd whole number.* 1 stands for no"),
        (dict(type="cmo", window=4), "window=4 is not"),
        (dict(type="cmo", window=0), "window=0 is not"),
        (dict(type="cmo", window=3.0), r"window: expected int \(got 3.0\)"),
        (dict(type="cmo", boundary="flatt"), "boundary='flatt'; did you mean 'flat'.*'sample'"),
        (dict(type="cmo", boundary=3), r"boundary: expected str \(got 3\)"),
        (dict(type="cmo", dmin=0.1), "dmin: not a known key; did you mean 'd_min'"),
        (dict(type="uniform", window=3), "window: not a known key. It takes no arguments"),
        ("cmoo", "'cmoo' is not .*; did you mean 'cmo'.*Known: cal, cmo, uniform.*custom_imports"),
        (dict(window=3), "None is not a known weighting scheme"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named_with_the_way_out(cfg, message):
    with pytest.raises(DPAError, match=message) as refusal:
        build_scheme(cfg)
    assert isinstance(refusal.value, ValueError)
