"""Gives a resumed run the dropout masks of one that was never interrupted."""

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds torch from (seed, iteration, rank) before each iteration.

    Checkpoints hold no random state, so dropout would differ after resuming. The priority is low,
    so that nothing draws random numbers between this hook and the model.
    """

    priority = "LOW"

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed all devices."""
        draw = batch_idx * get_world_size() + get_rank()
        torch.manual_seed((runner.seed * 1_000_003 + draw) % 2**63)
