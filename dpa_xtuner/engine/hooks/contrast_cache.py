"""Computes the contrast pass of all samples before training, once."""

import shutil
from pathlib import Path

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import barrier, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm

from dpa_xtuner.data import DPADataset, collate
from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder
from dpa_xtuner.layout import LLM
from dpa_xtuner.loss import supervised_mask
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.contrast_cache import ContrastCache, write_contrast_cache
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.precision import Precision

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
        precision: what the run computes in.
    """

    def __init__(self, folder: str, files: dict, precision: str):
        self.folder, self.files = Path(folder), dict(files)
        self.precision = Precision(precision)

    def before_train(self, runner) -> None:
        """Read the cache; compute it first if it does not exist.

        Raises:
            DPAError: the cache is stale, or not all nodes see it.
        """
        model = unwrap(runner.model)
        dataset: DPADataset = runner.train_dataloader.dataset
        plain = not hasattr(runner, "strategy")  # DeepSpeed's weights have that dtype already
        amp = self.precision.autocast(get_device(), enabled=plain)
        cache_key = {
            **self.files,
            "samples": len(dataset),
            **dataset.encoding,
            LLM: model.fingerprints[LLM],
            "dtype": f"{next(model.llm.parameters()).dtype}, autocast {plain}",
        }
        if not self.folder.exists():
            runner.logger.info(f"Computing what the LLM says without pictures: {self.folder}")
            self._compute(model, dataset, amp, cache_key)
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
        shards = self.folder.with_name(f".{self.folder.name}.parts.partial")
        if is_main_process():
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)
        barrier()
        batches = _full_batches(dataset.text_length)
        found: dict[int, np.ndarray] = {}
        for start in tqdm(
            range(0, len(batches), world), desc="contrast", disable=None if rank == 0 else True
        ):
            # All ranks take the same number of batches, as ZeRO-3 needs.
            mine = batches[min(start + rank, len(batches) - 1)]
            log_probs, counts = _log_probs(model, [dataset.text(i) for i in mine], amp)  # (M, 2)
            if start + rank < len(batches):
                by_sample = np.split(log_probs, np.cumsum(counts)[:-1])
                found |= dict(zip(mine, by_sample, strict=True))
        np.savez(
            shards / f"{rank}.npz",
            indices=np.array(list(found), dtype=np.int64),
            counts=np.array([len(rows) for rows in found.values()], dtype=np.int64),
            log_probs=np.concatenate([np.empty((0, 2), np.float32), *found.values()]),
        )
        barrier()
        if is_main_process():
            self._join(shards, world, len(dataset), cache_key)
        barrier()

    def _join(self, shards: Path, world: int, samples: int, cache_key: dict) -> None:
        """Put the shards of all ranks into the order of the data set, and write the cache."""
        counts = np.zeros(samples, dtype=np.int64)
        loaded = [np.load(shards / f"{rank}.npz") for rank in range(world)]
        for shard in loaded:
            counts[shard["indices"]] = shard["counts"]
        offsets = np.concatenate([[0], np.cumsum(counts)])  # (samples + 1,)
        log_probs = np.empty((offsets[-1], 2), np.float32)
        for shard in loaded:
            sizes = shard["counts"]
            # Where each token stands within its own sample: 0, 1, ..., 0, 1, ...
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            log_probs[np.repeat(offsets[shard["indices"]], sizes) + within] = shard["log_probs"]
        with whole_folder(self.folder) as folder:
            write_contrast_cache(folder, counts, log_probs, cache_key)
        shutil.rmtree(shards)


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


def _log_probs(
    model: DPALLaVAModel, samples: list[dict], amp: torch.autocast
) -> tuple[np.ndarray, list[int]]:
    """Compute (M, 2) cross entropies and logits, and the number of tokens of each sample."""
    data = model.data_preprocessor(collate(samples), False)["data"]
    with amp:
        log_probs = contrast_log_probs(model.llm, data)
    counts = supervised_mask(data["labels"]).sum(1).tolist()
    return torch.stack(log_probs, dim=-1).float().cpu().numpy(), counts  # (M, 2)
