"""What benchmarks/packing.py adds up, by hand."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "packing.py"


@pytest.fixture(scope="module")
def packing():
    spec = importlib.util.spec_from_file_location("packing", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("lengths", "per_token", "per_pair", "expected"),
    [
        ([5, 11, 6], 1, 0, 2 * 11),  # 11, and 6 + 5 beside each other
        ([10, 8, 9, 8], 1, 0, 2 * 18),  # 10 + 8 and 9 + 8: wider than the longest
        ([10, 8, 9, 8], 0, 1, 4 * 10**2),  # where attention alone costs, padding is cheaper
        ([11, 10, 9], 1, 0, 3 * 11),
    ],
)
def test_rows_are_shared_where_that_costs_less(packing, lengths, per_token, per_pair, expected):
    assert packing.pack(lengths, packing.Cost(per_token, per_pair)) == expected


def test_a_cost_is_found_from_counts_and_held_against_another(packing):
    assert packing.fit(lambda rows, width: rows * width * (7 + 3 * width)) == (7, 3)
    with pytest.raises(AssertionError):
        packing.fit(lambda rows, width: rows * width**3)


@pytest.mark.parametrize("ranks", [1, 8])
def test_every_sample_is_in_one_micro_batch(packing, ranks):
    samples = packing.draw("tune", 300)
    batches = list(packing.micro_batches(samples, 4, ranks, 256))
    assert (max(map(len, batches)) == 4) if ranks == 1 else (4 < max(map(len, batches)) <= 16)
    assert Counter(sample for batch in batches for sample in batch) == Counter(samples)


def test_savings_are_parts_of_all_operations(packing):
    batch = [packing.Sample(2, 3, 6), packing.Sample(1, 1, 0), packing.Sample(0, 2, 0)]
    costs = packing.Stage(packing.Cost(100, 0), 7, 5, packing.Cost(10, 0))
    found = packing.savings(costs, [batch])
    # 11, 2 and 2 tokens in 3 rows of 11, or in one of 15; 5 text tokens in the contrast pass.
    head = 2 * packing.LLM.hidden_size * packing.LLM.vocab_size
    assert found["all"] == 100 * 33 + 7 * 6 + 5 + 10 * 5 + 3 * head
    assert (found["main"], found["contrast"]) == (100 * 18, 0)
    assert (found["places"], found["padding"]) == (33, 18)
