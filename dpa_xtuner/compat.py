"""Workarounds for defects of other packages, one function for each defect.

Each function names the defect and the version it was seen in. Where a version can be without the
defect, it checks, and does nothing. Nothing else in this package patches foreign code.
"""

import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

from dpa_xtuner.errors import DPAError

XTUNER_COMMAND = "pip install --no-deps xtuner==0.2.0"
"""XTuner's metadata pins old versions of what its code runs with as well."""


def deepspeed_short_names() -> None:
    """Accept ``--deepspeed zero2`` for ``deepspeed_zero2`` (a convenience, not a defect)."""
    from xtuner.configs import cfgs_name_path

    for stage in ("zero1", "zero2", "zero3"):
        cfgs_name_path.setdefault(stage, cfgs_name_path[f"deepspeed_{stage}"])


def triton_without_ops() -> None:
    """Provide ``triton.ops``, which bitsandbytes 0.45.0 imports and triton 3.x lacks.

    peft imports bitsandbytes for any LoRA, so every LoRA run would fail on import. Only the int8
    Triton kernels of bitsandbytes use the two functions.
    """
    find = importlib.util.find_spec
    if not find("triton") or "triton.ops" in sys.modules or find("triton.ops"):
        return
    model: Any = types.ModuleType("triton.ops.matmul_perf_model")
    model.early_config_prune = model.estimate_matmul_time = None
    sys.modules["triton.ops"] = types.ModuleType("triton.ops")
    sys.modules["triton.ops.matmul_perf_model"] = model


def safetensors_asked_for() -> None:
    """XTuner 0.2.0 imports ``is_safetensors_available``, gone since transformers 5.0.

    Loading safetensors needs no asking since then. ``xtuner train`` imports it before it reads a
    config, and so before this is called: there XTuner's own file has to be mended once, by
    :func:`mend_xtuner`.
    """
    import transformers.utils as utils

    if not hasattr(utils, "is_safetensors_available"):
        utils.is_safetensors_available = lambda: True


_MENDED = {
    "utils/handle_moe_load_and_save.py": (
        "    is_safetensors_available,\n",
        "    is_torch_available as is_safetensors_available,\n",
    ),
    "tools/chat.py": (
        '        "load_in_8bit": load_in_8bit,\n',
        '        **({"load_in_8bit": True} if load_in_8bit else {}),\n',
    ),
}


def mend_xtuner() -> str:
    """Mend the two lines of the installed XTuner 0.2.0 that transformers 5 does not take.

    One imports a name that is gone, for ``xtuner train`` (:func:`safetensors_asked_for`); one
    hands a model an argument that is gone, in ``xtuner chat``. ``python -m dpa_xtuner.compat``
    calls this, and ``make install`` does so. Older versions take the new lines as well.

    Returns:
        What was done; a second time, nothing.

    Raises:
        DPAError: XTuner is not installed.
    """
    files = files_to_mend()
    for file, mended in files.items():
        file.write_text(mended, encoding="utf-8")
    return f"mended for transformers 5: {', '.join(map(str, files)) or 'nothing left to mend'}"


def files_to_mend() -> dict[Path, str]:
    """Find the files of the installed XTuner that :func:`mend_xtuner` changes, with new content.

    Raises:
        DPAError: XTuner is not installed.
    """
    found = importlib.util.find_spec("xtuner")
    if found is None or found.origin is None:
        raise DPAError(f"XTuner is not installed: {XTUNER_COMMAND}")
    files = {}
    for name, (line, instead) in _MENDED.items():
        file = Path(found.origin).parent / name
        text = file.read_text(encoding="utf-8")
        if line in text:
            files[file] = text.replace(line, instead)
    return files


def remote_code_without_post_init() -> None:
    """Mend InternViT's own code, which does not call ``post_init``: transformers 5 expects it.

    What ``post_init`` would set is read when weights are loaded. A model that ties none needs
    nothing else of it.
    """
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "get_expanded_tied_weights_keys"):
        PreTrainedModel.all_tied_weights_keys = {}


def deepspeed_without_onebit() -> None:
    """DeepSpeed 0.19 has no 1-bit optimizers, which MMEngine 0.10.7 imports to register them.

    Every start with ``--deepspeed`` would fail. Classes of their names stand in; using one fails.
    """
    name = "deepspeed.runtime.fp16.onebit"
    find = importlib.util.find_spec
    if name in sys.modules or not find("deepspeed") or find(name):
        return
    module: Any = types.ModuleType(name)
    for optimizer in ("OnebitAdam", "OnebitLamb", "ZeroOneAdam"):
        setattr(module, optimizer, type(optimizer, (), {}))
    sys.modules[name] = module


def deepspeed_leaves_float32() -> None:
    """Cast what lies outside a partitioned model: DeepSpeed 0.19.8 leaves it in float32 in ZeRO-3.

    With ZeRO-3 transformers loads an LLM partitioned, in the run's precision; the projector and
    LoRA's matrices are made in float32. DeepSpeed 0.16.2 cast all; 0.19.8 keeps the model as it is
    and then refuses to train weights of two dtypes.
    """
    from deepspeed import DeepSpeedEngine

    cast = getattr(DeepSpeedEngine, "_cast_module_mixed_precision", None)
    if cast is None:
        return

    def cast_all(self, dtype, *args, **kwargs) -> None:
        for parameter in self.module.parameters():
            if dtype is not None and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
        cast(self, dtype, *args, **kwargs)

    DeepSpeedEngine._cast_module_mixed_precision = cast_all


def builders_in_mmengine_scope() -> None:
    """Make XTuner's classes known in MMEngine's scope, in which the stages run.

    XTuner 0.2.0's registry has no parent, so that MMEngine 0.10.6 warns at each start that it
    found none of that scope.
    """
    from mmengine.registry import Registry
    from xtuner.registry import BUILDER

    if "mmengine" not in BUILDER.children:
        Registry("builder", parent=BUILDER, scope="mmengine")


def mmengine_overwritten() -> None:
    """Warn if mmengine-lite has overwritten MMEngine, as it does with OpenCompass 0.5.4.

    OpenCompass installs mmengine-lite 0.11.0rc3; XTuner 0.2.0 needs MMEngine 0.10.6.
    """
    import mmengine

    installed = importlib.metadata.version("mmengine")
    if mmengine.__version__ != installed:
        warnings.warn(
            f"The files of MMEngine {installed} were overwritten by {mmengine.__version__} "
            f"(mmengine-lite, which OpenCompass brings). Put them back: "
            f"pip install --no-deps --force-reinstall mmengine=={installed}",
            stacklevel=2,
        )


def cpu_bf16_support() -> None:
    """Provide ``torch.cpu.is_bf16_supported``, which XTuner 0.2.0 calls and torch 2.14 lacks."""
    import torch

    if not hasattr(torch.cpu, "is_bf16_supported"):
        torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]  # as said


def cuda_set_device_without_cuda() -> None:
    """Disable ``torch.cuda.set_device`` without a GPU: MMEngine 0.10.6 calls it all the same."""
    import torch

    if not torch.cuda.is_available():
        torch.cuda.set_device = lambda device: None


def deepspeed_without_mpi() -> None:
    """Keep DeepSpeed 0.16.2 from using mpi4py when one process runs without a launcher.

    It does not if RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, so we set them
    for a run of one process. With port 0, the system chooses a free one.
    """
    if importlib.util.find_spec("mpi4py"):
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def checkpoint_globals() -> None:
    """Allow the classes in MMEngine 0.10.6 checkpoints, which torch >= 2.6 refuses on resuming.

    ``torch.load`` defaults to ``weights_only=True`` since 2.6. We declare the classes in an
    MMEngine checkpoint as safe; everything else stays refused. MMEngine's log buffers also pickle
    references to their own methods, as calls of ``getattr``, which can't be declared safe: we drop
    them, and MMEngine sets those that it needs again.
    """
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    multiarray: Any = np.core.multiarray
    dtypes = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, bool)}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes]
    )
    HistoryBuffer.__getstate__ = _without_methods


def _without_methods(buffer) -> dict:
    return {key: value for key, value in vars(buffer).items() if key != "statistics_methods"}


def optim_wrapper_rebuilt() -> None:
    """Keep a DPA config's ``optim_wrapper``, of which XTuner 0.2.0 drops most with ``--deepspeed``.

    ``xtuner train`` replaces it by DeepSpeed's type and the optimizer, and ``strategy`` by its own:
    ``paramwise_cfg``, ``constructor`` and all others are lost silently. In a DPA config we merge
    them with what XTuner sets; the stages use or refuse them.
    """
    from mmengine.config import Config

    replace = Config.__setitem__

    def keep(self, name, value):
        before = self._cfg_dict.get(name)
        ours = self._cfg_dict.get("_scope_") == "dpa_xtuner" and isinstance(before, dict)
        by_deepspeed = isinstance(value, dict) and value.get("type") == "DeepSpeedOptimWrapper"
        if ours and (name == "strategy" or (name == "optim_wrapper" and by_deepspeed)):
            value = {**before, **value}
        replace(self, name, value)

    Config.__setitem__ = keep


def options_that_do_not_fit() -> None:
    """Report options such as ``proxy.lr.x=1``, where ``proxy.lr`` is a number, without a traceback.

    ``xtuner train`` calls MMEngine 0.10.6 before a runner could say what is wrong. Its error
    becomes a :class:`DPAError`.
    """
    from mmengine.config import Config

    merge = Config.merge_from_dict

    def told(self, options, *args, **kwargs):
        try:
            merge(self, options, *args, **kwargs)
        except (TypeError, KeyError) as error:
            raise DPAError(
                f"--cfg-options don't fit into {self.filename}: {error.args[0]}"
            ) from None

    Config.merge_from_dict = told


@contextmanager
def deepspeed_loads_safely() -> Iterator[None]:
    """Keep DeepSpeed 0.16.2 from running code in a checkpoint, which it unpickles in full.

    A switch of torch turns its ``torch.load(weights_only=False)`` into a safe one. We declare the
    classes in a checkpoint as safe; those of MMEngine are already.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from mmengine.config import ConfigDict

    classes: list[Any] = [
        DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, ConfigDict,
        # Python 3.11.0 - 3.11.3 pickles an enum's member as a call of getattr.
        (_enum_member, "builtins.getattr"),
    ]  # fmt: skip
    switch = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    with torch.serialization.safe_globals(classes), patch.dict(os.environ, switch):
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses both
        yield


def _enum_member(owner: type, name: str) -> Enum:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise UnpicklingError(f"{owner}.{name} is no member of an enum")
    return owner[name]


def vlmeval_literals() -> None:
    """Keep VLMEvalKit 0.0.20 from running text of a data file as Python.

    Many of its data sets call ``eval`` to see whether a text is a list; this changes the modules
    that our benchmarks use. Indices, lists of pictures and of right answers are literals. Anything
    else is no longer run, but treated as text or refused.
    """
    import ast

    from vlmeval.dataset import image_vqa
    from vlmeval.dataset.utils import vqa_eval
    from vlmeval.smp import misc

    for module in (image_vqa, vqa_eval, misc):
        module.eval = ast.literal_eval


def apply() -> None:
    """Mend what any run needs; one under DeepSpeed adds ``deepspeed_without_...``.

    Raises:
        DPAError: XTuner is not installed; the message says how it is.
    """
    if importlib.util.find_spec("xtuner") is None:
        raise DPAError(f"XTuner is not installed: {XTUNER_COMMAND}")
    safetensors_asked_for()
    remote_code_without_post_init()
    mmengine_overwritten()
    triton_without_ops()
    builders_in_mmengine_scope()
    cpu_bf16_support()
    cuda_set_device_without_cuda()
    checkpoint_globals()
    optim_wrapper_rebuilt()
    options_that_do_not_fit()
    deepspeed_short_names()


if __name__ == "__main__":
    print(mend_xtuner())
