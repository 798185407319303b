"""Each mend does nothing where the defect is gone, and harm nowhere."""

import io
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from deepspeed import DeepSpeedEngine
from mmengine.logging.history_buffer import HistoryBuffer
from xtuner.configs import cfgs_name_path

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError

pytestmark = pytest.mark.slow


def test_the_short_names_of_zero_are_known():
    for stage in (1, 2, 3):
        assert cfgs_name_path[f"zero{stage}"] == cfgs_name_path[f"deepspeed_zero{stage}"]


def test_a_short_name_of_xtuners_own_is_kept(monkeypatch):
    monkeypatch.setitem(cfgs_name_path, "zero2", "their own")
    compat.deepspeed_short_names()
    assert cfgs_name_path["zero2"] == "their own"


def test_applying_twice_is_harmless():
    compat.apply()
    compat.apply()


@pytest.fixture
def no_triton_ops(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("triton.ops")]:
        monkeypatch.delitem(sys.modules, name)


def specs(monkeypatch, **known) -> None:
    monkeypatch.setattr(
        compat.importlib.util, "find_spec", lambda name: known.get(name.replace(".", "_"))
    )


def test_triton_without_ops_gets_a_stub(no_triton_ops, monkeypatch):
    specs(monkeypatch, triton="a spec", triton_ops=None)
    compat.triton_without_ops()
    from triton.ops.matmul_perf_model import early_config_prune, estimate_matmul_time

    assert early_config_prune is estimate_matmul_time is None


@pytest.mark.parametrize("known", [{"triton": "a spec", "triton_ops": "a spec"}, {}])
def test_triton_with_ops_or_no_triton_is_left_alone(known, no_triton_ops, monkeypatch):
    specs(monkeypatch, **known)
    compat.triton_without_ops()
    assert "triton.ops" not in sys.modules


def test_torchs_own_bf16_answer_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cpu, "is_bf16_supported", lambda: False, raising=False)
    compat.cpu_bf16_support()
    assert torch.cpu.is_bf16_supported() is False
    monkeypatch.delattr(torch.cpu, "is_bf16_supported")
    compat.cpu_bf16_support()
    assert torch.cpu.is_bf16_supported() is True


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_device_is_set_where_there_is_one(has_gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    compat.cuda_set_device_without_cuda()
    torch.cuda.set_device(0)
    assert calls == ([0] if has_gpu else [])


ALONE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def not_launched(monkeypatch):
    for name in (*ALONE, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def environment() -> dict[str, str]:
    return {name: compat.os.environ[name] for name in ALONE if name in compat.os.environ}


def test_a_process_that_no_launcher_started_is_a_run_of_one(not_launched, monkeypatch):
    specs(monkeypatch)
    compat.deepspeed_without_mpi()
    assert environment() == dict(zip(ALONE, ["0", "1", "0", "127.0.0.1", "0"], strict=True))


def test_what_the_environment_says_is_kept(not_launched, monkeypatch):
    specs(monkeypatch)
    monkeypatch.setenv("MASTER_PORT", "29501")
    compat.deepspeed_without_mpi()
    assert environment() == dict(zip(ALONE, ["0", "1", "0", "127.0.0.1", "29501"], strict=True))


def test_deepspeed_finds_mpi_where_it_is(not_launched, monkeypatch):
    specs(monkeypatch, mpi4py="a spec")
    compat.deepspeed_without_mpi()
    assert environment() == {}


def test_checkpoints_with_log_buffers_load_safely():
    buffer = HistoryBuffer([1.0, 4.0], [1, 1])
    content = {"buffer": buffer, "numbers": np.array([1.5, 2.5]), "number": np.float64(0.5)}
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["buffer"].mean() == 2.5 and loaded["buffer"].statistics("min") == 1.0
    assert loaded["numbers"].tolist() == [1.5, 2.5] and loaded["number"] == 0.5


def test_other_classes_stay_refused():
    file = io.BytesIO()
    torch.save({"x": types.SimpleNamespace()}, file)
    file.seek(0)
    with pytest.raises(Exception, match="SimpleNamespace"):
        torch.load(file, weights_only=True)


def test_importing_adds_less_than_half_a_second_to_xtuners_own():
    script = (
        "import time, xtuner.tools.train; began = time.process_time()\n"
        "import dpa_xtuner; print('seconds', time.process_time() - began)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert float(out.split("seconds")[1]) < 0.5


def test_overwritten_files_of_mmengine_are_spoken_of(monkeypatch):
    compat.mmengine_overwritten()  # says nothing here, or the environment is not as installed
    monkeypatch.setattr("mmengine.__version__", "0.11.0rc3")
    with pytest.warns(UserWarning, match="pip install --no-deps --force-reinstall mmengine=="):
        compat.mmengine_overwritten()


def test_a_start_with_deepspeed_finds_the_1_bit_optimizers(monkeypatch):
    from mmengine._strategy.deepspeed import register_deepspeed_optimizers
    from mmengine.registry import OPTIMIZERS

    # Registered twice, they would be refused in the next test that starts with DeepSpeed.
    monkeypatch.setattr(OPTIMIZERS, "_module_dict", dict(OPTIMIZERS.module_dict))

    compat.deepspeed_without_onebit()
    compat.deepspeed_without_onebit()
    assert "OnebitAdam" in register_deepspeed_optimizers()


def test_zero3_casts_what_lies_outside_a_partitioned_llm():
    if not hasattr(DeepSpeedEngine, "_cast_module_mixed_precision"):
        pytest.skip("this DeepSpeed casts everything by itself")
    compat.deepspeed_leaves_float32()
    compat.deepspeed_leaves_float32()
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    engine = types.SimpleNamespace(module=model)
    DeepSpeedEngine._cast_module_mixed_precision(engine, torch.bfloat16, None, True)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.bfloat16)


def test_xtuners_files_are_mended_once(tmp_path, monkeypatch):
    for name, (line, _) in compat._MENDED.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"(\n{line})\n")
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: found)
    assert "chat.py" in compat.mend_xtuner()
    for name, (_, instead) in compat._MENDED.items():
        assert (tmp_path / name).read_text() == f"(\n{instead})\n"
    assert compat.mend_xtuner().endswith("nothing left to mend")


def test_a_missing_xtuner_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DPAError, match="pip install --no-deps xtuner"):
        compat.apply()


class Attribute:
    """Pickled, a call of getattr, as Python 3.11.0 - 3.11.3 pickles a member of an enum."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_of_calls_of_getattr_in_a_deepspeed_checkpoint_only_members_of_enums_are_read(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from mmengine.config import ConfigDict

    for name, saved in {"enum": (ZeroStageEnum, "weights"), "other": (ConfigDict, "pop")}.items():
        torch.save(Attribute(*saved), tmp_path / name)
    with compat.deepspeed_loads_safely():
        assert torch.load(tmp_path / "enum", weights_only=False) is ZeroStageEnum.weights
        with pytest.raises(pickle.UnpicklingError, match="pop is no member of an enum"):
            torch.load(tmp_path / "other", weights_only=False)
