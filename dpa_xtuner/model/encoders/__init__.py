"""Kinds of visual encoders, by name: the spec of each. Importing them registers them."""

from dpa_xtuner.model.encoders.base import (
    Encoder,
    VisionEncoder,
    VisionEncoderSpec,
    build_encoder,
)
from dpa_xtuner.model.encoders.mmpretrain import MMPretrain
from dpa_xtuner.model.encoders.pair import Pair
from dpa_xtuner.model.encoders.vits import CLIP, DINOv2, InternViT, SigLIP
