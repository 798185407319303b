"""What each kind of visual encoder knows of itself, against transformers' own models."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from mmengine.utils import get_object_from_string
from PIL import Image
from support import encoder_folders
from support.encoder_folders import SIZES, image_tokens
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionModel,
)
from xtuner.registry import BUILDER

from dpa_xtuner.data import collate
from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.configs import NotFound
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.encoders import VisionEncoderSpec, build_encoder
from dpa_xtuner.planning.rehearsal import write_tiny_encoder
from dpa_xtuner.registry import ENCODERS

DINOV2 = dict(type="dinov2", image_size=16)
INTERNVIT = dict(type="internvit", trust_remote_code=True)
PAIR = dict(type="pair", first="siglip", second=DINOV2)
ALL = {
    "clip": "clip",
    "siglip": "siglip",
    "dinov2": DINOV2,
    "registers": DINOV2,
    "internvit": INTERNVIT,
    "pair": PAIR,
}
DINOV3 = hasattr(transformers, "DINOv3ViTModel")
if DINOV3:
    ALL["dinov3"] = dict(type="dinov3", image_size=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("encoders")
    names = {
        "clip": encoder_folders.clip(base / "clip"),
        "clip24": encoder_folders.clip(base / "clip24", image_size=24),
        "siglip": encoder_folders.siglip(base / "siglip"),
        "dinov2": encoder_folders.dinov2(base / "dinov2"),
        "registers": encoder_folders.dinov2(base / "registers", registers=True),
        "internvit": encoder_folders.internvit(base / "internvit"),
    }
    if DINOV3:
        names["dinov3"] = encoder_folders.dinov3(base / "dinov3")
    return names | {"pair": f"{names['siglip']} + {names['dinov2']}"}


def load(cfg, name: str) -> tuple[VisionEncoderSpec, torch.nn.Module]:
    kind = build_encoder(cfg)
    module, info = BUILDER.build(dict(kind.loader(name), output_loading_info=True))
    assert not info["missing_keys"]
    return kind, module.eval()


def pixels(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_what_is_known_ahead_holds_for_the_features(name, folders):
    kind, module = load(ALL[name], folders[name])
    config = kind.config(folders[name])
    size = kind.image_size(config)
    with torch.no_grad():
        features = kind.features(module, pixels(3, size))
    assert features.shape == (3, kind.tokens(config), kind.hidden_size(config))
    assert image_tokens(ALL[name], "mlp", config) == features.shape[1] == 16
    assert image_tokens(ALL[name], "avg_pool", config) == 4
    processor = BUILDER.build(kind.processor(folders[name]))
    image = Image.new("RGB", (30, 30))
    assert processor.preprocess(image)["pixel_values"][0].shape == (3, size, size)


@pytest.mark.parametrize("name", ALL)
def test_a_trained_encoder_is_saved_as_its_kind_loads_it(name, folders, tmp_path):
    spec, module = load(ALL[name], folders[name])
    spec.freeze_unread(module)
    learns = {key: p for key, p in module.named_parameters() if p.requires_grad}
    assert learns
    for parameter in learns.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    features = spec.features(module, pixels())
    slopes = torch.autograd.grad(features.square().sum(), learns.values())
    assert all(slope.shape == p.shape for slope, p in zip(slopes, learns.values(), strict=True))
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    processor = BUILDER.build(spec.processor(folders[name]))
    with torch.no_grad():  # what is given is written, as where ZeRO-3 has gathered it
        module.get_parameter(next(iter(learns))).zero_()
    spec.save(module, tmp_path, state, processor)
    spec, again = load(ALL[name], str(tmp_path))
    torch.testing.assert_close(spec.features(again, pixels()), features, atol=0, rtol=0)
    image = Image.effect_noise((20, 30), 100).convert("RGB")
    one, other = (
        BUILDER.build(spec.processor(folder)).preprocess(image)["pixel_values"][0]
        for folder in (folders[name], str(tmp_path))
    )
    assert np.array_equal(one, other)


def test_what_the_features_do_not_read_is_frozen(folders):
    spec, module = load("clip", folders["clip"])
    spec.freeze_unread(module)
    frozen = {key for key, p in module.named_parameters() if not p.requires_grad}
    behind = re.compile(r"(vision_model\.)?(encoder\.layers\.2|post_layernorm)\.")
    assert frozen == {key for key in module.state_dict() if behind.match(key)}


@pytest.mark.parametrize("name", [name for name in ALL if name != "pair"])
def test_tokens_are_the_patches_row_by_row(name, folders):
    # In the embeddings, layer 0, a patch of the image is seen by its own token alone.
    kind, module = load(ALL[name], folders[name])
    kind.layer = 0
    blank = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        before = kind.features(module, blank)
        for place in range(16):
            row, column = divmod(place, 4)
            image = blank.clone()
            image[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
            changed = (kind.features(module, image) != before).any(-1)[0]
            assert changed.nonzero().flatten().tolist() == [place]


def test_the_layers_are_those_that_llava_cambrian_and_internvl_take(folders):
    x = pixels()
    with torch.no_grad():
        clip = CLIPVisionModel.from_pretrained(folders["clip"])(x, output_hidden_states=True)
        siglip = SiglipVisionModel.from_pretrained(folders["siglip"])(x, output_hidden_states=True)
        dino = AutoModel.from_pretrained(folders["dinov2"])
        registers = AutoModel.from_pretrained(folders["registers"])
        intern = AutoModel.from_pretrained(folders["internvit"], trust_remote_code=True)
        expected = {
            "clip": clip.hidden_states[-2][:, 1:],
            "siglip": siglip.hidden_states[-2],
            "dinov2": dino(x).last_hidden_state[:, 1:],
            "registers": registers(x).last_hidden_state[:, 5:],
            "internvit": intern(x).last_hidden_state[:, 1:],
        }
        if DINOV3:
            dino3 = AutoModel.from_pretrained(folders["dinov3"])
            expected["dinov3"] = dino3(x).last_hidden_state[:, 5:]
        for name, features in expected.items():
            kind, module = load(ALL[name], folders[name])
            assert torch.equal(kind.features(module, x), features), name
            kind.layer = -3
            states = module(x, output_hidden_states=True).hidden_states[-3]
            assert torch.equal(kind.features(module, x), states[:, -16:]), name


# From the published config.json and preprocessor_config.json.
PUBLISHED = {
    "openai/clip-vit-large-patch14-336": (
        "clip",
        {"model_type": "clip", "vision_config": dict(
            model_type="clip_vision_model", hidden_size=1024, num_attention_heads=16,
            image_size=336, patch_size=14)},
        (336, 576, 1024),
    ),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        {"model_type": "siglip", "vision_config": dict(
            model_type="siglip_vision_model", hidden_size=1152, image_size=384, patch_size=14)},
        (384, 729, 1152),
    ),
    "google/siglip2-so400m-patch16-384": (
        "siglip2",
        {"model_type": "siglip", "vision_config": dict(
            model_type="siglip_vision_model", hidden_size=1152, image_size=384, patch_size=16)},
        (384, 576, 1152),
    ),
    "facebook/dinov2-large": (
        "dinov2",
        {"model_type": "dinov2", "hidden_size": 1024, "image_size": 518, "patch_size": 14},
        (224, 256, 1024),
    ),
    "facebook/dinov2-with-registers-large": (
        dict(type="dinov2", image_size=518),
        {"model_type": "dinov2_with_registers", "hidden_size": 1024, "image_size": 518,
         "patch_size": 14},
        (518, 1369, 1024),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name, tmp_path):
    cfg, published, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    kind = build_encoder(cfg)
    config = kind.config(str(tmp_path))
    assert (kind.image_size(config), kind.tokens(config), kind.hidden_size(config)) == expected


def test_dinov3_needs_a_newer_transformers_or_has_its_published_size():
    if not DINOV3:
        with pytest.raises(DPAError, match=r"encoder=.dinov3. needs transformers 4\.56 or newer"):
            build_encoder("dinov3")
        return
    # facebook/dinov3-vitl16-pretrain-lvd1689m: 300 M (arXiv 2508.10104, table 4)
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    sizes |= dict(num_attention_heads=16, num_register_tokens=4)
    kind = build_encoder("dinov3")
    config = AutoConfig.for_model("dinov3_vit", **sizes)
    with torch.device("meta"):
        module = kind.build(config)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(303e6, rel=0.01)
    assert (kind.image_size(config), kind.tokens(config)) == (224, 196)


def test_dinov2s_processor_cuts_nothing_off(folders):
    kind = build_encoder(dict(type="dinov2", image_size=32))
    processor = BUILDER.build(kind.processor(folders["dinov2"]))
    image = np.zeros((64, 64, 3), np.uint8)
    image[:2] = image[-2:] = image[:, :2] = image[:, -2:] = 255  # a frame at the very edge
    found = processor.preprocess(Image.fromarray(image))["pixel_values"][0]
    assert found.shape == (3, 32, 32)
    for edge in (found[:, 0], found[:, -1], found[:, :, 0], found[:, :, -1]):
        assert (edge > 1.5).all()  # white is 2.2 and more, black -2.1 and more
    assert (found[:, 3:-3, 3:-3] < -1.5).all()


def test_dinov2_takes_other_sizes_by_interpolation(folders):
    kind, module = load(dict(type="dinov2", image_size=32), folders["dinov2"])
    assert kind.features(module, pixels(1, 32)).shape == (1, 64, 8)


def test_a_pair_is_each_half_on_its_own_preparation(folders):
    # CLIP's colours and SigLIP's differ; sizes are equal, and 16 pixels need no scaling.
    cfg = dict(type="pair", first="clip", second="siglip")
    name = f"{folders['clip']} + {folders['siglip']}"
    kind, module = load(cfg, name)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    halves = []
    for half, path in (("clip", folders["clip"]), ("siglip", folders["siglip"])):
        one, alone = load(half, path)
        own = BUILDER.build(one.processor(path))
        x = torch.tensor(np.stack(own.preprocess(image)["pixel_values"]))
        halves.append(one.features(alone, x))
    processor = BUILDER.build(kind.processor(name))
    x = torch.tensor(np.stack(processor.preprocess(image)["pixel_values"]))
    assert torch.allclose(kind.features(module, x), torch.cat(halves, -1), atol=1e-4)


def test_a_pairs_second_grid_is_made_the_firsts(folders):
    cfg = dict(type="pair", first="clip", second=dict(type="dinov2", image_size=8, layer=0))
    kind, module = load(cfg, f"{folders['clip24']} + {folders['dinov2']}")
    with torch.no_grad():
        x = pixels(2, 24)
        features = kind.features(module, x)  # 6 x 6 patches, and 2 x 2
        alone, dino = load(cfg["second"], folders["dinov2"])
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        new = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        raw = x * std[:, None, None] + mean[:, None, None]
        raw = (raw - new[0][:, None, None]) / new[1][:, None, None]
        raw = torch.nn.functional.interpolate(raw, (8, 8), mode="bicubic", antialias=True)
        grid = alone.features(dino, raw).view(2, 2, 2, 8)
    assert features.shape == (2, 36, 16)
    second = features[..., 8:].view(2, 6, 6, 8)
    # By hand: patch centres of 6 lie at -1/3, 0, 1/3, 2/3, 1, 4/3 of 2, edges held.
    share = torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1])
    rows = grid[:, :1] * (1 - share)[None, :, None, None] + grid[:, 1:] * share[None, :, None, None]
    both = rows[:, :, :1] * (1 - share)[:, None] + rows[:, :, 1:] * share[:, None]
    assert torch.allclose(second, both, atol=1e-4)


def test_a_pair_is_also_a_folder_of_two(tmp_path):
    for half, write in (("first", encoder_folders.siglip), ("second", encoder_folders.dinov2)):
        write(tmp_path / half)
    kind, module = load(PAIR, str(tmp_path))
    assert kind.features(module, pixels()).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("cfg", "name", "message"),
    [
        ("clpi", "clip", r"'clpi' is not a known encoder; did you mean 'clip'\?.*Known: clip, di"),
        (
            dict(type="clip", layr=1),
            "clip",
            "'clip' can't be built: layr: not .*'layer'",
        ),
        ("clip", "siglip", "is a model of type 'siglip_vision_model', but the encoder CLIP loads"),
        ("siglip", "dinov2", "is a model of type 'dinov2'.*Set encoder to the kind"),
        (dict(type="dinov2", image_size=18), "dinov2", "image_size=18 is not a multiple of .* 4"),
        ("internvit", "internvit", r"type='internvit', trust_remote_code=True\)"),
        (PAIR, "clip", "does not name a pair of encoders: give 'NAME \\+ NAME'"),
    ],
    ids=str,
)
def test_mistakes_are_told(cfg, name, message, folders):
    # A pair's name that is one folder is read as one of two.
    given = "openai/clip" if cfg is PAIR else folders[name]
    with pytest.raises(DPAError, match=message):
        build_encoder(cfg).config(given)


def test_a_missing_half_is_named(folders):
    with pytest.raises(NotFound, match="visual_encoder_name_or_path='no/where' is neither"):
        build_encoder(PAIR).config(f"{folders['siglip']} + no/where")


def test_a_layer_that_is_not_there_is_told(folders):
    kind, module = load(dict(type="clip", layer=-9), folders["clip"])
    with pytest.raises(DPAError, match=r"layer -9 is not one of the 4 hidden states .* -4 to 3"):
        kind.features(module, pixels())


def test_one_layer_for_a_pair_is_refused(folders):
    model = llava("pair", folders, visual_select_layer=-2)
    with pytest.raises(DPAError, match="visual_select_layer can't be set for a pair"):
        model.encode_images(pixels())


def llava(name: str, folders, projector="mlp", cfg=None, **kwargs) -> DPALLaVAModel:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128,
    ))  # fmt: skip
    cfg = ALL[name] if cfg is None else cfg
    loader = build_encoder(cfg).loader(folders[name]) | {"torch_dtype": torch.bfloat16}
    options = dict(freeze_llm=True, freeze_visual_encoder=True) | kwargs
    return DPALLaVAModel(llm, loader, encoder=cfg, projector=projector, **options)


COMBINATIONS = [(name, "mlp") for name in ALL] + [
    ("clip", "pixel_shuffle"),
    ("siglip", dict(type="resampler", queries=3)),
    ("pair", "avg_pool"),
]


@pytest.mark.parametrize(("name", "projector"), COMBINATIONS, ids=str)
def test_a_model_of_each_kind_trains_its_projector(name, projector, folders):
    model = llava(name, folders, projector).train()
    count = image_tokens(ALL[name], projector, build_encoder(ALL[name]).config(folders[name]))
    # A picture, text alone, and a picture of three tiles.
    batch = [
        sample(["image"], count),
        sample([], count),
        sample(["image"] * 3, count),
    ]
    model(collate(batch)["data"])["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert model.projector.dtype == torch.float32
    assert not model.visual_encoder.training

    model.zero_grad()
    model(collate([batch[1]])["data"])["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


def sample(images: list[str], count: int) -> dict:
    ids = [1, *[-200] * count * len(images), 7, 20, 21, 22]
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    return {
        "id": "0",
        "index": 0,
        "input_ids": np.array(ids),
        "labels": np.array(labels),
        "pixel_values": list(pixels(len(images))) if images else [],
    }


def test_the_layer_can_be_set_as_in_stock_configs(folders):
    x = pixels()
    first = llava("siglip", folders, visual_select_layer=-1).encode_images(x)
    second = llava("siglip", folders, cfg=dict(type="siglip", layer=-1)).encode_images(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, llava("siglip", folders).encode_images(x))


def test_images_of_another_size_are_refused(folders):
    with pytest.raises(DPAError, match="images are 20 x 20, but the visual encoder takes 16 x 16"):
        llava("dinov2", folders).encode_images(pixels(1, 20))


@pytest.mark.parametrize("name", ALL)
def test_a_rehearsal_gets_a_tiny_one_of_each_kind(name, folders, tmp_path):
    cfg = ALL[name]
    write_tiny_encoder(cfg, folders[name], tmp_path)
    kind, module = load(cfg, str(tmp_path))
    config = kind.config(str(tmp_path))
    processor = BUILDER.build(kind.processor(str(tmp_path)))
    x = torch.tensor(np.stack(processor.preprocess(Image.new("RGB", (9, 5)))["pixel_values"]))
    features = kind.features(module, x)
    assert features.shape == (1, kind.tokens(config), kind.hidden_size(config))
    assert sum(p.numel() for p in module.parameters()) < 200_000


@pytest.mark.parametrize(
    "cfg",
    ["clip", "siglip2", "dinov2", dict(type="pair", first="clip", second="dinov2")]
    + ["dinov3"] * DINOV3,
    ids=str,
)
def test_a_rehearsal_needs_no_published_configuration(cfg, tmp_path):
    name = "no/where" if isinstance(cfg, str) else "no/where + no/where"
    write_tiny_encoder(cfg, name, tmp_path)
    kind, module = load(cfg, str(tmp_path))
    config = kind.config(str(tmp_path))
    assert kind.features(module, pixels(1, kind.image_size(config))).shape[1] == kind.tokens(config)


def test_a_rehearsal_of_remote_code_needs_its_folder(tmp_path):
    with pytest.raises(DPAError, match=r"has no default configuration.*Give a local folder"):
        write_tiny_encoder(INTERNVIT, "no/where", tmp_path)


def test_modules_are_built_without_memory_for_weights(folders):
    for name, cfg in ALL.items():
        kind = build_encoder(cfg)
        with torch.device("meta"):
            module = kind.build(kind.config(folders[name]))
        assert all(p.is_meta for p in module.parameters()), name


def test_one_of_ones_own_is_a_few_lines(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    class ViT(VisionEncoderSpec):
        model = "transformers.ViTModel.from_pretrained"
        image_processor = "transformers.ViTImageProcessor.from_pretrained"
        layer = -1

    ENCODERS.register_module("vit", module=ViT)
    try:
        ViTModel(ViTConfig(**SIZES, image_size=16)).save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
        model = llava("vit", {"vit": str(tmp_path)}, cfg="vit")
        assert model.encode_images(pixels()).shape == (2, 16, 16)
        write_tiny_encoder("vit", str(tmp_path), tmp_path / "tiny")
        assert load("vit", str(tmp_path / "tiny"))
    finally:
        del ENCODERS.module_dict["vit"]


def test_mmpretrain_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mmpretrain", None)
    with pytest.raises(DPAError, match=r"needs the package mmpretrain.*-e '\.\[mmpretrain\]'"):
        build_encoder("mmpretrain").config("swin-tiny_16xb64_in1k")
    assert get_object_from_string(build_encoder("mmpretrain").model)  # its class needs no package
