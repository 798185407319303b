"""Computes the contrast pass of all samples before training, once."""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, collect_results, get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm

from dpa_xtuner.data import DPADataset, collate
from dpa_xtuner.engine.hooks.unwrap import autocast, unwrap
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder
from dpa_xtuner.layout import LLM
from dpa_xtuner.loss import supervised_mask
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.contrast_cache import ContrastCache, write_contrast_cache
from dpa_xtuner.model.dpa_llava import DPALLaVAModel

_TOKENS = 8192
"""Text tokens of a batch, padding left out. No gradient is kept, so it can be larger than in
training."""


@HOOKS.register_module()
class ContrastCacheHook(Hook):
    """Gives ``align`` its cache of p_wo.

    Without the pictures, the frozen LLM gives the same log-probabilities in every epoch and every
    run. So all samples pass through it once before the first step, in full batches. An existing
    folder is read if its data, template, tokenizer and proxy are those of this run.

    Args:
        folder: folder of the cache.
        files: SHA-256 of the data files and of the proxy's files, for the cache key.
    """

    def __init__(self, folder: str, files: dict):
        self.folder, self.files = Path(folder), dict(files)

    def before_train(self, runner) -> None:
        """Read the cache; compute it first if it does not exist.

        Raises:
            DPAError: the cache is stale, or not all nodes see it.
        """
        model = unwrap(runner.model)
        dataset: DPADataset = runner.train_dataloader.dataset
        plain = not hasattr(runner, "strategy")
        cache_key = {
            **self.files,
            "samples": len(dataset),
            **dataset.cache_key,
            LLM: model.fingerprints[LLM],
            "dtype": f"{next(model.llm.parameters()).dtype}, autocast {plain}",
        }
        if not self.folder.exists():
            runner.logger.info(f"Computing what the LLM says without pictures: {self.folder}")
            self._compute(model, dataset, autocast(runner), cache_key)
        barrier()
        if not self.folder.exists():
            raise DPAError(
                f"contrast_cache={str(self.folder)!r} was written by rank 0, but this node does "
                f"not see it: name a folder that all nodes share."
            )
        model.contrast_cache = ContrastCache(self.folder, cache_key)

    def _compute(
        self, model: DPALLaVAModel, dataset: DPADataset, amp: torch.autocast, cache_key: dict
    ) -> None:
        """Compute the cache, each rank its share of the batches, and write it on rank 0."""
        rank, world = get_dist_info()
        batches = _full_batches(dataset.text_length)
        found = []
        for start in tqdm(
            range(0, len(batches), world), desc="contrast", disable=None if rank == 0 else True
        ):
            # All ranks take the same number of batches, as ZeRO-3 needs.
            mine = batches[min(start + rank, len(batches) - 1)]
            found.append(_log_probs(model, [dataset.text(i) for i in mine], amp))
        parts = self.folder.with_name(f".{self.folder.name}.parts.partial")
        # On rank 0: in the order of the batches, without those at the end that were taken twice.
        collected = collect_results(found, len(batches), tmpdir=str(parts))
        if collected is not None:
            by_index = dict(zip(chain(*batches), chain(*collected), strict=True))
            with whole_folder(self.folder) as folder:
                write_contrast_cache(folder, [by_index[i] for i in range(len(dataset))], cache_key)
        barrier()


def _full_batches(lengths: list[int]) -> list[list[int]]:
    """Fill batches up to :data:`_TOKENS`, the longest samples first, for little padding."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > room:
            batches.append([])
            room = _TOKENS
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _log_probs(model: DPALLaVAModel, samples: list[dict], amp: torch.autocast) -> list[np.ndarray]:
    """Compute the cross entropies and logits of each sample's tokens, (tokens, 2) float32."""
    data = model.data_preprocessor(collate(samples), False)["data"]
    with amp:
        log_probs = contrast_log_probs(model.llm, data)
    counts = supervised_mask(data["labels"]).sum(1).tolist()
    rows = torch.stack(log_probs, dim=-1).float().cpu()  # (tokens of all samples, 2)
    return [each.numpy() for each in rows.split(counts)]
