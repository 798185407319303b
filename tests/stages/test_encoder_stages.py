"""Every kind of visual encoder and projector goes through a step of align and of tune."""

from pathlib import Path

import mmpretrain  # noqa: F401, takes seconds, so once for all runs
import pytest
import torch
from mmengine.config import Config
from support import encoder_folders, harness

from dpa_xtuner.planning.rehearsal import write_tiny_encoder

pytestmark = pytest.mark.slow

VIT = "vit-base-p16_in21k-pre_3rdparty_in1k-384px"
EVA02 = "vit-tiny-p14_eva02-pre_in21k"
SWIN = "swin-tiny_16xb64_in1k"
CONVNEXT = "convnext-tiny_32xb128_in1k"
DINOV2 = dict(type="dinov2", image_size=16)
INTERNVIT = dict(type="internvit", trust_remote_code=True)
PAIR = dict(type="pair", first="siglip", second=DINOV2)
# Encoder, projector, and the tokens of an image: of 16 x 16 pixels in patches of 4, or as
# MMPretrain's backbone has them at its published image size.
CASES = {
    "clip": (dict(type="clip"), dict(type="mlp"), 16),
    "siglip": (dict(type="siglip"), dict(type="pixel_shuffle"), 4),
    "siglip2": (dict(type="siglip2"), dict(type="avg_pool"), 4),
    "dinov2": (DINOV2, dict(type="resampler", queries=3), 3),
    "registers": (DINOV2, dict(type="mlp", depth=3), 16),
    "internvit": (INTERNVIT, dict(type="avg_pool", factor=4), 1),
    "pair": (PAIR, dict(type="pixel_shuffle"), 4),
    VIT: (dict(type="mmpretrain"), dict(type="pixel_shuffle", factor=4), 36),
    EVA02: (dict(type="mmpretrain"), dict(type="mlp"), 256),
    SWIN: (dict(type="mmpretrain"), dict(type="resampler", queries=5), 5),
    CONVNEXT: (dict(type="mmpretrain"), dict(type="avg_pool", factor=7), 1),
}


def written(name: str, folder: Path) -> str:
    """A tiny encoder of random weights: its folder, or those of a pair."""
    if name == "pair":
        return f"{written('siglip', folder / 'first')} + {written('dinov2', folder / 'second')}"
    if name in (VIT, EVA02, SWIN, CONVNEXT):
        folder.mkdir()
        write_tiny_encoder("mmpretrain", name, folder)
        return str(folder)
    if name == "registers":
        return encoder_folders.dinov2(folder, registers=True)
    return getattr(encoder_folders, "siglip" if name == "siglip2" else name)(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_align_and_of_tune(name, tiny, tmp_path):
    encoder, projector, tokens = CASES[name]
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = [{str(harness.TINY_CONFIG)!r}]\nmethod = 'cmo'\n"
        f"visual_encoder_name_or_path = {written(name, tmp_path / 'encoder')!r}\n"
        f"encoder = {encoder | {'_delete_': True}!r}\nprojector = {projector!r}\n"
        "align = dict(max_steps=1, global_batch_size=2)\n"
        "tune = dict(max_steps=1, global_batch_size=2)\n"
    )
    for stage, trained in (("align", {"projector"}), ("tune", {"projector", "llm"})):
        file = tmp_path / f"{stage}.pt"
        harness.finish(stage, tmp_path / "run", config=config, prepare=harness.watch(file))
        (dumped,) = (tmp_path / "run" / stage).glob("*/vis_data/config.py")
        # The model itself refuses an image that takes another number of tokens than the data say.
        assert Config.fromfile(dumped).train_dataloader.dataset.image_tokens == tokens
        watched = torch.load(file)
        before, after = watched["before"], watched["after"]
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert {key.split(".")[0] for key in moved} == trained
        # A key's bias adds the same to all of a query's scores, so nothing depends on it.
        idle = {"projector.key.bias"}
        assert {key for key in before if key.startswith("projector.")} - idle <= moved
