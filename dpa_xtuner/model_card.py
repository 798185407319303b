"""The model card of an exported LLaVA: README.md in its folder, with code that runs as it is."""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment

from dpa_xtuner.files import read_json, write_text
from dpa_xtuner.layout import ALIGN, HF_FOLDER, PROVENANCE_FILE
from dpa_xtuner.pictures import WHITE

MODEL_CARD = "README.md"
"""The card's name in an exported folder, where a hub looks for it."""

_TEMPLATE = Path(__file__).with_suffix(".md")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ADVICE = "Export the folder again."
_SETTINGS = ("global_batch_size", "lr", "max_epochs", "max_steps", "train_llm", "loss")


def write_card(
    folder: Path, scores: Mapping[str, float] | None = None, limit: int | None = None
) -> None:
    """Write the card of a folder that ``tools/export.py --format hf`` made.

    Nothing is written to any other folder. Everything but the scores comes from ``dpa.json`` and
    ``preprocessor_config.json``, so that a later evaluation can write the card anew.

    Args:
        folder: the exported folder.
        scores: score of each benchmark, 0 to 100; None or empty for a model that was not evaluated.
        limit: number of questions asked of each data set; None for all.
    """
    about = read_json(folder / PROVENANCE_FILE, _ADVICE)
    if about.get("format") != HF_FOLDER:
        return
    mean = read_json(folder / "preprocessor_config.json", _ADVICE)["image_mean"]
    named = [about["llm"], about["visual_encoder"]]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    card = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        {"background": WHITE, **about},
        title=Path(about["config"]).stem,
        hub=[name for name in named if _HUB_NAME.fullmatch(name) and not Path(name).exists()],
        training=_training(about.get("training", {})),
        pads=about["pad_image_to_square"],
        mean_colour=tuple(int(x * 255) for x in mean),
        captions=about["stage"] == ALIGN,
        scores=scores,
        limit=limit,
    )
    write_text(folder / MODEL_CARD, re.sub(r"\n{3,}", "\n\n", card))


def _training(recorded: Mapping) -> dict[str, str]:
    """Choose what the table of the card shows of a stage's provenance."""
    paths = (recorded.get("data") or {}).get("data_path") or []
    paths = [paths] if isinstance(paths, str) else paths
    settings = recorded.get("settings") or {}
    found = {"data": ", ".join(Path(str(path)).name for path in paths)} if paths else {}
    found |= {name: str(settings[name]) for name in _SETTINGS if settings.get(name) is not None}
    return found
