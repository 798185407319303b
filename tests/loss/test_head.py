"""The chunked head against the plain computation that holds all logits."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpa_xtuner.loss import head as module
from dpa_xtuner.loss import token_log_probs

N, H, V = 7, 6, 11
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F32: 1e-6, BF16: 2e-2, F16: 2e-3, F64: 1e-12}


def head(bias: bool, trains: bool, dtype=F32, hidden=None, n=N):
    torch.manual_seed(0)
    arguments = dict(
        hidden=torch.randn(n, H).to(hidden or dtype).requires_grad_(),
        weight=torch.randn(V, H).to(dtype).requires_grad_(trains),
        bias=torch.randn(V).to(dtype).requires_grad_(trains) if bias else None,
    )
    return arguments, torch.randint(0, V, (n,))


def plain(hidden, weight, bias, targets, softcap):
    """All logits at once, softmax in float32."""
    logits = F.linear(hidden.to(weight.dtype), weight, bias)
    logits = logits if logits.dtype == F64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none"), logits[range(len(targets)), targets]


def gradients(cross_entropy, arguments) -> list[torch.Tensor]:
    factors = torch.linspace(0.1, 2, len(cross_entropy)).to(cross_entropy)
    leaves = [a for a in arguments.values() if a is not None and a.requires_grad]
    return torch.autograd.grad((factors * cross_entropy).sum(), leaves)


def near(ours, theirs, tolerance: float) -> bool:
    scale = theirs.abs().max().item() if theirs.numel() else 0
    return ours.dtype == theirs.dtype and torch.allclose(ours, theirs, 0, tolerance * (1 + scale))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("hidden", "dtype", "autocast"),
    [
        (F32, F32, False), (BF16, BF16, False), (F16, F16, False), (F64, F64, False),
        (F32, F32, True), (BF16, F32, True), (BF16, BF16, True), (F32, BF16, False),
    ],
)  # fmt: skip
def test_log_probabilities_and_gradients_are_those_of_all_logits_at_once(
    trains, bias, softcap, hidden, dtype, autocast
):
    arguments, targets = head(bias, trains, dtype, hidden)
    with torch.autocast("cpu", BF16, enabled=autocast):
        ours = token_log_probs(**arguments, targets=targets, softcap=softcap, chunk_size=3)
        cross_entropy, logit = plain(**arguments, targets=targets, softcap=softcap)
    assert not ours.logit.requires_grad
    assert near(ours.cross_entropy, cross_entropy, 1e-6)  # summed up in float32, always
    assert near(ours.logit, logit, 1e-6)
    assert near(ours.probability, torch.exp(-cross_entropy), 1e-6)
    pairs = zip(
        gradients(ours.cross_entropy, arguments), gradients(cross_entropy, arguments), strict=True
    )
    assert all(near(*pair, TOLERANCE[BF16 if autocast else dtype]) for pair in pairs)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_finite_differences(trains, bias, softcap):
    arguments, targets = head(bias, trains, F64)
    leaves = [a for a in arguments.values() if a is not None]

    def cross_entropy(hidden, weight, bias=None):
        return token_log_probs(hidden, targets, weight, bias, softcap, chunk_size=3).cross_entropy

    assert torch.autograd.gradcheck(cross_entropy, leaves)


def test_a_head_alone_can_train():
    arguments, targets = head(bias=True, trains=True)
    arguments["hidden"] = arguments["hidden"].detach()
    ours = token_log_probs(**arguments, targets=targets, chunk_size=2).cross_entropy
    theirs, _ = plain(**arguments, targets=targets, softcap=None)
    pairs = zip(gradients(ours, arguments), gradients(theirs, arguments), strict=True)
    assert all(near(*pair, 1e-6) for pair in pairs)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_the_size_of_the_chunks_does_not_matter(trains, monkeypatch):
    arguments, targets = head(bias=True, trains=trains)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE_ON_CPU", 3 * V + 1)

    def outcome(size: int | None) -> list[torch.Tensor]:
        found = token_log_probs(**arguments, targets=targets, softcap=2.0, chunk_size=size)
        return [*found, *gradients(found.cross_entropy, arguments)]

    whole = outcome(N)
    for size in (1, 2, 3, 6, 100, None):
        assert all(near(*pair, 1e-6) for pair in zip(outcome(size), whole, strict=True)), size


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_no_token_gives_a_graph_and_zero_gradients(trains):
    arguments, targets = head(bias=True, trains=trains, n=0)
    found = token_log_probs(**arguments, targets=targets)
    assert found.cross_entropy.shape == found.logit.shape == (0,)
    for gradient in gradients(found.cross_entropy, arguments):
        assert not gradient.any()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_no_argument_is_changed(trains):
    arguments, targets = head(bias=True, trains=trains)
    given = [*arguments.values(), targets]
    before = [a.detach().clone() for a in given]
    found = token_log_probs(**arguments, targets=targets, softcap=2.0, chunk_size=3)
    gradients(found.cross_entropy, arguments)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


class Alive(TorchDispatchMode):
    """Counts the elements, of tensors with V columns, that are alive at a time."""

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[1:] == (V,):
            seen = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if result.data_ptr() not in seen:  # neither in place nor a view
                self.now += result.numel()
                self.peak = max(self.peak, self.now)
                weakref.finalize(result, self.gone, result.numel())
        return result

    def gone(self, elements: int) -> None:
        self.now -= elements


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_few_chunks_of_logits_are_held_and_never_all(trains):
    def peak(compute) -> int:
        arguments, targets = head(bias=True, trains=trains, n=64)
        with Alive() as alive:
            gradients(compute(arguments, targets), arguments)
        return alive.peak

    def ours(arguments, targets):
        return token_log_probs(**arguments, targets=targets, chunk_size=2).cross_entropy

    def theirs(arguments, targets):
        return plain(**arguments, targets=targets, softcap=None)[0]

    assert peak(ours) <= 4 * 2 * V
    assert peak(theirs) >= 64 * V
