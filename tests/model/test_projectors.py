"""Projectors: against PyTorch's own layers, and what is written and read back."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import avg_pool2d
from xtuner.model.modules import ProjectorConfig, ProjectorModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.projectors import (
    Projector,
    build_projector,
    load_projector,
    projected_tokens,
    read_projector,
)
from dpa_xtuner.registry import PROJECTORS
from dpa_xtuner.stages.artifacts import read_component_provenance
from dpa_xtuner.stages.components import PROJECTOR

C, H = 6, 8
KINDS = [
    "mlp",
    dict(type="mlp", depth=3),
    "pixel_shuffle",
    dict(type="pixel_shuffle", factor=3),
    "avg_pool",
    dict(type="avg_pool", factor=6),
    "resampler",
    dict(type="resampler", queries=5),
]


def patches(side: int = 6, count: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, side * side, C)


def build(cfg) -> nn.Module:
    torch.manual_seed(0)
    return build_projector(cfg, C, H)


def on_meta(cfg) -> nn.Module:
    with torch.device("meta"):
        return build_projector(cfg, C, H)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    zip(KINDS, [36, 36, 9, 4, 9, 1, 64, 5], strict=True),
    ids=str,
)
def test_tokens_are_counted_without_weights(cfg, expected):
    assert projected_tokens(on_meta(cfg), 36) == expected
    assert build(cfg)(patches()).shape == (2, expected, H)


@pytest.mark.parametrize("cfg", KINDS, ids=str)
def test_every_weight_is_trained(cfg):
    projector = build(cfg)
    projector(patches()).square().sum().backward()
    assert all(p.grad is not None for p in projector.parameters())
    # A softmax does not see what is added to all its inputs.
    blind = {"key.bias"}
    assert all(p.grad.abs().sum() > 0 for n, p in projector.named_parameters() if n not in blind)


def test_mlp_is_xtuners_and_saved_as_xtuner_does(tmp_path):
    ours = build("mlp")
    torch.manual_seed(0)
    stock = ProjectorModel(ProjectorConfig(visual_hidden_size=C, llm_hidden_size=H, depth=2))
    assert torch.equal(ours(patches()), stock(patches()))
    PROJECTOR.save(SimpleNamespace(projector=ours), tmp_path / "ours", {})
    stock.save_pretrained(tmp_path / "stock")
    for file in (tmp_path / "stock").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes(), file.name


def _internvl_pixel_shuffle(x: torch.Tensor, scale: float) -> torch.Tensor:
    # As InternVL 1.5 moves pixels ("v2"), in its own terms.
    n, w, h, c = x.shape
    x = x.view(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale), int(w * scale), int(c / scale**2))
    return x.permute(0, 2, 1, 3).contiguous()


def test_pixel_shuffle_is_internvls():
    projector, x = build("pixel_shuffle"), patches()
    shuffled = _internvl_pixel_shuffle(x.view(2, 6, 6, C), 0.5).reshape(2, 9, 4 * C)
    norm, linear, out = projector.norm, projector.model[0], projector.model[2]
    expected = nn.functional.layer_norm(shuffled, (4 * C,), norm.weight, norm.bias)
    expected = nn.functional.gelu(expected @ linear.weight.T + linear.bias) @ out.weight.T
    assert torch.allclose(projector(x), expected + out.bias, atol=1e-6)


def test_avg_pool_is_pytorchs_before_an_mlp():
    projector, x = build(dict(type="avg_pool", factor=3)), patches()
    pooled = avg_pool2d(x.transpose(1, 2).view(2, C, 6, 6), 3).flatten(2).transpose(1, 2)
    assert torch.allclose(projector(x), projector.model(pooled), atol=1e-6)


@pytest.mark.parametrize(("width", "heads"), [(H, 1), (300, 2), (384, 3), (640, 5)])
def test_the_resampler_attends_as_pytorchs_attention(width, heads):
    torch.manual_seed(0)
    projector, x = build_projector(dict(type="resampler", queries=5), C, width), patches()
    attention = nn.MultiheadAttention(width, heads, kdim=C, vdim=C, batch_first=True)
    layers = [projector.query, projector.key, projector.value]
    with torch.no_grad():
        for name, layer in zip("qkv", layers, strict=True):
            getattr(attention, f"{name}_proj_weight").copy_(layer.weight)
        attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        attention.out_proj.weight.copy_(projector.output.weight)
        attention.out_proj.bias.copy_(projector.output.bias)
    queries, keys = projector.norm_queries(projector.queries), projector.norm_patches(x)
    seen = projector.queries + attention(queries.expand(2, -1, -1), keys, keys)[0]
    expected = seen + projector.model(projector.norm_output(seen))
    assert torch.allclose(projector(x), expected, atol=1e-6)


@pytest.mark.parametrize("cfg", KINDS, ids=str)
def test_what_a_stage_writes_is_read_back_to_the_bit(cfg, tmp_path):
    written = build(cfg)
    PROJECTOR.save(SimpleNamespace(projector=written), tmp_path / "p", {"stage": "align"})
    assert read_component_provenance(tmp_path / "p")["component"] == "projector"
    read = load_projector(str(tmp_path / "p"), C, H)
    assert type(read) is type(written)
    pairs = zip(written.state_dict().items(), read.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_the_settings_are_written_whole(tmp_path):
    build("resampler").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "type": "resampler",
        "visual_hidden_size": C,
        "llm_hidden_size": H,
        "queries": 64,
    }


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("mlp", "avg_pool", r"'mlp', 'depth': 2.*this model's is .*'avg_pool', 'factor': 2"),
        ("avg_pool", "mlp", r"'avg_pool', 'factor': 2.*this model's is .*'mlp', 'depth': 2"),
        ("avg_pool", dict(type="avg_pool", factor=3), r"'factor': 2.*'factor': 3"),
    ],
)
def test_another_projectors_weights_are_refused(written, read, message, tmp_path):
    build(written).save_pretrained(tmp_path)
    with pytest.raises(DPAError, match=message):
        read_projector(build(read), str(tmp_path))


def test_another_activation_of_xtuners_is_not_loaded_as_gelu(tmp_path):
    ProjectorModel(ProjectorConfig(C, H, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(DPAError, match="hidden_act"):
        load_projector(str(tmp_path), C, H)
    with pytest.raises(DPAError, match=r"'hidden_act': 'relu'.*this model's"):
        read_projector(build("mlp"), str(tmp_path))


def test_a_projector_of_other_sizes_is_not_loaded(tmp_path):
    build("mlp").save_pretrained(tmp_path)
    with pytest.raises(DPAError, match=r"model\.2\.weight: saved .*, model "):
        load_projector(str(tmp_path), C, H + 1)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    build("pixel_shuffle").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("norm.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"extra: saved \(24,\), model nothing; norm\.bias: saved nothing, model \(24,\)"
    with pytest.raises(DPAError, match=message):
        read_projector(build("pixel_shuffle"), str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ("pixel_shufle", "'pixel_shufle' is not a known projector; did you mean 'pixel_shuffle'"),
        (dict(type="avg_pool", facto=2), "facto: not a known key; did you mean 'factor'"),
        (dict(type="mlp", factor=2), "It takes depth"),
        (dict(type="avg_pool", factor=0), "factor=0 is not a whole number above 0"),
        (dict(type="avg_pool", factor=4), "factor=4 does not divide the encoder's 6 x 6 patches"),
        (dict(type="resampler", queries=0), "queries=0 is not a whole number above 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(cfg, message):
    with pytest.raises(DPAError, match=message):
        projected_tokens(on_meta(cfg), 36)


def test_patches_that_are_no_square_are_refused():
    with pytest.raises(DPAError, match="needs a square of patches, but the encoder gives 35"):
        projected_tokens(on_meta("pixel_shuffle"), 35)


@pytest.fixture
def register():
    names = []

    def add(cls: type) -> str:
        PROJECTORS.register_module(cls.__name__, module=cls)
        names.append(cls.__name__)
        return cls.__name__

    yield add
    for name in names:
        del PROJECTORS.module_dict[name]


def test_one_of_ones_own_is_built_saved_and_loaded(register, tmp_path):
    class Every(Projector):
        def __init__(self, visual_hidden_size, llm_hidden_size, step=2):
            super().__init__()
            self.step, self.linear = step, nn.Linear(visual_hidden_size, llm_hidden_size)

        def tokens(self, n):
            return n // self.step

        def forward(self, patches):
            return self.linear(patches[:, :: self.step])

    cfg = dict(type=register(Every), step=3)
    assert projected_tokens(on_meta(cfg), 36) == 12
    written = build(cfg)
    written.save_pretrained(tmp_path)
    read = load_projector(str(tmp_path), C, H)
    assert torch.equal(written(patches()), read(patches()))


def test_one_that_can_not_be_saved_is_refused(register):
    class Plain(nn.Module):
        def __init__(self, visual_hidden_size, llm_hidden_size):
            super().__init__()

    class Buffered(Projector):
        def __init__(self, visual_hidden_size, llm_hidden_size):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

    with pytest.raises(DPAError, match=r"'Plain' is a Plain.*Derive its class from .*Projector"):
        build(register(Plain))
    with pytest.raises(DPAError, match=r"\(scale\), but only parameters are saved"):
        build(register(Buffered))
