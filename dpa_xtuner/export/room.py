"""Whether there is room for what is about to be written."""

import shutil
from pathlib import Path

from torch import Tensor

from dpa_xtuner.errors import DPAError


def need_room(folder: Path, state: dict[str, Tensor]) -> None:
    """Refuse to begin what a full disk would end.

    Raises:
        DPAError: the disk has less room than the weights take.
    """
    size = sum(weight.numel() * weight.element_size() for weight in state.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DPAError(
            f"The weights take {size / 2**30:.1f} GB, and where {folder} is there are "
            f"{free / 2**30:.1f} GB left. Make room, or export to another place with -o."
        )
