"""What a run computes in: the hardware's queries are replaced, what is chosen is looked at."""

import platform

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from safetensors.torch import load_file
from support import harness
from torch import nn

from dpa_xtuner.errors import DPAError
from dpa_xtuner.precision import choose_precision, computes_bf16, runnable_dtype


@pytest.fixture
def hardware(monkeypatch):
    """Says what the machine can compute: bfloat16 on its GPU, and on its CPU."""

    def have(gpu: bool | None = None, avx512: bool = False, amx: bool = False, machine="x86_64"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(
            # With emulation, torch says yes for a V100.
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
                including_emulation or bool(gpu)
            ),
        )  # fmt: skip
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return have


@pytest.mark.parametrize(
    ("device", "machine", "name"),
    [
        ("cuda", dict(gpu=True), "bf16"),
        ("cuda", dict(gpu=False), "fp16"),
        ("cpu", dict(avx512=True), "bf16"),
        ("cpu", dict(amx=True), "bf16"),
        ("cpu", dict(), "fp32"),
        ("cpu", dict(machine="AMD64"), "fp32"),
    ],
)
def test_auto_takes_what_the_device_computes(hardware, device, machine, name):
    hardware(**machine)
    chosen = choose_precision("auto", device)
    assert chosen.name == name
    assert ("Some GPU" if device == "cuda" else "this CPU") in chosen.reason


def test_the_setting_stands_before_the_hardware(hardware):
    hardware(gpu=False)
    for name in ("bf16", "fp16", "fp32"):
        assert choose_precision(name, "cuda").name == name
    assert "slowly" in choose_precision("bf16", "cpu").reason
    with pytest.raises(DPAError, match=r"precision='fp16' needs a GPU"):
        choose_precision("fp16", "cpu")


def test_a_finished_model_is_loaded_in_a_type_that_runs(hardware):
    hardware(gpu=False)
    assert runnable_dtype(torch.bfloat16, "cpu") is torch.float32
    assert runnable_dtype(torch.float16, "cpu") is torch.float32
    assert runnable_dtype(torch.bfloat16, "cuda") is torch.float16
    assert runnable_dtype(torch.float16, "cuda") is torch.float16
    hardware(gpu=True, amx=True)
    assert runnable_dtype(torch.float16, "cpu") is torch.bfloat16
    for device in ("cpu", "cuda"):
        assert runnable_dtype(torch.bfloat16, device) is torch.bfloat16
        assert runnable_dtype(torch.float32, device) is torch.float32


def test_this_machine_is_asked():
    assert choose_precision("auto", "cpu").name == ("bf16" if computes_bf16("cpu") else "fp32")


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_a_float32_run_computes_in_float32_from_end_to_end(tiny, tmp_path, deepspeed):
    work_dir = tmp_path / "run"
    how = dict(prepare=lambda: _forbid(torch.bfloat16), deepspeed=deepspeed)
    for stage in harness.STAGES:
        output = harness.finish(stage, work_dir, "precision=fp32", **how)
        assert "Precision fp32: " in output
    assert len(harness.weights(work_dir)) > 10
    for file in (work_dir / "tune").glob("*/*.safetensors"):
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}, file


def _forbid(dtype: torch.dtype) -> None:
    linear = nn.functional.linear

    def checked(inputs, weight, *more):
        assert dtype not in (inputs.dtype, weight.dtype)
        device = inputs.device.type
        assert not torch.is_autocast_enabled(device)
        return linear(inputs, weight, *more)

    nn.functional.linear = checked


def test_a_run_keeps_the_precision_it_began_with(tiny, tmp_path):
    work_dir = tmp_path / "run"
    harness.finish("proxy", work_dir, "precision=fp32", "proxy.max_steps=2")
    begun = ("precision=auto", "proxy.max_steps=2")
    output = harness.finish("proxy", work_dir, *begun)
    assert "Precision fp32: stage proxy began in it" in output
    code, output = harness.run("align", work_dir, "precision=bf16", "proxy.max_steps=2")
    assert code == 1 and "Traceback" not in output
    assert "precision='bf16', but" in output and "began in 'fp32'" in output


def test_what_precision_decides_is_not_set_beside_it(tiny, tmp_path):
    options = (
        "model.llm.torch_dtype=torch.bfloat16",
        "model.visual_encoder.torch_dtype=torch.float16",
        "optim_wrapper.type=Bf16OptimWrapper",
    )
    code, output = harness.run("proxy", tmp_path / "run", *options)
    assert code == 1 and "Traceback" not in output
    for option in options:
        assert f"  {option.split('=')[0]}: each stage sets it; set precision instead" in output


def _as_on_a_gpu() -> None:
    """Let MMEngine's float16 wrapper run on a CPU: its scaler, and torch's autocast."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper
    from mmengine.runner import amp

    from dpa_xtuner import precision

    amp_optimizer_wrapper.is_cuda_available = lambda: True
    amp_optimizer_wrapper.GradScaler = lambda **how: torch.amp.GradScaler("cpu", **how)
    amp.autocast = lambda dtype: torch.autocast("cpu", dtype=dtype)
    chosen = precision.choose_precision
    from dpa_xtuner.stages import run

    run.choose_precision = lambda setting, device, *why: chosen(setting, "cuda", *why)


def test_float16_trains_with_a_scaled_loss_and_resumes_its_scale(tiny, tmp_path):
    options = ("precision=fp16", "proxy.max_steps=4", "proxy.save_steps=2")
    work_dir = tmp_path / "run"
    output = harness.finish("proxy", work_dir, *options, prepare=_as_on_a_gpu)
    assert "Precision fp16" in output
    checkpoint = torch.load(work_dir / "proxy/iter_8.pth", weights_only=True)
    scaler = checkpoint["optimizer"]["loss_scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] > 0  # steps that were not skipped
    adapters = [w for n, w in harness.weights(work_dir).items() if "lora_B" in n]
    assert adapters and all(w.isfinite().all() and w.any() for w in adapters)


def test_float16_skips_steps_that_overflow_and_then_takes_that_of_float32(monkeypatch):
    from mmengine.optim.optimizer import amp_optimizer_wrapper

    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(
        amp_optimizer_wrapper, "GradScaler", lambda **how: torch.amp.GradScaler("cpu", **how)
    )
    torch.manual_seed(0)
    layer, inputs = nn.Linear(8, 4), torch.randn(16, 8)
    before = layer.weight.detach().clone()
    expected = before - 0.5 * inputs.sum(0)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.5)
    wrapper = AmpOptimWrapper(optimizer=sgd, dtype="float16")
    scales = []
    while torch.equal(layer.weight, before):
        scales.append(wrapper.loss_scaler.get_scale())
        with torch.autocast("cpu", dtype=torch.float16):
            loss = layer(inputs).sum()
        wrapper.update_params(loss)
    assert 1 < len(scales) < 16 and scales[1] == scales[0] / 2
    assert torch.allclose(layer.weight, expected, atol=2e-2)
