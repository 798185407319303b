"""The floating-point type that a run computes in, chosen in one place."""

import platform
from dataclasses import dataclass

import torch

from dpa_xtuner.errors import DPAError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The values of the setting ``precision``, without ``auto``."""


@dataclass(frozen=True)
class Precision:
    """The floating-point type that a run computes in.

    Attributes:
        name: a key of :data:`DTYPES`.
        reason: why it was chosen, for the log.
    """

    name: str
    reason: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The type of frozen weights, and of matrix products."""
        return DTYPES[self.name]

    @property
    def fingerprint_dtype(self) -> torch.dtype:
        """The type that weights are rounded to before they are compared with another run's.

        A model loaded in float32 and one loaded in the run's type must agree. What float16
        rounds to zero is lost, so a float16 run compares in float16, all others in bfloat16.
        """
        return torch.float16 if self.name == "fp16" else torch.bfloat16

    def autocast(self, device: str, enabled: bool = True) -> torch.autocast:
        """Return a context that forms matrix products in this type; it does nothing for float32.

        Args:
            device: the device's type, such as ``"cuda"``.
            enabled: false if the weights already have this type.
        """
        return torch.autocast(device, dtype=self.dtype, enabled=enabled and self.name != "fp32")


def choose_precision(setting: str, device: str, why: str = "precision says so") -> Precision:
    """Choose the type that a run computes in.

    Args:
        setting: a key of :data:`DTYPES`, or ``"auto"``: bfloat16 if the device computes it
            natively; else float16 with a scaled loss on GPUs, float32 on CPUs.
        device: the device's type, such as ``"cuda"`` or ``"cpu"``.
        why: the reason for any setting but ``"auto"``, for the log.

    Raises:
        DPAError: the setting asks for float16 on a CPU.
    """
    if setting == "fp16" and device == "cpu":
        raise DPAError(
            "precision='fp16' needs a GPU: neither MMEngine nor DeepSpeed scales a loss on CPUs. "
            "Use 'auto', 'bf16' or 'fp32'."
        )
    native = computes_bf16(device)
    if setting != "auto":
        if setting == "bf16" and not native:
            why += f", though {_name(device)} emulates it, slowly"
        return Precision(setting, why)
    if native:
        return Precision("bf16", f"{_name(device)} computes bfloat16 natively")
    lacks = f"{_name(device)} does not compute bfloat16"
    if device == "cuda":
        return Precision("fp16", f"{lacks}: float16, with dynamic loss scaling")
    return Precision("fp32", f"{lacks} natively")


def computes_bf16(device: str) -> bool:
    """Tell whether a device forms products of bfloat16 natively, not by a slow emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        # oneDNN also says yes for AVX-512 without bfloat16 instructions, which it emulates.
        if platform.machine().lower() in ("x86_64", "amd64"):
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supported is not None and supported()


def runnable_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Choose the type to load a finished model in: its own, unless the device only emulates it.

    Args:
        dtype: dtype of the model's files.
        device: the device's type.
    """
    if dtype == torch.bfloat16:
        natively = computes_bf16(device)
    else:
        natively = dtype != torch.float16 or device != "cpu"
    return dtype if natively else choose_precision("auto", device).dtype


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"this {device.upper()}"
