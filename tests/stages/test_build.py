"""The schedule of a stage, worked by hand."""

import pytest

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.build import Schedule, schedule
from dpa_xtuner.stages.settings import StageSettings


def settings(**changes) -> StageSettings:
    usual = dict(
        lr=1e-3, batch_size=8, global_batch_size=256, max_epochs=1, max_length=64,
        pad_image_to_square=True, warmup_ratio=0.03, save_steps=200,
        normalize="micro_batch",
    )  # fmt: skip
    return StageSettings(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "samples", "world", "expected"),
    [
        # 558,128 / 256 = 2180.2 -> 2181 steps of 4 on 8 GPUs; 3 % are 65.43 -> 66 steps.
        ({}, 558_128, 8, Schedule(4, 2181, 66)),
        # The same steps on one GPU, 32 micro-batches each.
        ({}, 558_128, 1, Schedule(32, 2181, 66)),
        # 100 steps: 3 of warm-up.
        ({}, 25_600, 32, Schedule(1, 100, 3)),
        # Rounded up: 1.5 to 2, and 1.47 to 2.
        ({"max_steps": 50}, 25_600, 16, Schedule(2, 50, 2)),
        ({"max_steps": 49}, 25_600, 16, Schedule(2, 49, 2)),
        ({"warmup_ratio": 0.0}, 25_600, 32, Schedule(1, 100, 0)),
        # Each epoch is rounded up to whole steps: 3 x 2.
        ({"max_epochs": 3}, 257, 32, Schedule(1, 6, 1)),
        # One step is left after the warm-up, whose own first step has a rate of 0.
        ({}, 256, 32, Schedule(1, 1, 0)),
        ({"warmup_ratio": 0.9}, 512, 32, Schedule(1, 2, 1)),
        # max_steps ends a stage early and never prolongs it.
        ({"max_steps": 1000}, 25_600, 32, Schedule(1, 100, 3)),
    ],
)
def test_steps(changes, samples, world, expected):
    assert schedule(settings(**changes), samples, world, "align") == expected


def test_a_global_batch_that_cannot_be_cut_is_refused():
    message = (
        r"align\.global_batch_size=256 is not a multiple of align\.batch_size=8 x 3 processes.*"
        r"divides 85\.3333"
    )
    with pytest.raises(DPAError, match=message):
        schedule(settings(), 1000, 3, "align")
