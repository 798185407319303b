"""What an evaluation reads of a Hugging Face folder, found without loading anything."""

from __future__ import annotations

import json
from pathlib import Path

# Config, tokenizer, processor, chat template and generation config; weights; vocabularies.
_READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".tiktoken")
_ORIGIN = "dpa.json"


def files_read(folder: Path) -> list[Path]:
    """The files that transformers may read, sorted; not a README, a log or a folder beside them.

    Nor ``dpa.json``, of which no more counts than `pads_pictures`.
    """
    return sorted(
        path for path in folder.iterdir()
        if path.suffix in _READ and path.is_file()
        and path.name != _ORIGIN and not path.name.startswith(".")
    )  # fmt: skip


def pads_pictures(folder: str | Path) -> bool:
    """Whether the model was trained on pictures that were padded to a square."""
    file = Path(folder, _ORIGIN)
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(described.get("pad_image_to_square"))
