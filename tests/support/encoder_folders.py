"""Folders like those that visual encoders are published in, tiny and with random weights."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.projectors import build_projector, projected_tokens

SIZES = dict(
    hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, patch_size=4
)

# As InternViT's own code is laid out: a class token first, outputs as transformers gives them.
REMOTE_CONFIG = """
from transformers import PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(self, hidden_size=8, patch_size=4, image_size=16, num_hidden_layers=2, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_hidden_layers = num_hidden_layers
"""
REMOTE_MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_intern_vit import InternVisionConfig


class InternVisionModel(PreTrainedModel):
    config_class = InternVisionConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, size))
        self.patches = nn.Conv2d(3, size, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values, output_hidden_states=None):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=states[-1][:, 0],
            hidden_states=tuple(states) if output_hidden_states else None,
        )
"""


def clip(folder: Path, image_size: int = 16) -> str:
    return _write(
        CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=image_size)),
        CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        folder,
    )


def siglip(folder: Path, image_size: int = 16) -> str:
    return _write(
        SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=image_size)),
        SiglipImageProcessor(size={"height": image_size, "width": image_size}),
        folder,
    )


def dinov2(folder: Path, registers: bool = False) -> str:
    # Published for 518 pixels with a processor that scales to 256 and cuts out 224.
    sizes = dict(SIZES, mlp_ratio=2, image_size=24)
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
        if registers
        else Dinov2Model(Dinov2Config(**sizes))
    )
    processor = BitImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return _write(model, processor, folder)


def dinov3(folder: Path) -> str:
    sizes = dict(SIZES, image_size=16, num_register_tokens=4)
    processor = BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    return _write(
        AutoModel.from_config(AutoConfig.for_model("dinov3_vit", **sizes)), processor, folder
    )


def internvit(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "configuration_intern_vit.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_intern_vit.py").write_text(REMOTE_MODEL)
    config = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "auto_map": {
            "AutoConfig": "configuration_intern_vit.InternVisionConfig",
            "AutoModel": "modeling_intern_vit.InternVisionModel",
        },
        "hidden_size": 8,
        "patch_size": 4,
        "image_size": 16,
        "num_hidden_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {"class_embedding": (1, 1, 8), "patches.weight": (8, 3, 4, 4), "patches.bias": (8,)}
    for i in range(2):
        weights |= {f"layers.{i}.weight": (8, 8), f"layers.{i}.bias": (8,)}
    state = {name: torch.randn(shape) for name, shape in weights.items()}
    torch.save(state, folder / "pytorch_model.bin")
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return str(folder)


def _write(model, processor, folder: Path) -> str:
    with torch.no_grad():  # transformers begins some of it with zeros, which hide mistakes
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def image_tokens(encoder, projector, config):
    """Tokens of an image in the LLM's sequence, of an encoder's configuration and a projector."""
    spec = build_encoder(encoder)
    made = build_projector(projector, spec.hidden_size(config), 8)
    return projected_tokens(made, spec.tokens(config))
