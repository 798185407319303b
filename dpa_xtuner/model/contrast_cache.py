"""What a frozen LLM says without the pictures, computed once and read from disk afterwards."""

import json
from pathlib import Path

import numpy as np
import torch

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenLogProbs

FACTS = "facts.json"
"""File in a cache's folder that says what it was computed from."""


class ContrastCache:
    """Log-probabilities of the contrast pass for every sample of a data set, memory-mapped.

    The folder holds ``scores.npy`` ((M, 2) float32, cross entropy and logit of all supervised
    tokens, sample by sample), ``offsets.npy`` (where each sample begins in them, and the end)
    and :data:`FACTS`.

    Args:
        folder: written by :func:`write`.
        facts: what this run would compute it from.

    Raises:
        DPAError: the folder was written by something else, or for other facts.
    """

    def __init__(self, folder: Path, facts: dict):
        try:
            theirs = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            self.offsets = np.load(folder / "offsets.npy")
            self.scores = np.load(folder / "scores.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DPAError(
                f"contrast_cache={str(folder)!r} can't be read ({error}). Name a folder that does "
                f"not exist yet, or remove this one: it is then computed."
            ) from None
        stale = [
            f"  {name}: cached for {theirs.get(name)}, this run has {facts.get(name)}"
            for name in sorted(theirs.keys() | facts.keys())
            if theirs.get(name) != facts.get(name)
        ]
        if stale:
            listed = "\n".join(stale)
            raise DPAError(
                f"contrast_cache={str(folder)!r} was computed from something else:\n{listed}\n"
                f"Remove the folder to have it computed again, or name another one."
            )

    def read(self, indices: list[int], device: torch.device) -> TokenLogProbs:
        """Read those of the supervised tokens of some samples, one sample after the other.

        Args:
            indices: the samples' indices in the data set.
            device: where to.
        """
        samples = [self.scores[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        rows = np.concatenate([np.empty((0, 2), np.float32), *samples])  # (N, 2)
        return TokenLogProbs(*torch.from_numpy(rows).to(device, non_blocking=True).unbind(-1))


def write(folder: Path, counts: np.ndarray, scores: np.ndarray, facts: dict) -> None:
    """Write the files of a cache into an existing folder.

    Args:
        folder: where to.
        counts: (S,) int64, supervised tokens per sample.
        scores: (M, 2) float32, sample by sample.
        facts: what they were computed from; what JSON can hold.
    """
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    np.save(folder / "scores.npy", scores)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
