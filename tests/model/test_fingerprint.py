"""The fingerprint of weights tells any two models apart, and the same weights never."""

import hashlib

import pytest
import torch
from torch import nn

from dpa_xtuner.model import fingerprint as module
from dpa_xtuner.model.fingerprint import fingerprint


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False)).bfloat16()


def test_equal_weights_have_equal_fingerprints(model):
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False)).bfloat16()
    assert fingerprint(model) == fingerprint(twin)
    int(fingerprint(model), 16)
    assert len(fingerprint(model)) == hashlib.sha256().digest_size * 2


def test_the_dtype_they_are_loaded_in_does_not_matter(model):
    published = fingerprint(model, torch.bfloat16)
    assert fingerprint(model.float(), torch.bfloat16) == published
    assert fingerprint(model) != published


def test_any_changed_element_changes_it(model):
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        bits = parameter.data.view(-1).view(torch.int16)
        for i in range(len(bits)):
            bits[i] ^= 1
            seen.add(fingerprint(model))
            bits[i] ^= 1
    assert len(seen) == 1 + sum(p.numel() for p in model.parameters())
    assert fingerprint(model) in seen


def test_any_two_swapped_elements_change_it(model):
    flat, whole = model[0].weight.data.view(-1), fingerprint(model)
    for i in range(len(flat)):
        for j in range(i):
            assert flat[i] != flat[j]
            flat[[i, j]] = flat[[j, i]]
            assert fingerprint(model) != whole
            flat[[i, j]] = flat[[j, i]]


def test_names_and_shapes_count(model):
    class Renamed(nn.Module):
        def __init__(self, name: str, shape: tuple[int, ...]):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.arange(6.0).reshape(shape)))

    shapes = [("a", (2, 3)), ("b", (2, 3)), ("a", (3, 2)), ("a", (6,))]
    assert len({fingerprint(Renamed(*each)) for each in shapes}) == 4


def test_it_does_not_depend_on_the_chunks(model, monkeypatch):
    whole = fingerprint(model)
    monkeypatch.setattr(module, "_CHUNK", 4)
    assert fingerprint(model) == whole
