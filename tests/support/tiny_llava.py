"""A DPALLaVAModel of a few thousand weights, and samples for it by hand."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.model.dpa_llava import DPALLaVAModel

PATCHES, V = 4, 50


def build(sharp: bool = False, **kwargs) -> DPALLaVAModel:
    """Sharp: sure of its answers, and moved by pictures, as a trained model is."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
        initializer_range=0.3 if sharp else 0.02,
    ))  # fmt: skip
    vit = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    ))  # fmt: skip
    options = dict(freeze_llm=True, freeze_visual_encoder=True) | kwargs
    model = DPALLaVAModel(llm=llm, visual_encoder=vit, **options)
    if sharp:
        nn.init.normal_(model.projector.model[2].weight)
    return model


def sample(*pieces: int | str, name: str = "0") -> dict:
    """Tokens by number, pictures by 'image'; supervised are the tokens from 20 on."""
    generator = torch.Generator().manual_seed(sum(p for p in pieces if isinstance(p, int)))
    ids, pixels = [], []
    for piece in pieces:
        if piece == "image":
            ids += [IMAGE_TOKEN_INDEX] * PATCHES
            pixels.append(torch.randn(3, 8, 8, generator=generator))
        else:
            ids.append(piece)
    tokens = torch.tensor(ids)
    labels = torch.where(tokens >= 20, tokens, IGNORE_INDEX)
    return {
        "id": name,
        "index": 0,
        "input_ids": tokens.numpy(),
        "labels": labels.numpy(),
        "pixel_values": pixels,
    }


MIXED = [
    sample(1, "image", 7, 20, 21),
    sample(1, 8, 30, 31, 32, 33, 34, 35, 36),
    sample("image", 22, 23),
    sample(1, "image", 5, "image", 24, 25, 26),
]
