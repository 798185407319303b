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
from dpa_xtuner.model.contrast_cache import ContrastCache, write
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.precision import Precision

_TOKENS = 8192
"""Text tokens of a batch, padding left out. No gradient is kept, so it can be larger than in
training."""


@HOOKS.register_module()
class ContrastCacheHook(Hook):
    """Gives ``align`` its cache of p_wo.

    The frozen LLM says the same without the pictures in every epoch and every run, so all
    samples pass through it before the first step, without their images, in full batches. A
    folder that is there already is read, if it is of the same data, template, tokenizer and
    proxy.

    Args:
        folder: the cache's.
        files: SHA-256 of the data files and of the proxy's files, for the cache's record.
        precision: what the run computes in.
    """

    def __init__(self, folder: str, files: dict, precision: str):
        self.folder, self.files = Path(folder), dict(files)
        self.precision = Precision(precision)

    def before_train(self, runner) -> None:
        """Read the cache, or compute it first.

        Raises:
            DPAError: it is stale, or not all nodes see it.
        """
        model = unwrap(runner.model)
        dataset: DPADataset = runner.train_dataloader.dataset
        plain = not hasattr(runner, "strategy")  # DeepSpeed's weights are of that type themselves
        amp = self.precision.autocast(get_device(), enabled=plain)
        facts = {
            **self.files,
            "samples": len(dataset),
            **dataset.encoding,
            LLM: model.fingerprints[LLM],
            "dtype": f"{next(model.llm.parameters()).dtype}, autocast {plain}",
        }
        if not self.folder.exists():
            runner.logger.info(f"Computing what the LLM says without pictures: {self.folder}")
            self._compute(model, dataset, amp, facts)
        barrier()
        if not self.folder.exists():
            raise DPAError(
                f"contrast_cache={str(self.folder)!r} was written by rank 0 and is not seen here: "
                f"name a folder that all nodes share."
            )
        model.contrast_cache = ContrastCache(self.folder, facts)

    def _compute(
        self, model: DPALLaVAModel, dataset: DPADataset, amp: torch.autocast, facts: dict
    ) -> None:
        rank, world = get_dist_info()
        parts = self.folder.with_name(f".{self.folder.name}.parts.partial")
        if is_main_process():
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
        barrier()
        batches = _batches(dataset.text_length)
        found: dict[int, np.ndarray] = {}
        for start in tqdm(
            range(0, len(batches), world), desc="contrast", disable=None if rank == 0 else True
        ):
            # All ranks take the same number of batches, as ZeRO-3 needs.
            mine = batches[min(start + rank, len(batches) - 1)]
            scores, counts = _scores(model, [dataset.text(i) for i in mine], amp)
            if start + rank < len(batches):
                found |= dict(zip(mine, np.split(scores, np.cumsum(counts)[:-1]), strict=True))
        np.savez(
            parts / f"{rank}.npz",
            indices=np.array(list(found), dtype=np.int64),
            counts=np.array([len(rows) for rows in found.values()], dtype=np.int64),
            scores=np.concatenate([np.empty((0, 2), np.float32), *found.values()]),
        )
        barrier()
        if is_main_process():
            self._join(parts, world, len(dataset), facts)
        barrier()

    def _join(self, parts: Path, world: int, samples: int, facts: dict) -> None:
        counts = np.zeros(samples, dtype=np.int64)
        loaded = [np.load(parts / f"{rank}.npz") for rank in range(world)]
        for part in loaded:
            counts[part["indices"]] = part["counts"]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        scores = np.empty((offsets[-1], 2), np.float32)
        for part in loaded:
            sizes = part["counts"]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            scores[np.repeat(offsets[part["indices"]], sizes) + within] = part["scores"]
        with whole_folder(self.folder) as folder:
            write(folder, counts, scores, facts)
        shutil.rmtree(parts)


def _batches(lengths: list[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > room:
            batches.append([])
            room = _TOKENS
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _scores(
    model: DPALLaVAModel, samples: list[dict], amp: torch.autocast
) -> tuple[np.ndarray, list[int]]:
    data = model.data_preprocessor(collate(samples), False)["data"]
    with amp:
        log_probs = contrast_log_probs(model.llm, data)
    counts = supervised_mask(data["labels"]).sum(1).tolist()
    return torch.stack(log_probs, dim=-1).float().cpu().numpy(), counts
