"""A resumed run draws the same dropout masks as one that was never stopped."""

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed torch from (seed, iteration, rank) before each iteration.

    Checkpoints hold no random state, so after resuming, dropout would differ. The
    priority is low: nothing that runs before the model may draw in between.
    """

    priority = "LOW"

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed all devices."""
        place = batch_idx * get_world_size() + get_rank()
        torch.manual_seed((runner.seed * 1_000_003 + place) % 2**63)
