"""How often a step reads a number from the device: each time, a GPU runs dry.

On a CPU nothing waits, so the operations are counted that make the host wait for a GPU.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import tiny_llava
from torch.utils._python_dispatch import TorchDispatchMode

import dpa_xtuner
from dpa_xtuner.data import collate

OURS = str(Path(dpa_xtuner.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"}


class CountWaits(TorchDispatchMode):
    """Counts what waits, by the line of ours that asks for it; other packages' own are theirs."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if picks or name in WAITS:
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(OURS):
                self.lines[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}"] += 1
        return func(*args, **(kwargs or {}))


def waits(loss):
    model = tiny_llava.build(loss=loss, normalize="global").train()
    data = collate(tiny_llava.MIXED)["data"]
    model(data)["loss"].backward()  # the first one checks the number of image tokens
    with CountWaits() as counted:
        model(data)["loss"].backward()
    return counted.lines


@pytest.mark.parametrize(("loss", "bound"), [("uniform", 2), ("cmo", 7), ("cal", 7)])
def test_a_step_waits_a_few_times(loss, bound):
    lines = waits(loss)
    assert 0 < sum(lines.values()) <= bound, lines
