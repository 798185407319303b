"""What the studies run: levels, methods, variants, shares and seeds."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

HERE = Path(__file__).parent
WORLD = 6
"""Version of world.py: raise it when scenes, texts, pictures, LLM or encoder change."""

SEEDS = {
    "planned": (30, 31, 32, 33, 34),
    "added": (35, 36, 37, 38, 39),
    "replication": (50, 51, 52, 53, 54, 55, 56, 57, 58, 59),
    "gentle": (60, 61, 62, 63, 64, 65, 66, 67, 68, 69),
}
"""Reported seeds: the first ones, more of levels 0 and 6 alone, those of the replication, and those
of the second test of a gentle proxy with small batches."""

METHODS = ("vanilla", "pmo", "cmo", "dpa", "cal")

_SMALL: dict[str, object] = {"align.batch_size": 8, "align.global_batch_size": 8}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "cmo_in_align": ("dpa", {"tune.loss.type": "uniform"}),
    "cmo_in_tune": ("dpa", {"align.loss.type": "uniform"}),
    "unexplained": ("dpa", {"align.loss.type": "unexplained", "tune.loss.type": "unexplained"}),
    "log_ratio": ("dpa", {"align.loss.type": "log_ratio", "tune.loss.type": "log_ratio"}),
    "d_min_0.25": ("dpa", {"align.loss.d_min": 0.25, "tune.loss.d_min": 0.25}),
    "window_1": ("dpa", {"align.loss.window": 1, "tune.loss.window": 1}),
    "from_proxy": ("pmo", {"tune.start_from": "proxy"}),
    "lora": ("pmo", {"tune.train_llm": "lora", "tune.lr": 4e-3}),
    "lora_vanilla": ("vanilla", {"tune.train_llm": "lora", "tune.lr": 4e-3}),
    "forgetful_proxy": ("pmo", {"proxy.lr": 2e-3}),
    "gentle_proxy": ("pmo", {"proxy.lr": 2e-4}),
    "long": ("pmo", {"align.max_epochs": 3}),
    "long_vanilla": ("vanilla", {"align.max_epochs": 3}),
    "small_batches": ("pmo", _SMALL),
    "small_batches_vanilla": ("vanilla", _SMALL),
    "gentle_small_batches": ("pmo", {"proxy.lr": 2e-4, **_SMALL}),
    "gentle_small_batches_dpa": ("dpa", {"proxy.lr": 2e-4, **_SMALL}),
    "vanilla_first": ("vanilla", {}),
    "proxy_first": ("pmo", {}),
    "long_proxy_first": ("pmo", {}),
}
"""Variants by name: the method that they change, and its settings. Results files hold the name
alone: never change a variant's settings."""

THEN: dict[str, dict[str, object]] = {
    "vanilla_first": {"captions.share": 0.25},
    "proxy_first": {"captions.share": 0.25},
    "long_proxy_first": {"align.max_epochs": 2},
}
"""Variants whose `align` is followed by a second one, with the original LLM (vanilla) and the
projector of the first: the second one's settings."""

BASE = {
    "lora": "lora_vanilla",
    "long": "long_vanilla",
    "small_batches": "small_batches_vanilla",
    "gentle_small_batches": "small_batches_vanilla",
    "gentle_small_batches_dpa": "small_batches_vanilla",
    "proxy_first": "vanilla_first",
    "long_proxy_first": "long_vanilla",
}
"""What a variant is compared with, where that is not vanilla."""


@dataclass(frozen=True)
class Cell:
    """One run of the pipeline.

    Attributes:
        level: style words in each of a caption's three gaps.
        method: one of :data:`METHODS`.
        seed: of the LLM, the encoder, captions, pictures, questions, first weights and order.
        share: fraction of the captions.
        variant: one of :data:`VARIANTS`, or empty.
    """

    level: int
    method: str
    seed: int
    share: float = 1.0
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"level{self.level}-{self.variant or self.method}-share{self.share:g}-{self.seed}"

    @property
    def proxy(self) -> str:
        """Name of the proxy that it shares with others; empty if it has no stage `proxy`."""
        if self.method not in ("pmo", "dpa"):
            return ""
        own = any(key.startswith("proxy.") for key in self.settings)
        kind = f"-{self.variant}" if own else ""
        return f"proxy-level{self.level}{kind}-share{self.share:g}-{self.seed}"

    @property
    def settings(self) -> dict[str, object]:
        """What its variant sets."""
        return VARIANTS[self.variant][1] if self.variant else {}


def read_runs(folder: Path, protocol: str) -> dict[Cell, dict[str, Any]]:
    """Read a protocol's runs from a folder of results, each with the name of its ``file``.

    Of lines with the same cell, the first counts, in the order of the files' names.
    """
    runs: dict[Cell, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if line["protocol"] == protocol:
                runs.setdefault(Cell(**line["cell"]), line | {"file": file.name})
    return runs


_SMALL_VANILLA, _GENTLE, _GENTLE_DPA = (
    {level: Cell(level, method, 0, variant=name) for level in (0, 2, 6)}
    for method, name in (
        ("vanilla", "small_batches_vanilla"),
        ("pmo", "gentle_small_batches"),
        ("dpa", "gentle_small_batches_dpa"),
    )
)
FINDINGS: dict[str, dict[str, tuple[Cell, Cell]]] = {
    "replication": {
        "R1": (Cell(6, "pmo", 0), Cell(6, "vanilla", 0)),
        "R2": (Cell(6, "pmo", 0), Cell(6, "dpa", 0)),
        "R3": (Cell(6, "dpa", 0, variant="cmo_in_align"), Cell(6, "dpa", 0)),
        "R4": (Cell(6, "dpa", 0, variant="d_min_0.25"), Cell(6, "dpa", 0)),
        "R5": (Cell(2, "pmo", 0, variant="gentle_proxy"), Cell(2, "vanilla", 0)),
        "R6": (Cell(2, "vanilla", 0), Cell(2, "pmo", 0, variant="forgetful_proxy")),
        "R7": (Cell(6, "pmo", 0, variant="long"), Cell(6, "vanilla", 0, variant="long_vanilla")),
        "R8": (Cell(1, "vanilla", 0), Cell(1, "cal", 0)),
    },
    "gentle": {
        "G1": (_GENTLE[2], _SMALL_VANILLA[2]),
        "G2": (_GENTLE[6], _SMALL_VANILLA[6]),
        "G3": (_GENTLE_DPA[2], _SMALL_VANILLA[2]),
        "G4": (_GENTLE_DPA[6], _SMALL_VANILLA[6]),
        "G5": (_GENTLE_DPA[2], _GENTLE[2]),
        "G6": (_GENTLE_DPA[6], _GENTLE[6]),
        "G7": (_GENTLE[0], _SMALL_VANILLA[0]),
        "G8": (_GENTLE_DPA[0], _SMALL_VANILLA[0]),
    },
}
"""What these seeds test: the first cell is ahead of the second, over `tune`, whatever the seed."""


@dataclass(frozen=True)
class Sizes:
    """How large the world and the budgets are.

    Attributes:
        captions: that are trained on, a picture each.
        questions: that are trained on, four for a picture.
        asked: held-out questions, four for a picture.
        llm_steps: of the LLM's own training.
    """

    captions: int = 8000
    questions: int = 6400
    asked: int = 512
    llm_steps: int = 1000

    @functools.cached_property
    def protocol(self) -> str:
        """Hash of sizes, config and world: results of another protocol are never merged."""
        config = Config.fromfile(HERE / "config.py", import_custom_modules=False).to_dict()
        del config["log_to"]  # changes no result
        content = json.dumps([asdict(self), config, WORLD], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Part:
    """A question of a study: a grid of runs."""

    name: str
    levels: tuple[int, ...]
    methods: tuple[str, ...] = METHODS
    shares: tuple[float, ...] = (1.0,)
    variants: tuple[str, ...] = ()

    def cells(self, seed: int) -> list[Cell]:
        """List its runs of one seed."""
        grid = [(level, share) for level in self.levels for share in self.shares]
        plain = [Cell(level, m, seed, share) for level, share in grid for m in self.methods]
        other = [
            Cell(level, VARIANTS[name][0], seed, share, name)
            for level, share in grid
            for name in self.variants
        ]
        return plain + other


@dataclass(frozen=True)
class Study:
    """A study: its parts, in order of importance, its seeds and its sizes."""

    parts: tuple[Part, ...]
    seeds: tuple[int, ...]
    sizes: Sizes


STUDIES = {
    "smallest": Study(
        (Part("methods", (2,), ("vanilla", "pmo"), variants=("proxy_first",)),),
        (900, 901),
        Sizes(320, 320, 32, 20),
    ),
    "quick": Study((Part("methods", (0, 6)),), SEEDS["planned"][:3], Sizes()),
    "full": Study(
        (
            Part("methods", (0, 1, 2, 4, 6)),
            Part("proxies", (2, 6), (), variants=("forgetful_proxy", "gentle_proxy")),
            Part("budget", (2, 6), (), variants=("long_vanilla", "long")),
            Part(
                "batches",
                (6, 2),
                (),
                variants=("small_batches_vanilla", "small_batches", "gentle_small_batches"),
            ),
            Part(
                "gentle",
                (6, 2, 0),
                (),
                variants=(
                    "small_batches_vanilla",
                    "gentle_small_batches",
                    "gentle_small_batches_dpa",
                ),
            ),
            Part("variants", (2, 6), (), variants=tuple(VARIANTS)),
            Part("shares", (2, 6), shares=(0.25, 0.5)),
        ),
        SEEDS["planned"] + SEEDS["replication"],
        Sizes(),
    ),
}
