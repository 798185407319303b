"""Grouped sampling: what stock does, and beginning in the middle."""

from functools import cache
from itertools import product
from random import Random

import pytest
from mmengine.registry import DATA_SAMPLERS
from xtuner.dataset.samplers import LengthGroupedSampler

from dpa_xtuner.data import GroupedSampler, sampler
from dpa_xtuner.data.sampler import NOTHING, deal, spread


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


# Dealt by deal: micro_batch_size is given.


def dealt(dataset, world_size, rank, epoch=0, micro=2, counts=3, **more):
    """Of each rank, its micro-batches of an epoch."""
    shares = []
    for i in range(world_size):
        rank(i, world_size)
        sampler = build(
            dataset, micro * counts, mega_batch_mult=1, micro_batch_size=micro, most=2 * micro,
            **more,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        share = list(sampler)
        assert len(share) == len(sampler)
        cut = [share[k : k + 2 * micro] for k in range(0, len(share), 2 * micro)]
        shares.append([[index for index in part if index != NOTHING] for part in cut])
    return shares


@pytest.mark.parametrize("samples", [70, 72, 5, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("epoch", [0, 1])
def test_dealt_global_batches_hold_the_same_samples(rank, world_size, samples, epoch):
    dataset = Lengths(*[*range(1, 41), *range(-32, 0)][:samples])
    shares = dealt(dataset, world_size, rank, epoch)
    as_before = []
    for i in range(world_size):
        rank(i, world_size)
        sampler = build(dataset, 6, mega_batch_mult=1)
        sampler.set_epoch(epoch)
        as_before.append(list(sampler))
    for step in range(-(-samples // (6 * world_size))):
        ours = [i for share in shares for part in share[3 * step : 3 * step + 3] for i in part]
        theirs = [i for share in as_before for i in share[6 * step : 6 * step + 6] if i != NOTHING]
        assert sorted(ours) == sorted(theirs) and ours
    if samples >= 70 - 70 % (6 * world_size):
        whole = samples // (6 * world_size) * 3
        assert all(part for share in shares for part in share[:whole])


def test_a_dealt_epoch_begins_in_its_middle(rank):
    rank(1, 2)
    whole = list(build(MIXED, 6, mega_batch_mult=1, micro_batch_size=2, most=4))
    sampler = build(MIXED, 6, mega_batch_mult=1, micro_batch_size=2, most=4, start=8)
    assert list(sampler) == whole[8:]
    assert list(sampler) == whole


def test_long_samples_are_dealt_in_small_micro_batches():
    """By hand: 30 padded tokens in each micro-batch, and 60 on each rank."""
    lengths = [5, 30, 10, 15, 5, 15, 5, 10, 10, 5, 5, 5]
    given = deal(lengths, ranks=2, counts=2, most=6)
    parts = sorted(sorted(lengths[i] for i in part) for share in given for part in share)
    assert parts == [[5] * 6, [10, 10, 10], [15, 15], [30]]
    assert [len(share) for share in given] == [2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_the_fewest_padded_tokens_at_a_time(seed):
    """Against all ways to give each sample to one of three ranks."""
    random = Random(seed)
    lengths = [random.randint(1, 40) for _ in range(7)]
    given = [part for (part,) in deal(lengths, ranks=3, counts=1, most=5)]
    assert sorted(i for part in given for i in part) == list(range(7))
    best = 10**9
    for owners in product(range(3), repeat=7):
        parts = [[n for n, own in zip(lengths, owners, strict=True) if own == k] for k in range(3)]
        if all(0 < len(part) <= 5 for part in parts):
            best = min(best, max(len(part) * max(part) for part in parts))
    assert max(len(part) * max(lengths[i] for i in part) for part in given) == best


@pytest.mark.parametrize(("ranks", "counts", "size"), [(8, 4, 8), (8, 8, 4), (64, 4, 8)])
@pytest.mark.parametrize("images", [576, 0])
def test_ranks_have_as_many_tokens(ranks, counts, size, images):
    """Texts of 50 - 470 tokens, with pictures or without: under 5 % are lost at a step's end."""
    random = Random(0)
    lengths = [images + random.randint(50, 470) for _ in range(ranks * counts * size)]
    given = deal(lengths, ranks, counts, 4 * size)
    padded = [sum(len(p) * max(lengths[i] for i in p) for p in parts) for parts in given]
    assert 1 - sum(lengths) / (ranks * max(padded)) < 0.05
    order = sorted(lengths, reverse=True)
    one_by_one = [order[i::ranks] for i in range(ranks)]
    before = max(sum(size * s[k] for k in range(0, len(s), size)) for s in one_by_one)
    assert max(padded) < before


def test_one_micro_batch_of_many_ranks_is_as_level_as_can_be():
    """64 ranks with four samples each: 31 % would be lost where each has four."""
    random = Random(0)
    lengths = [random.randint(20, 80) for _ in range(256)]
    given = deal(lengths, 64, 1, 8)
    padded = [len(part) * max(lengths[i] for i in part) for (part,) in given]
    assert 1 - sum(lengths) / (64 * max(padded)) < 0.16


def test_things_change_places_until_the_sets_cost_the_same():
    """By hand: 9 + 4 + 1 and 5 + 4 + 1; then 4 and 1 change places, which is the best there is."""
    costs = [9, 5, 4, 4, 1, 1]
    for enough, expected in ((0.0, [11, 13]), (0.2, [10, 14])):
        sets = spread(costs, 2, enough)
        assert sorted(i for own in sets for i in own) == list(range(6))
        assert [len(own) for own in sets] == [3, 3]
        assert sorted(sum(costs[i] for i in own) for own in sets) == expected


@pytest.mark.parametrize("images", [576, 0])
@pytest.mark.parametrize("answers", [(20, 80), (60, 420)])
def test_four_samples_on_each_of_64_ranks(images, answers):
    random = Random(0)
    lengths = [images + random.randint(*answers) for _ in range(256)]
    at_end, each = (deal(lengths, 64, 4, 4, wait_each) for wait_each in (False, True))
    for given in (at_end, each):
        assert sorted(i for own in given for part in own for i in part) == list(range(256))
        assert all(len(part) == 1 for own in given for part in own)
    ends = max(sum(lengths[i] for (i,) in own) for own in at_end)
    assert 1 - sum(lengths) / (64 * ends) < 0.01
    # Who waits after each one: no dealing of single samples takes less than the sorted one.
    order = sorted(lengths, reverse=True)
    slowest = [max(lengths[i] for (i,) in column) for column in zip(*each, strict=True)]
    assert slowest == order[::64]


# Steps exchange samples: wait_each is given, and a rank has few of them.

STEPS = 50
"""Whole steps of 256 samples in ``INSTRUCTIONS``; 7 samples are left."""


def instructions():
    """Give tokens of answers (2 - 4, 15 - 59, 120 - 400) and of samples, a fifth without image."""
    random = Random(1)
    answers = [random.randint(*random.choice(((2, 4), (15, 59), (120, 400))))
               for _ in range(STEPS * 256 + 7)]  # fmt: skip
    texts = [n + random.randint(20, 70) for n in answers]
    return answers, Lengths(*(n + 576 if random.random() < 0.8 else -n for n in texts))


ANSWERS, INSTRUCTIONS = instructions()


@pytest.fixture
def exchanged(rank, monkeypatch):
    """All ranks' micro-batches, four a step. What all ranks compute is computed once."""

    def deal_out(world_size, wait_each=True):
        for function in (deal, spread):
            once = cache(function)
            monkeypatch.setattr(
                sampler, function.__name__, lambda first, *a, once=once: once(tuple(first), *a)
            )
        size = 64 // world_size
        return dealt(INSTRUCTIONS, world_size, rank, micro=size, counts=4, wait_each=wait_each)

    return deal_out


@pytest.mark.parametrize("world_size", [8, 16, 64])
def test_exchanged_samples_come_once_and_take_equally_long(exchanged, world_size):
    shares = exchanged(world_size)
    given = [i for share in shares for part in share for i in part]
    assert sorted(given) == list(range(len(INSTRUCTIONS)))
    padded = [
        [len(part) * max((abs(INSTRUCTIONS.modality_length[i]) for i in part), default=0)
         for part in share[: 4 * STEPS]]
        for share in shares
    ]  # fmt: skip
    useful = sum(map(abs, INSTRUCTIONS.modality_length))
    lost = 1 - useful / (world_size * sum(map(max, zip(*padded, strict=True))))
    if world_size >= 16:
        assert lost < 0.03
    else:  # these have enough samples: the steps are as they were
        assert steps(shares) == steps(exchanged(world_size, wait_each=False))


def steps(shares):
    """The samples of each whole step."""
    return [
        sorted(i for share in shares for part in share[k : k + 4] for i in part)
        for k in range(0, 4 * STEPS, 4)
    ]


def test_answers_of_any_length_count_the_same_after_an_exchange(exchanged):
    """Over an epoch of steps that each divide by their own supervised tokens.

    Steps of all lengths, as they come, are off by up to 1 %, for they differ in tokens, too.
    """
    found = steps(exchanged(64))
    tokens = [sum(ANSWERS[i] for i in step) for step in found]
    mean = sum(tokens) / len(tokens)
    for low, high in ((2, 4), (15, 59), (120, 260), (261, 400)):
        own = [[ANSWERS[i] for i in step if low <= ANSWERS[i] <= high] for step in found]
        weight = sum(sum(part) * mean / all_ for part, all_ in zip(own, tokens, strict=True))
        assert weight / sum(map(sum, own)) == pytest.approx(1, abs=0.02)
    images = [{INSTRUCTIONS.modality_length[i] > 0 for i in step} for step in found]
    assert sum(len(kinds) > 1 for kinds in images) <= 2  # the first, with the longest, and the last


def test_an_exchange_depends_on_seed_and_epoch_alone(rank):
    rank(3, 64)
    how = dict(mega_batch_mult=1, micro_batch_size=1, most=4, wait_each=True)
    sampler = build(INSTRUCTIONS, 4, **how)
    whole = list(sampler)
    assert list(build(INSTRUCTIONS, 4, **how)) == whole
    assert list(build(INSTRUCTIONS, 4, start=48, **how)) == whole[48:]
    sampler.set_epoch(1)
    assert list(sampler) != whole != list(build(INSTRUCTIONS, 4, **how | {"seed": 4}))
