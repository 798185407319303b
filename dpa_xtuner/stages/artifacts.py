"""The content of a stage's folder: its state file, its checkpoints, the components it wrote."""

import json
import re
from pathlib import Path

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json
from dpa_xtuner.layout import PROVENANCE_FILE, STATE_FILE

KIND = "component"
"""The key of ``dpa.json`` for the component that the folder holds."""


def read_state(folder: Path) -> dict:
    """Read the state file of a stage's folder; return an empty dict if the stage has not begun.

    Raises:
        DPAError: the file is broken.
    """
    advice = f"Restore it, or remove {folder} to train the stage again."
    return read_json(folder / STATE_FILE, advice)


def is_finished(folder: Path) -> bool:
    """Tell whether the stage of a folder is finished."""
    return read_state(folder).get("status") == "finished"


def newest_checkpoint(folder: Path) -> str | None:
    """Find the newest complete checkpoint of a stage.

    A checkpoint gets its name once all of it is on disk, so every named one is complete.
    """
    found = [(int(m[1]), str(path)) for path in folder.glob("iter_*.pth")
             if (m := re.fullmatch(r"iter_(\d+)\.pth", path.name))]  # fmt: skip
    return max(found)[1] if found else None


def trained_key(component: str) -> str:
    """Return the key of ``dpa.json`` for a component's fingerprint after its stage."""
    return f"trained_{component}"


def read_provenance(folder: Path, advice: str) -> dict:
    """Read the ``dpa.json`` of a folder; return an empty dict if there is none.

    Args:
        folder: written by a stage or an export.
        advice: what to do if the file is broken.

    Raises:
        DPAError: the file is broken.
    """
    found = read_json(folder / PROVENANCE_FILE, advice)
    if "part" in found:  # the name of the key in folders of older versions
        found[KIND] = found.pop("part")
    return found


def read_component_provenance(folder: Path) -> dict:
    """Read the ``dpa.json`` of a folder that a stage wrote (:meth:`Component.save`).

    Raises:
        DPAError: the folder or the file is missing or broken.
    """
    advice = f"Run the stage that writes it first: DPA_STAGE={folder.parent.name}."
    if not (found := read_provenance(folder, advice)):
        raise DPAError(f"{folder} was not written by a stage of DPA. {advice}")
    return found


def refuse_foreign(folder: Path, provenance: dict, ours: dict, key: str) -> None:
    """Refuse a component that was trained on another LLM or encoder.

    Args:
        folder: folder of the component, for the message.
        provenance: the content of its ``dpa.json``.
        ours: the published components of this run,
            ``{component: {"name": ..., "fingerprint": ...}}``.
        key: what to compare, ``architecture`` or ``fingerprint``.

    Raises:
        DPAError: they differ; the message names both.
    """
    for component, this in ours.items():
        other = provenance.get(component)
        if other is not None and other[key] != this[key]:
            raise DPAError(
                f"{folder} belongs to another {component}: it was trained with "
                f"{other['name']} ({key} {_short(other[key])}), this run uses "
                f"{this['name']} ({key} {_short(this[key])}). Use the {component} it was trained "
                f"with, or another --work-dir."
            )


def _short(value) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)
