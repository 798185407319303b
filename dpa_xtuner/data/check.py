"""Check a data set before training: every record, every image."""

import os
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from dpa_xtuner.data.dataset import DPADataset
from dpa_xtuner.data.problems import Problem, list_problems

_CHUNK = 32  # samples handed to a thread at a time


@dataclass(frozen=True)
class DataReport:
    """What a check found; as a string, a short table.

    Attributes:
        samples: usable samples in the data set, each counted once.
        checked: those whose images were opened.
        record_problems: records that were left out when the data was tokenised.
        image_problems: checked samples with a missing or broken image.
    """

    samples: int
    checked: int
    record_problems: list[Problem]
    image_problems: list[Problem]

    @property
    def problems(self) -> list[Problem]:
        """All problems; a truncated sample is not one."""
        return self.record_problems + self.image_problems

    @property
    def ok(self) -> bool:
        """Whether there is no problem at all."""
        return not self.problems

    def __str__(self) -> str:
        """Return the table."""
        return "\n".join(
            [
                f"{self.checked:>8}  samples of {self.samples} whose images were opened",
                f"{len(self.problems):>8}  problems" + (":" if self.problems else ""),
                *([list_problems(self.problems)] if self.problems else []),
            ]
        )


def check_dataset(dataset: DPADataset, sample: int | None = None, seed: int = 0) -> DataReport:
    """Open a data set's images, and collect all problems of records and images.

    Args:
        dataset: the data set. Build it with ``skip_limit=1`` so that it accepts any data.
        sample: number of samples to check, drawn at random; None checks all.
        seed: seed of that draw.
    """
    samples = chosen = np.array(dataset.distinct)
    if sample is not None and sample < len(samples):
        chosen = np.sort(np.random.default_rng(seed).choice(samples, sample, replace=False))
    with ThreadPool(os.cpu_count()) as pool:
        found = pool.imap(dataset.check_images, chosen.tolist(), chunksize=_CHUNK)
        progress = tqdm(found, "Opening images", len(chosen), unit=" samples", delay=2)
        image_problems = [problem for problem in progress if problem]
    return DataReport(len(samples), len(chosen), dataset.problems, image_problems)
