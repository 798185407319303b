"""Skipped samples are told, and too many of them stop the run."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from dpa_xtuner import DPAError
from dpa_xtuner.hooks import SkippedSamplesHook


def runner(samples: int) -> SimpleNamespace:
    loader = SimpleNamespace(dataset=range(samples))
    return SimpleNamespace(logger=Mock(), train_dataloader=loader)


def batch(*ids: str) -> dict:
    return {"data": {"skipped": [(i, "missing image") for i in ids]}}


def test_each_is_warned_of_with_its_reason():
    hook, run = SkippedSamplesHook(limit=0.01), runner(300)
    hook.after_train_iter(run, 0, batch("a", "b"))
    hook.after_train_iter(run, 1, batch())
    warned = [call.args[0] for call in run.logger.warning.call_args_list]
    assert warned == ["Skipped sample a: missing image", "Skipped sample b: missing image"]


def test_more_than_the_limit_stop_the_run_with_their_list():
    hook, run = SkippedSamplesHook(limit=0.01), runner(200)
    hook.after_train_iter(run, 0, batch("a", "b"))
    with pytest.raises(DPAError, match=r"3 samples .* more than 1%[^$]*a: missing[^$]*c: missing"):
        hook.after_train_iter(run, 1, batch("c"))


def test_a_sample_that_is_skipped_in_every_epoch_counts_once():
    hook, run = SkippedSamplesHook(limit=0.01), runner(100)
    for epoch in range(5):
        hook.after_train_iter(run, epoch, batch("a"))
    assert len(hook.skipped) == 1
