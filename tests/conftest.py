"""One thread, no hub, and the tiny models and data that the tests share."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import harness
import pytest
import torch
from mmengine.config import Config

from dpa_xtuner.stages import rehearsal
from dpa_xtuner.stages.settings import Settings

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with llm, visual_encoder, captions.json, instructions.json and images."""
    folder = tmp_path_factory.mktemp("tiny")
    os.environ.update(DPA_TINY=str(folder), DPA_CACHE=str(folder / "cache"))

    def write() -> None:
        cfg = Config.fromfile(harness.TINY_CONFIG)
        rehearsal._make_inputs(cfg, Settings.from_config(cfg), folder)

    harness.forked(write, folder / "inputs.log")
    return folder
