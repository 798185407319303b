"""A resumed loop sees the samples that an uninterrupted one would have seen."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import loops
from torch.utils.data import DataLoader, Dataset

from dpa_xtuner.data.sampler import NOTHING, GroupedSampler
from dpa_xtuner.engine.loop import DPATrainLoop

SAMPLES, BATCH, MAX_ITERS = 22, 3, 20  # 22 samples: 8 batches an epoch, the last of one sample


class Numbers(Dataset):
    """Samples of different lengths and modalities, which count how often they are read."""

    def __init__(self):
        self.reads = 0
        self.modality_length = [(7 * i) % 11 + 1 if i % 3 else -(i + 1) for i in range(SAMPLES)]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.reads += 1
        return index


def run(done: int, workers: int = 0) -> tuple[list[list[int]], Numbers]:
    """The batches that a loop with `done` iterations behind it trains on."""
    dataset, seen = Numbers(), []
    sampler = GroupedSampler(
        dataset, per_device_batch_size=2 * BATCH, length_property="modality_length",
        mega_batch_mult=1, seed=3,
    )  # fmt: skip
    loader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)

    class Model(torch.nn.Module):
        def train_step(self, batch, optim_wrapper):
            seen.append(batch.tolist())

    def call_hook(name, **kwargs):
        if name == "before_train_epoch":  # as DistSamplerSeedHook does
            sampler.set_epoch(loop.epoch)

    runner = SimpleNamespace(
        call_hook=call_hook, model=Model(), optim_wrapper=None, val_loop=None,
        visualizer=SimpleNamespace(),
    )  # fmt: skip
    loop = DPATrainLoop(runner, loader, max_iters=MAX_ITERS)
    loop._iter = done
    loop.run()
    return seen, dataset


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """MMEngine sleeps between epochs."""
    monkeypatch.setattr(loops, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def whole():
    return run(0)[0]


def test_epochs_are_whole_and_differ(whole):
    first, second = list(chain(*whole[:8])), list(chain(*whole[8:16]))
    for epoch in (first, second):  # each sample once; the last step is not full
        assert sorted(i for i in epoch if i != NOTHING) == list(range(SAMPLES))
    assert first != second


@pytest.mark.parametrize("done", [2, 7, 8, 9, 16, 19, 20])
def test_resumed_it_sees_the_rest(done, whole):
    assert run(done)[0] == whole[done:]


def test_resumed_with_workers_it_sees_the_rest(whole):
    assert run(9, workers=1)[0] == whole[9:]


def test_what_was_trained_on_is_not_loaded_again():
    seen, dataset = run(15)
    assert dataset.reads == sum(map(len, seen))
