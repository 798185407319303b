"""A pretended GPU: tensors that say that they are on ``cuda`` and compute on the CPU.

An operation on tensors of both devices raises, as it would with a GPU. So code for GPUs runs
without one, up to what only a real one tells: its kernels, their speed and memory.
"""

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # it is confused if it is imported while torch.cuda is replaced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
# CUDA takes indices from the CPU, and copies between devices.
MIXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnGPU(Tensor):
    """A tensor that says that it is on the GPU; ``inner`` has its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGPU({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, OnGPU) for tensor in tensors]
    if any(on_gpu) and name != "copy_":
        mixed = any(t.dim() and not gpu for t, gpu in zip(tensors, on_gpu, strict=True))
        if mixed and not (name in MIXING and on_gpu[0]):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    bare_args, bare_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
    out = func(*bare_args, **bare_kwargs)
    if name == "copy_":
        return args[0]
    if not any(on_gpu):
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGPU, out))


class _Checked(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if (device.type == "cuda") == isinstance(tensor, OnGPU):
        return tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "no gradient of a move is made"
    return OnGPU(tensor.detach()) if device.type == "cuda" else tensor.detach().inner


class _Moves(TorchFunctionMode):
    """Carries out what names a device: C++ would look for a real GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            found = _move(args[0], CPU)
            return found if func is Tensor.cpu else func(found, *args[1:])
        if func is Tensor.cuda:
            return _move(args[0], CUDA)
        if func is Tensor.to:
            asked = [*args[1:], kwargs.get("device"), kwargs.get("dtype")]
            like = [(x.device, x.dtype) for x in asked if isinstance(x, Tensor)]
            asked += like[0] if like else ()
            moved = args[0]
            for device in (x for x in asked if isinstance(x, (str, torch.device))):
                moved = _move(moved, torch.device(device))
            dtypes = [x for x in asked if isinstance(x, torch.dtype)]
            return func(moved, dtypes[0]) if dtypes else moved
        if torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"}).detach()
        return _move(made, CUDA).requires_grad_(kwargs.get("requires_grad", False))


class _Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


_autocast = torch.autocast


@contextlib.contextmanager
def _autocast_of_both(device_type, dtype=None, enabled=True, cache_enabled=None):
    if device_type != "cuda":
        with _autocast(device_type, dtype, enabled, cache_enabled):
            yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    try:
        with _autocast("cpu", dtype, enabled, cache_enabled=False):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _nothing(*args, **kwargs):
    return None


NAME = "NVIDIA H100 80GB HBM3"
REPLACED = dict.fromkeys(
    ("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode",
     "set_rng_state", "manual_seed", "manual_seed_all"), _nothing,
)  # fmt: skip
REPLACED |= {
    "is_available": lambda: True,
    "max_memory_allocated": lambda device=None: 10**9,
    "Event": _Event,
    "get_device_properties": lambda device: SimpleNamespace(name=NAME, total_memory=80 << 30),
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "device": lambda device: contextlib.nullcontext(),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let ``torch.cuda`` find a GPU, and what is moved to it compute on the CPU."""
    with contextlib.ExitStack() as stack:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        for name, replacement in REPLACED.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        for module in (torch, torch.amp, torch.amp.autocast_mode):
            stack.enter_context(mock.patch.object(module, "autocast", _autocast_of_both))
        for kind in ("accelerator", "cuda"):  # asks for the GPU's stream
            check = f"_{kind}_graph_capture_health_check"
            stack.enter_context(
                mock.patch.object(torch.optim.Optimizer, check, _nothing, create=True)
            )
        stack.enter_context(_Checked())
        stack.enter_context(_Moves())
        yield
