"""Backbones of MMPretrain as visual encoders, against MMPretrain's own use of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmpretrain import get_model
from PIL import Image
from support.encoder_folders import image_tokens
from transformers import LlamaConfig, LlamaForCausalLM
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.planning.rehearsal import write_tiny_encoder
from dpa_xtuner.stages.components import VISUAL_ENCODER

pytestmark = pytest.mark.slow

# Name: class, image size, grid, channels; by the papers' and configs' own numbers.
BACKBONES = {
    "vit-tiny-p14_eva02-pre_in21k": ("ViTEVA02", 224, 16, 192),
    "vit-large-p14_eva02_m38m-pre_in21k-medft_3rdparty_in1k-448px": ("ViTEVA02", 448, 32, 1024),
    "vit-base-p16_in21k-pre_3rdparty_in1k-384px": ("VisionTransformer", 384, 24, 768),
    "swin-tiny_16xb64_in1k": ("SwinTransformer", 224, 7, 768),
    "convnext-tiny_32xb128_in1k": ("ConvNeXt", 224, 7, 768),
    "resnet50_8xb32_in1k": ("ResNet", 224, 7, 2048),
}
SMALL = ["vit-tiny-p14_eva02-pre_in21k", "swin-tiny_16xb64_in1k", "convnext-tiny_32xb128_in1k"]
KIND = build_encoder("mmpretrain")


def pixels(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_are_known_by_the_name_alone(name):
    config = KIND.config(name)
    backbone, size, side, channels = BACKBONES[name]
    assert config.backbone["type"] == backbone
    assert KIND.image_size(config) == size
    assert (KIND.tokens(config), KIND.hidden_size(config)) == (side**2, channels)
    assert image_tokens("mmpretrain", "mlp", config) == side**2


@pytest.fixture(scope="module", params=SMALL)
def published(request, tmp_path_factory):
    """A name, and a checkpoint as MMPretrain writes it: of the whole classifier."""
    torch.manual_seed(0)
    extra = {}
    if "eva02" in request.param:  # a pre-training config, whose head makes no classes
        extra = {"head": None}
    model = get_model(request.param, **extra)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    file = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, file)
    model.eval()
    return request.param, str(file), model


def load(cfg: dict, name: str):
    kind = build_encoder(cfg)
    module, info = BUILDER.build(dict(kind.loader(name), output_loading_info=True))
    assert not info["missing_keys"]
    return kind, module.eval()


def test_features_are_the_backbones_last_map(published):
    name, file, model = published
    kind, module = load(dict(type="mmpretrain", checkpoint=file), name)
    x = pixels(224)
    with torch.no_grad():
        features = kind.features(module, x)
        stages = []
        backbone = model.backbone
        if "swin" in name:
            backbone.stages[-1].register_forward_hook(lambda m, a, out: stages.append(out[0]))
            backbone(x)
            expected = backbone.norm3(stages[0])
        elif "convnext" in name:
            backbone.stages[-1].register_forward_hook(lambda m, a, out: stages.append(out))
            backbone(x)
            expected = backbone.norm3(stages[0]).flatten(2).transpose(1, 2)
        else:
            backbone.layers[-1].register_forward_hook(lambda m, a, out: stages.append(out))
            backbone(x)
            last = stages[0] if not backbone.final_norm else backbone.ln1(stages[0])
            expected = last[:, 1:]  # a class token comes first
    assert torch.allclose(features, expected, atol=1e-5)


def test_a_folder_stands_in_the_place_of_a_name(published, tmp_path):
    name, file, _ = published
    kind, module = load(dict(type="mmpretrain", checkpoint=file), name)
    module.save_pretrained(tmp_path)
    _, again = load("mmpretrain", str(tmp_path))
    x = pixels(224)
    assert torch.equal(kind.features(module, x), kind.features(again, x))
    there, named = KIND.config(str(tmp_path)), KIND.config(name)
    assert (KIND.tokens(there), there.hidden_size) == (KIND.tokens(named), named.hidden_size)


def test_a_trained_one_is_written_as_a_stage_writes_it(published, tmp_path):
    name, file, _ = published
    spec, module = load(dict(type="mmpretrain", checkpoint=file), name)
    spec.freeze_unread(module)
    learns = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learns:
        parameter.data += 0.01
    model = SimpleNamespace(visual_encoder=module, encoder_spec=spec)
    processor = BUILDER.build(spec.processor(name))
    VISUAL_ENCODER.save(model, tmp_path / "encoder", {}, processor)
    _, again = load("mmpretrain", str(tmp_path / "encoder"))
    x = pixels(224)
    assert torch.equal(spec.features(module, x), spec.features(again, x))


def test_images_are_normalised_as_the_config_says():
    processor = BUILDER.build(KIND.processor("swin-tiny_16xb64_in1k"))
    colour = (10, 100, 200)
    found = processor.preprocess(Image.new("RGB", (50, 50), colour))["pixel_values"][0]
    expected = (np.array(colour) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert found.shape == (3, 224, 224)
    assert np.allclose(found, expected[:, None, None], atol=1e-3)


@pytest.mark.parametrize("name", list(BACKBONES)[:-1])
def test_a_rehearsal_gets_a_tiny_one(name, tmp_path):
    write_tiny_encoder("mmpretrain", name, tmp_path)
    kind, module = load("mmpretrain", str(tmp_path))
    assert sum(p.numel() for p in module.parameters()) < 300_000
    processor = BUILDER.build(kind.processor(str(tmp_path)))
    x = torch.tensor(np.stack(processor.preprocess(Image.new("RGB", (9, 5)))["pixel_values"]))
    config = kind.config(str(tmp_path))
    features = kind.features(module, x)
    assert features.shape == (1, kind.tokens(config), kind.hidden_size(config))
    side = BACKBONES[name][2]
    assert kind.tokens(config) == side**2  # the real run's tokens


def test_a_model_trains_its_projector_with_one(tmp_path):
    write_tiny_encoder("mmpretrain", "convnext-tiny_32xb128_in1k", tmp_path)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ))  # fmt: skip
    loader = KIND.loader(str(tmp_path)) | {"torch_dtype": torch.bfloat16}
    model = DPALLaVAModel(
        llm, loader, encoder="mmpretrain", freeze_llm=True, freeze_visual_encoder=True
    ).train()
    assert model.visual_encoder.dtype == torch.bfloat16
    features = model.encode_images(pixels(224))
    assert features.shape == (1, 49, 16)
    features.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is None for p in model.visual_encoder.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin-tiny_16xb64_in1", "did you mean 'swin-tiny_16xb64_in1k'"),
        ("blip-base_8xb16_refcoco", "no classifier. Take the config of a classifier of RGB"),
        ("mae_vit-base-p16_8xb512-amp-coslr-300e_in1k", "MAEViT gives .*, not a feature"),
    ],
)
def test_names_that_will_not_do_are_refused(name, message):
    with pytest.raises(DPAError, match=message):
        KIND.config(name)


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_weights_that_are_not_there_are_told(content, tmp_path):
    file = tmp_path / "where.pth"
    if content:
        file.write_bytes(content)
    kind = build_encoder(dict(type="mmpretrain", checkpoint=str(file)))
    with pytest.raises(DPAError, match=r"where.pth' can't be read[\s\S]*checkpoint=FILE"):
        BUILDER.build(kind.loader("convnext-tiny_32xb128_in1k"))


def test_another_models_weights_are_not_taken(published):
    _, file, _ = published
    kind = build_encoder(dict(type="mmpretrain", checkpoint=file))
    loader = dict(kind.loader("resnet50_8xb32_in1k"), output_loading_info=True)
    assert len(BUILDER.build(loader)[1]["missing_keys"]) > 100


def test_a_chosen_layer_is_refused(tmp_path):
    write_tiny_encoder("mmpretrain", "convnext-tiny_32xb128_in1k", tmp_path)
    kind, module = load("mmpretrain", str(tmp_path))
    kind.layer = -2
    with pytest.raises(DPAError, match=r"leave model\.visual_select_layer out"):
        kind.features(module, pixels(224))
