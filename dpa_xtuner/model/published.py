"""Sizes of published models, for machines without their folders and without the hub."""

import json
import tempfile
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from dpa_xtuner.model.configs import NotFound, read_config

_FILE = Path(__file__).with_name("published.json")


def published_config(setting: str, loader: dict, local_only: bool = False) -> PretrainedConfig:
    """Read a model's configuration from its folder, the hub, or else ``published.json``.

    That file has the sizes that parameters and bytes are counted from. It lacks other keys that
    change a model's output (rotary base, epsilon, token ids): use it only to rehearse and to count.

    Args:
        setting: the config key that names the model, for the message.
        loader: its ``type`` and ``pretrained_model_name_or_path``.
        local_only: look only in folders and the hub's cache.

    Raises:
        NotFound: the model is in none of the three.
    """
    try:
        return read_config(setting, loader, local_only)
    except NotFound:
        name = loader["pretrained_model_name_or_path"]
        # By its last name too: the demo's models, before they are made.
        sizes = _sizes().get(name) or _sizes().get(Path(name).name)
        if sizes is None:
            raise
    with tempfile.TemporaryDirectory() as folder:  # the config's class reads it as any other folder
        (Path(folder) / "config.json").write_text(json.dumps(sizes))
        return read_config(setting, {**loader, "pretrained_model_name_or_path": folder})


@cache
def _sizes() -> dict[str, dict]:
    entries = json.loads(_FILE.read_text())
    return {name: entry["config"] for entry in entries for name in entry["names"]}
