"""Sample records as the model sees them, on one HTML page that needs no other file."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.dataset import DPADataset
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.special import special_ids
from dpa_xtuner.pages import data_uri, render

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
    return render(_TEMPLATE, groups=groups)


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
    found = []
    runs = groupby(zip(kinds, special, tokens.tolist(), strict=True), key=lambda each: each[:2])
    for (kind, is_special), run in runs:
        ids = [token for _, _, token in run]
        name = ("prompt", "answer", "picture")[kind] + " special" * is_special
        text = f"{len(ids)} picture tokens" if kind == 2 else tokenizer.decode(ids)
        found.append({"kind": name, "text": text})
    return found


def _shown(pixels: torch.Tensor, image_processor: Any) -> str:
    """Show the visual encoder's input, (3, H, W), as a picture in a data URI."""
    if getattr(image_processor, "do_normalize", True):
        mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std])  # (3,)
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    scaled = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return data_uri(Image.fromarray(scaled.permute(1, 2, 0).numpy()), "png")
