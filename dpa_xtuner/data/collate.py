"""Put samples of different lengths and modalities into one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import FUNCTIONS
from torch.nn.utils.rnn import pad_sequence
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.problems import Problem


@FUNCTIONS.register_module(name="dpa_collate")
def collate(instances: Sequence[dict[str, Any] | Problem | None]) -> dict[str, Any]:
    """Pad samples on the right and mark where the image tokens sit.

    Skipped samples, and None, are left out. Where all are, one row with one token and no label
    remains, so that this rank still takes part in the step.

    Args:
        instances: items of a :class:`DPADataset`, or what its ``text`` gives; left unchanged.

    Returns:
        {"data": ..., "data_samples": None}, where data holds, for B rows of T tokens with N images:
        "input_ids" (B, T) int64, 0 at image positions and in the padding; "labels" (B, T) int64,
        ``IGNORE_INDEX`` where nothing is supervised; "attention_mask" (B, T) bool; "position_ids"
        (B, T) int64; "image_mask" (B, T) bool; "pixel_values" (N, 3, H, W) float32 in the order of
        the images in the rows, absent where N is 0; "ids", the record ids of the rows, and
        "indices", their places in the data set; "skipped", a list of (record id, reason).
    """
    samples = [item for item in instances if isinstance(item, dict)]
    skipped = [(p.record_id, p.reason) for p in instances if isinstance(p, Problem)]
    rows = [torch.from_numpy(sample["input_ids"]) for sample in samples]
    labels = [torch.from_numpy(sample["labels"]) for sample in samples]
    if not samples:
        rows, labels = [torch.zeros(1, dtype=torch.long)], [torch.tensor([IGNORE_INDEX])]
    tokens = pad_sequence(rows, batch_first=True)  # (B, T)
    image_mask = tokens == IMAGE_TOKEN_INDEX
    attention_mask = pad_sequence([torch.ones_like(r, dtype=torch.bool) for r in rows], True)
    data = {
        "input_ids": tokens.masked_fill(image_mask, 0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": attention_mask,
        "position_ids": torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous(),
        "image_mask": image_mask,
        "ids": [sample["id"] for sample in samples],
        "indices": [sample["index"] for sample in samples],
        "skipped": skipped,
    }
    images = [image for sample in samples for image in sample.get("pixel_values", [])]
    if images:
        data["pixel_values"] = torch.stack(images)
    return {"data": data, "data_samples": None}
