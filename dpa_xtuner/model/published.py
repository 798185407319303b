"""Sizes of models as published, for where neither a folder nor the hub is at hand."""

import json
import tempfile
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from dpa_xtuner.model.configs import NotFound, read_config

_FILE = Path(__file__).with_name("published.json")


def published_config(setting: str, loader: dict, local_only: bool = False) -> PretrainedConfig:
    """Read a model's configuration from its folder or the hub, else from ``published.json``.

    The sizes are enough to count parameters and bytes; what the numbers mean for the model's
    output (rotary base, epsilon, token ids) is not in that file, so nothing is trained by it but
    in a rehearsal.

    Args:
        setting: the config key that names the model, for the message.
        loader: its ``type`` and ``pretrained_model_name_or_path``.
        local_only: look in folders and the hub's cache, and not at the hub.

    Raises:
        NotFound: the model is in none of the three.
    """
    try:
        return read_config(setting, loader, local_only)
    except NotFound:
        name = loader["pretrained_model_name_or_path"]
        sizes = _sizes().get(name) or _sizes().get(Path(name).name)  # the demo's, not yet made
        if sizes is None:
            raise
    with tempfile.TemporaryDirectory() as folder:  # so that its class reads it as any other
        (Path(folder) / "config.json").write_text(json.dumps(sizes))
        return read_config(setting, {**loader, "pretrained_model_name_or_path": folder})


@cache
def _sizes() -> dict[str, dict]:
    entries = json.loads(_FILE.read_text())
    return {name: entry["config"] for entry in entries for name in entry["names"]}
