"""What the study with drawings runs: styles, methods, seeds and budgets."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from mmengine.config import Config

from dpa_xtuner.demo import scenes
from dpa_xtuner.layout import PROXY, STAGE_NAMES
from studies.openmoji.styles import STYLES
from studies.plan import METHODS

HERE = Path(__file__).parent
SEEDS = (20, 21, 22)
ADDED = {
    "plain": (("vanilla", "pmo", "dpa"), (23, 24, 25)),
    "ornate": (("vanilla", "pmo"), (23, 24, 25, 26, 27)),
}
"""Methods and seeds that were added for a style, with the small budget."""
VERSION = 1
"""Raise it when the captions or the measures of finished runs change."""


@dataclass(frozen=True)
class Run:
    """One run: style of the captions, method and seed (of data, first weights and order)."""

    style: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.style}-{self.method}-{self.seed}"


@dataclass(frozen=True)
class Budget:
    """How much a run trains.

    Attributes:
        steps: of proxy, align and tune; the last two see their data once.
        batch: samples in a step of each.
        held_out: captions that are measured on.
        asked: held-out questions.
        others: further settings of the config.
    """

    steps: tuple[int, int, int]
    batch: tuple[int, int, int]
    held_out: int
    asked: int
    others: dict[str, object] = field(default_factory=dict)

    def recipe(self, seed: int) -> scenes.Recipe:
        """Return the sizes of a seed's data, as the demo makes it."""
        _, captions, questions = (n * each for n, each in zip(self.steps, self.batch, strict=True))
        # A run holds out a tenth of its captions at most.
        captions = max(captions + self.held_out, 10 * self.held_out)
        return scenes.Recipe(captions, questions, self.asked, seed=seed)

    def settings(self, with_proxy: bool) -> dict[str, object]:
        """Return the settings of the config that differ from the demo's."""
        found = self.others | {"captions.held_out": self.held_out}
        for stage, steps, batch in zip(STAGE_NAMES, self.steps, self.batch, strict=True):
            if with_proxy or stage != PROXY:
                found[f"{stage}.max_steps"] = steps
                found |= {f"{stage}.{key}": batch for key in ("batch_size", "global_batch_size")}
        return found

    @property
    def protocol(self) -> str:
        """Hash of sizes, settings and all that the config says of stages and optimizer."""
        config = Config.fromfile(HERE / "config.py", import_custom_modules=False).to_dict()
        kept = ("proxy", "align", "tune", "optim_wrapper", "encoder", "projector", "tokenizer",
                "prompt_template", "precision")  # fmt: skip
        content = [asdict(self), asdict(self.recipe(0)), VERSION, *(config[key] for key in kept)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


BUDGETS = {
    "large": Budget(
        (250, 2000, 500), (32, 8, 16), 256, 240,
        {"align.lr": 2e-3, "align.warmup_ratio": 0.15, "train_dataloader.num_workers": 4,
         "model.llm.attn_implementation": "sdpa"},
    ),
    "small": Budget(
        (60, 300, 60), (8, 4, 4), 64, 240, {"align.lr": 2e-3, "align.warmup_ratio": 0.15}
    ),
    "smallest": Budget((2, 2, 2), (4, 4, 4), 4, 8),
}  # fmt: skip
"""By name: for a GPU, for two CPU cores, and for a test."""


def planned(budget: str) -> list[Run]:
    """List the runs of a budget; others are tried, and not reported."""
    runs = [Run(*each) for each in product(STYLES, METHODS, SEEDS)]
    if budget == "small":
        for style, (methods, seeds) in ADDED.items():
            runs += [Run(style, *each) for each in product(methods, seeds)]
    return runs


def load(folder: Path, protocol: str) -> dict[Run, dict]:
    """Read the finished runs of a protocol from a folder of results."""
    files = [json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("openmoji-*.json")]
    return {Run(**line["run"]): line for line in files if line["protocol"] == protocol}
