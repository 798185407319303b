"""What a stage writes for the next: whole folders, each with a record of where it came from."""

import json
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from torch import nn

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder, write_json
from dpa_xtuner.layout import PROVENANCE_FILE as ORIGIN
from dpa_xtuner.stages.components import Component

KIND = "part"
"""The record's key for the component that the folder holds."""


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
        write_json(partial / ORIGIN, {KIND: component, **origin, "shapes": shapes})


def read_origin(folder: Path) -> dict:
    """The record in a folder that :func:`save_component` wrote.

    Raises:
        DPAError: the folder or its record is missing or broken.
    """
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DPAError(
            f"{folder} was not written by a stage of DPA: its {ORIGIN} can't be read ({error}). "
            f"Run the stage that writes it first: DPA_STAGE={folder.parent.name}."
        ) from None


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
