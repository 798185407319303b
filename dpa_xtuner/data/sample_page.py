"""Sample records as the model sees them, on one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.dataset import DPADataset
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.special import special_ids

SHOWN = 20
"""Samples of each data set on the page, evenly spread."""

_TEMPLATE = Path(__file__).with_name("sample_page.html")


def page(datasets: dict[str, DPADataset], tokenizer: Any) -> str:
    """Make the page.

    Args:
        datasets: what each is called -> the data set.
        tokenizer: that they were made by.
    """
    groups = []
    for name, dataset in datasets.items():
        chosen = np.unique(np.linspace(0, len(dataset) - 1, SHOWN, dtype=np.int64)).tolist()
        samples = [_sample(dataset, index, tokenizer) for index in chosen]
        groups.append(dict(name=name, number=len(dataset), samples=samples))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(groups=groups) + "\n"


def _sample(dataset: DPADataset, index: int, tokenizer: Any) -> dict[str, Any]:
    loaded = dataset[index]
    text = dataset.text(index)
    about = {"id": text["id"], "tokens": len(text["input_ids"]), "problem": "", "pictures": []}
    if isinstance(loaded, Problem):
        about["problem"] = loaded.reason
    elif loaded is not None:
        about["pictures"] = [_shown(p, dataset.image_processor) for p in loaded["pixel_values"]]
    return about | {"parts": _parts(text["input_ids"], text["labels"], tokenizer)}


def _parts(tokens: np.ndarray, labels: np.ndarray, tokenizer: Any) -> list[dict[str, Any]]:
    """Stretches of a text that are pictures, supervised, or neither; special tokens apart."""
    kinds = np.where(tokens == IMAGE_TOKEN_INDEX, 2, labels != IGNORE_INDEX).tolist()
    special = np.isin(tokens, special_ids(tokenizer)).tolist()
    found, start = [], 0
    for (kind, is_special), run in groupby(zip(kinds, special, strict=True)):
        end = start + len(list(run))
        text = f"{end - start} picture tokens" if kind == 2 else ""
        found.append(
            {
                "kind": ("prompt", "answer", "picture")[kind] + " special" * is_special,
                "text": text or tokenizer.decode(tokens[start:end].tolist()),
            }
        )
        start = end
    return found


def _shown(pixels: torch.Tensor, image_processor: Any) -> str:
    """Show the visual encoder's input, (3, H, W), as a picture in a data URI."""
    mean, std = (torch.tensor(x)[:, None, None] for x in _scale(image_processor))
    scaled = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    content = io.BytesIO()
    Image.fromarray(scaled.permute(1, 2, 0).numpy()).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _scale(image_processor: Any) -> tuple[list[float], list[float]]:
    if not getattr(image_processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(image_processor.image_mean), list(image_processor.image_std)
