"""Skipped samples are told, and too many of them stop the run."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub

from dpa_xtuner.engine.hooks import SkippedSamplesHook
from dpa_xtuner.errors import DPAError


@pytest.fixture
def runner(request):
    hub = MessageHub(request.node.name)

    def make(samples: int) -> SimpleNamespace:
        return SimpleNamespace(
            logger=Mock(),
            train_dataloader=SimpleNamespace(dataset=range(samples)),
            message_hub=hub,
            max_iters=10,
            iter=0,
            cfg=Config(dict(default_hooks=dict(checkpoint=dict(interval=5)))),
        )

    return make


def batch(*ids: str) -> dict:
    return {"data": {"skipped": [(i, "missing image") for i in ids]}}


def train(hook, run, batches) -> None:
    hook.before_train(run)
    for found in batches:
        hook.after_train_iter(run, run.iter, found)
        run.iter += 1


def test_each_is_warned_of_with_its_reason(runner):
    run = runner(300)
    train(SkippedSamplesHook(limit=0.01), run, [batch("a", "b"), *[batch()] * 4])
    warned = [call.args[0] for call in run.logger.warning.call_args_list]
    assert warned == ["Skipped sample a: missing image", "Skipped sample b: missing image"]


def test_more_than_the_limit_stop_the_run_with_their_list(runner):
    batches = [batch("a", "b"), batch("c"), *[batch()] * 8]
    with pytest.raises(DPAError, match=r"3 of 200 .*skip_limit=0.01[^$]*a: missing[^$]*c: missing"):
        train(SkippedSamplesHook(limit=0.01), runner(200), batches)


def test_a_sample_that_is_skipped_in_every_epoch_counts_once(runner):
    hook = SkippedSamplesHook(limit=0.01)
    train(hook, runner(100), [batch("a")] * 10)
    assert len(hook.skipped) == 1


def test_a_resumed_run_goes_on_counting(runner):
    train(SkippedSamplesHook(limit=0.01), runner(100), [batch("a"), *[batch()] * 4])
    resumed = runner(100)  # the same message hub, as a checkpoint restores it
    resumed.iter = 5
    with pytest.raises(DPAError, match="2 of 100"):
        train(SkippedSamplesHook(limit=0.01), resumed, [batch("b"), *[batch()] * 4])
