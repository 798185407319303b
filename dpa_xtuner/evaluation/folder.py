"""A Hugging Face folder: the files that an evaluation reads, and their content, without torch."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json
from dpa_xtuner.layout import HF_FOLDER, PROVENANCE_FILE, STAGE_NAMES, STATE_FILE
from dpa_xtuner.pictures import WHITE

if TYPE_CHECKING:
    import torch

# Config, tokenizer, processor, chat template and generation config; weights; vocabularies.
_READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".tiktoken")
_JSON_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "chat_template.json", PROVENANCE_FILE,
)  # fmt: skip
_ADVICE = "Copy or export the folder again."


def files_read(folder: Path) -> list[Path]:
    """List the files that transformers may read, sorted; no README, log or folder.

    ``dpa.json`` is left out: only :func:`pictures_in_training` matters.
    """
    return sorted(
        path for path in folder.iterdir()
        if path.suffix in _READ and path.is_file()
        and path.name != PROVENANCE_FILE and not path.name.startswith(".")
    )  # fmt: skip


def pictures_in_training(folder: str | Path) -> tuple[bool, str]:
    """Return whether pictures were padded to a square in training, and the colour behind them."""
    about = read_json(Path(folder, PROVENANCE_FILE), _ADVICE)
    return bool(about.get("pad_image_to_square")), about.get("background", WHITE)


def computing_dtype(folder: str | Path, device: str) -> torch.dtype:
    """Return the dtype that a folder's model computes in: its config's, or float32 without one.

    A dtype that the device only emulates is replaced, see
    :func:`dpa_xtuner.precision.runnable_dtype`.

    Args:
        folder: folder of the model.
        device: the device's type, ``"cuda"`` or ``"cpu"``.
    """
    import torch

    from dpa_xtuner.precision import runnable_dtype

    config = read_json(Path(folder, "config.json"), _ADVICE)
    name = config.get("torch_dtype") or config.get("dtype") or "float32"  # 4.48, and 4.56 on
    return runnable_dtype(getattr(torch, name), device)


def has_chat_template(folder: Path) -> bool:
    """Tell whether a LLaVA's processor or tokenizer has a chat template."""
    if any((folder / f"chat_template.{kind}").is_file() for kind in ("json", "jinja")):
        return True
    return "chat_template" in read_json(folder / "tokenizer_config.json", _ADVICE)


def check_llava(folder: Path) -> None:
    """Refuse a folder that transformers can't open as a LLaVA, before anything is loaded.

    Raises:
        DPAError: the folder does not exist or is not a LLaVA; the message says what is missing.
    """
    expected = "expected the folder of a LlavaForConditionalGeneration and its processor"
    if not (folder / "config.json").is_file():
        raise DPAError(
            f"{folder} has no config.json; {expected}. To make one from a run: python "
            f"tools/export.py CONFIG"
        )
    config = read_json(folder / "config.json", _ADVICE)
    for name in ("vision_config", "text_config"):
        if not isinstance(config.get(name) or {}, dict):
            raise DPAError(f"{folder / 'config.json'} is broken ({name} is not a dict). {_ADVICE}")
    vision = (config.get("vision_config") or {}).get("model_type")
    if config.get("model_type") != "llava" or vision == "pixtral":  # its pictures vary in size
        kind = f"{config.get('model_type')!r}{' with Pixtral' * (vision == 'pixtral')}"
        raise DPAError(f"{folder} is a model of type {kind}; {expected}.")
    needed = ["preprocessor_config.json", "tokenizer_config.json", "*.safetensors|*.bin"]
    if "image_processor" in read_json(folder / "processor_config.json", _ADVICE):
        needed.pop(0)  # where transformers 5 saves it
    for wanted in needed:
        if not any(path for name in wanted.split("|") for path in folder.glob(name)):
            raise DPAError(f"{folder} has no {wanted.replace('|', ' or ')}; {expected}.")
    for name in _JSON_FILES:  # transformers ignores a broken generation config
        read_json(folder / name, _ADVICE)


def run_of_export(folder: Path) -> Path | None:
    """Find the run of an export, ``<run>/<stage>/hf``; None for any other folder."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):  # it may be a link
        if path.name == HF_FOLDER and (path.parent / STATE_FILE).is_file():
            return path.parents[1]
    return None


def labels(folders: list[Path]) -> list[str]:
    """Make short, distinct labels of folders: as few last parts of their paths as differ.

    ``hf``, the name of exported folders, is skipped, and the name of a stage alone is not enough.
    """
    parts = [
        [part for part in Path(os.path.abspath(folder)).parts if part != HF_FOLDER]
        for folder in folders
    ]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["-".join(names[-length:]) for names in parts]
        if len(set(short)) == len(short) and not set(short) & set(STAGE_NAMES):
            break
    found: list[str] = []
    for label in (re.sub(r"[^\w.-]", "_", label) for label in short):
        # Two paths may still have one label, such as x and x/hf, or "a b" and a_b.
        others = (f"{label}-{number}" for number in itertools.count(2))
        found.append(next(n for n in itertools.chain([label], others) if n not in found))
    return found
