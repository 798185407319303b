"""The contrast pass of a frozen LLM on disk: computed once, then read."""

import json
from pathlib import Path

import numpy as np
import torch

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenLogProbs

CACHE_KEY_FILE = "facts.json"
"""File in a cache's folder that holds its cache key."""


class ContrastCache:
    """Log-probabilities of the contrast pass for every sample of a data set, memory-mapped.

    The folder holds ``scores.npy`` ((M, 2) float32, cross entropy and logit of all supervised
    tokens, sample by sample), ``offsets.npy`` (where each sample begins in them, and the end)
    and :data:`CACHE_KEY_FILE`.

    Args:
        folder: written by :func:`write_contrast_cache`.
        cache_key: what this run would compute the cache from.

    Raises:
        DPAError: the folder holds no such cache, or has another cache key.
    """

    def __init__(self, folder: Path, cache_key: dict):
        try:
            cached = json.loads((folder / CACHE_KEY_FILE).read_text(encoding="utf-8"))
            self.offsets = np.load(folder / "offsets.npy")
            self.log_probs = np.load(folder / "scores.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DPAError(
                f"contrast_cache={str(folder)!r} can't be read ({error}). Name a folder that does "
                f"not exist yet, or remove this one: the cache is then computed."
            ) from None
        stale = [
            f"  {name}: cached for {cached.get(name)}, this run has {cache_key.get(name)}"
            for name in sorted(cached.keys() | cache_key.keys())
            if cached.get(name) != cache_key.get(name)
        ]
        if stale:
            listed = "\n".join(stale)
            raise DPAError(
                f"contrast_cache={str(folder)!r} was computed from something else:\n{listed}\n"
                f"Remove the folder to compute it again, or name another one."
            )

    def read(self, indices: list[int], device: torch.device) -> TokenLogProbs:
        """Read the log-probabilities of the supervised tokens of some samples, in order.

        Args:
            indices: the samples' indices in the data set.
            device: device of the result.
        """
        samples = [self.log_probs[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        rows = np.concatenate([np.empty((0, 2), np.float32), *samples])  # (N, 2)
        return TokenLogProbs(*torch.from_numpy(rows).to(device, non_blocking=True).unbind(-1))


def write_contrast_cache(folder: Path, samples: list[np.ndarray], cache_key: dict) -> None:
    """Write the files of a cache into an existing folder.

    Args:
        folder: the target.
        samples: of each sample in order, the cross entropy and logit of its supervised tokens,
            (tokens, 2) float32.
        cache_key: what they were computed from; must fit into JSON.
    """
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, samples)]))
    np.save(folder / "scores.npy", np.concatenate(samples))
    text = json.dumps(cache_key, indent=2) + "\n"
    (folder / CACHE_KEY_FILE).write_text(text, encoding="utf-8")
