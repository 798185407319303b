"""What benchmarks/scaling.py adds up, by hand."""

import pytest
import scaling
from packing import Sample, deal_out, draw


def micro_batch(*lengths: int) -> list[Sample]:
    return [Sample(0, length, 0) for length in lengths]


def test_what_is_lost_by_hand():
    # Two ranks, two steps of two micro-batches; padded: 8, 3, 5, 4 and 6, 6, 5, 0.
    first = [micro_batch(4, 2), micro_batch(3), micro_batch(5), micro_batch(2, 2)]
    second = [micro_batch(6), micro_batch(3, 3), micro_batch(5), []]
    found = scaling.evenness([first, second], counts=2)
    useful = 6 + 3 + 5 + 4 + 6 + 6 + 5
    assert found.padding == pytest.approx(1 - useful / 37)
    assert found.per_step == pytest.approx(1 - useful / (2 * (12 + 9)))
    assert found.per_micro_batch == pytest.approx(1 - useful / (2 * (8 + 6 + 5 + 4)))


@pytest.mark.parametrize(("stage", "counts", "size"), [("align", 4, 8), ("tune", 8, 4)])
def test_level_ranks_lose_less(stage, counts, size):
    samples = draw(stage, 1024)
    before, now = (
        scaling.evenness(deal_out(samples, size, 8, 256, level), counts) for level in (False, True)
    )
    assert now.per_step < 0.02 < 5 * before.per_step
    assert all(a <= b for a, b in zip(now, before, strict=True))


def test_bytes_of_zero_by_the_papers_formulas():
    """Section 7 of arXiv 1910.02054: 2 n, 2 n and 3 n numbers without accumulation."""
    n, ranks = 1000, 1 << 20
    sent = [scaling.sent(zero, ranks, 1, n, n, passes=2) for zero in (1, 2, 3)]
    assert sent == pytest.approx([4 * n, 4 * n, 6 * n], rel=1e-5)
    assert scaling.sent(2, 2, 3, n, 10 * n, 2) == 4 * n
