"""Checks that the disk has room for weights."""

import shutil
from pathlib import Path

from torch import Tensor

from dpa_xtuner.errors import DPAError


def need_room(folder: Path, state: dict[str, Tensor]) -> None:
    """Refuse to write weights that the disk has no room for.

    Raises:
        DPAError: the disk has less room than the weights need.
    """
    size = sum(weight.numel() * weight.element_size() for weight in state.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DPAError(
            f"The weights take {size / 2**30:.1f} GB, but the disk of {folder} has "
            f"{free / 2**30:.1f} GB left. Make room, or export to another place with -o."
        )
