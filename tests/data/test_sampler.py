"""Grouped sampling: what stock does, and beginning in the middle."""

import pytest
from mmengine.registry import DATA_SAMPLERS
from xtuner.dataset.samplers import LengthGroupedSampler

from dpa_xtuner.data import GroupedSampler
from dpa_xtuner.data.sampler import NOTHING


class Lengths:
    def __init__(self, *lengths):
        self.modality_length = list(lengths)

    def __len__(self):
        return len(self.modality_length)


MIXED = Lengths(*range(1, 41), *range(-30, 0))


def build(dataset, batch_size=4, **settings):
    settings = {"length_property": "modality_length", "seed": 3, **settings}
    return GroupedSampler(dataset, batch_size, **settings)


@pytest.fixture
def rank(monkeypatch):
    """Sets rank and world size as the stock sampler sees them."""

    def set_rank(rank, world_size):
        where = "xtuner.dataset.samplers.length_grouped.get_dist_info"
        monkeypatch.setattr(where, lambda: (rank, world_size))

    return set_rank


@pytest.mark.parametrize("mult", [None, 1])
def test_whole_batches_are_the_stock_samplers(mult):
    stock = LengthGroupedSampler(MIXED, 4, "modality_length", mega_batch_mult=mult, seed=3)
    ours = build(MIXED, mega_batch_mult=mult)
    assert list(ours)[:68] == list(stock)[:68] and len(ours) == len(stock) == 72
    assert sorted(i for i in ours if i != NOTHING) == list(range(70))


def test_start_leaves_out_once():
    sampler = build(MIXED, start=5)
    whole = list(build(MIXED))
    assert list(sampler) == whole[5:]
    assert list(sampler) == whole and len(sampler) == len(whole)
    sampler.start = 8
    sampler.set_epoch(1)
    rest = list(sampler)
    sampler.set_epoch(1)
    assert rest == list(sampler)[8:]
    sampler.start = len(whole)
    assert list(sampler) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_global_batch_is_one_modality_and_alike_in_length(rank, world_size):
    shares = []
    for i in range(world_size):
        rank(i, world_size)
        shares.append(list(build(MIXED, 4, mega_batch_mult=1)))
    size = 4 * world_size
    order = [index for group in zip(*shares, strict=True) for index in group]
    order = [index for index in order if index != NOTHING]
    assert sorted(order) == list(range(70))
    batches = [order[i : i + size] for i in range(0, 70, size)]
    lengths = [[MIXED.modality_length[i] for i in batch] for batch in batches]
    mixed = [i for i, batch in enumerate(lengths) if min(batch) < 0 < max(batch)]
    # Stock puts the two remainders into the last batches, and the longest sample of all first,
    # by a swap that may reach over modalities.
    assert len([i for i in mixed if i < len(batches) - 2]) <= 2
    for batch in lengths[1:-2]:
        tail = [abs(length) for length in batch[1:]]
        assert tail == sorted(tail, reverse=True)
    assert max(map(abs, lengths[0])) == 40


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
@pytest.mark.parametrize("mult", [None, 1])
def test_small_and_one_sided_sets(rank, n, sign, mult):
    dataset = Lengths(*(sign * (i + 1) for i in range(n)))
    seen = []
    for i in range(2):
        rank(i, 2)
        sampler = build(dataset, 2, mega_batch_mult=mult)
        share = list(sampler)
        assert len(share) == len(sampler) == -(-n // 4) * 2
        seen += share
    assert sorted(index for index in seen if index != NOTHING) == list(range(n))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [70, 72, 5, 1])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_gives_each_sample_once_and_spreads_the_rest(rank, world_size, samples, epoch):
    dataset = Lengths(*[*range(1, 41), *range(-32, 0)][:samples])
    micro_batch, accumulate = 2, 4
    shares = []
    for i in range(world_size):
        rank(i, world_size)
        sampler = build(dataset, micro_batch * accumulate, mega_batch_mult=1)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert len({len(share) for share in shares}) == 1
    given = [index for share in shares for index in share if index != NOTHING]
    assert sorted(given) == list(range(samples))
    steps = -(-samples // (micro_batch * accumulate * world_size))
    assert len(shares[0]) == steps * micro_batch * accumulate
    last = [share[-micro_batch * accumulate :] for share in shares]
    cut = [part[i : i + micro_batch] for part in last for i in range(0, len(part), micro_batch)]
    filled = [sum(index != NOTHING for index in part) for part in cut]
    assert max(filled) - min(filled) <= 1


def test_built_by_name_with_its_arguments():
    config = {"type": "GroupedSampler", "length_property": "modality_length", "start": 2}
    config |= {"per_device_batch_size": 4, "round_up": False, "dataset": MIXED, "seed": 3}
    assert list(DATA_SAMPLERS.build(config)) == list(build(MIXED, round_up=False))[2:]
