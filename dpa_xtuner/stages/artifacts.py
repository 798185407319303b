"""What is in a stage's folder: how far it is, checkpoints, and the components that it wrote."""

import json
import re
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from torch import nn

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json, whole_folder, write_json
from dpa_xtuner.layout import PROVENANCE_FILE, STATE_FILE
from dpa_xtuner.stages.components import Component
from dpa_xtuner.versions import installed_versions

KIND = "component"
"""The provenance's key for the component that the folder holds."""


def read_state(folder: Path) -> dict:
    """What the state file of a stage's folder says; empty where the stage has not begun.

    Raises:
        DPAError: it is broken.
    """
    advice = f"Restore it, or remove {folder} to train the stage again."
    return read_json(folder / STATE_FILE, advice)


def is_finished(folder: Path) -> bool:
    """Whether the stage of a folder is finished."""
    return read_state(folder).get("status") == "finished"


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage.

    A checkpoint gets its name when all of it is on disk, so any that has it is whole.
    """
    found = [(int(m[1]), str(path)) for path in folder.glob("iter_*.pth")
             if (m := re.fullmatch(r"iter_(\d+)\.pth", path.name))]  # fmt: skip
    return max(found)[1] if found else None


def trained_key(component: Component) -> str:
    """The record's key for the fingerprint of a component as its stage left it."""
    return f"trained_{component}"


def save_component(
    model: nn.Module, component: Component, folder: Path, origin: dict, companion: Any = None
) -> None:
    """Write a trained component as its own library reads it, with its record.

    Every rank must call it, since ZeRO-3 gathers; rank 0 writes. All weights are safetensors.

    Args:
        model: the stage's model, not wrapped by DDP or DeepSpeed.
        component: what to write.
        folder: where to; replaced where it exists.
        origin: goes into the record beside the tensors' shapes.
        companion: what is written beside the weights (:meth:`Component.companion`).
    """
    state = component.state(model)
    if not is_main_process():
        return
    with whole_folder(folder) as partial:
        component.write(model, state, partial, companion)
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        record = {KIND: component, **origin, "versions": installed_versions(), "shapes": shapes}
        write_json(partial / PROVENANCE_FILE, record)


def read_provenance(folder: Path, advice: str) -> dict:
    """What the ``dpa.json`` of a folder says; empty where there is none.

    Args:
        folder: a stage or an export wrote it.
        advice: what to do where the file is broken.

    Raises:
        DPAError: it is broken.
    """
    found = read_json(folder / PROVENANCE_FILE, advice)
    if "part" in found:  # the key's name in folders of older versions
        found[KIND] = found.pop("part")
    return found


def read_origin(folder: Path) -> dict:
    """What the ``dpa.json`` of a folder says that :func:`save_component` wrote.

    Raises:
        DPAError: the folder or its record is missing or broken.
    """
    advice = f"Run the stage that writes it first: DPA_STAGE={folder.parent.name}."
    if not (found := read_provenance(folder, advice)):
        raise DPAError(f"{folder} was not written by a stage of DPA. {advice}")
    return found


def refuse_foreign(folder: Path, origin: dict, own: dict, what: str) -> None:
    """Refuse a component that was trained on another LLM or encoder.

    Args:
        folder: where the component lies, for the message.
        origin: its record.
        own: side -> this run's facts about it, ``{side: {"name": ..., "fingerprint": ...}}``.
        what: the fact to compare, ``architecture`` or ``fingerprint``.

    Raises:
        DPAError: they differ; both sides are named.
    """
    for side, facts in own.items():
        theirs = origin.get(side)
        if theirs is not None and theirs[what] != facts[what]:
            raise DPAError(
                f"{folder} belongs to another {side}: it was trained with "
                f"{theirs['name']} ({what} {_short(theirs[what])}), this run uses "
                f"{facts['name']} ({what} {_short(facts[what])}). Use the {side} it was trained "
                f"with, or another --work-dir."
            )


def _short(fact) -> str:
    return fact[:12] if isinstance(fact, str) else json.dumps(fact)
