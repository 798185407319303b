"""Writes the table of all settings: ``python -m dpa_xtuner.stages.settings_table``."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dpa_xtuner import tables
from dpa_xtuner.stages.settings import Settings, declaration, settings_in

FILE = Path(__file__).parents[2] / "docs" / "settings.md"
"""The file of the table."""

_TOP = """# Settings

Written by `python -m dpa_xtuner.stages.settings_table` from `dpa_xtuner/stages/settings.py`.

Set a setting in a config, or on the command line: `--cfg-options align.lr=1e-3`. Settings without
a default here get their value from [`configs/_base_/dpa.py`](../configs/_base_/dpa.py).

The column *changes* says what the setting affects, and so when you may change it:

- `model`: the meaning of the trained weights. A stage that has begun keeps it; so must an export.
- `weights`: how they are trained. A stage that has begun keeps it.
- `speed`: a stage that resumes from a checkpoint keeps it.
- `nothing`: you may change it at any time.
"""


def settings_table() -> str:
    """Write the content of :data:`FILE`."""
    columns = ["setting", "type", "default", "changes", "what it is"]
    return f"{_TOP}\n{tables.markdown(columns, list(_rows(Settings)), numbers=False)}\n"


def _rows(owner: type[BaseModel], prefix: str = "") -> Iterator[list[str]]:
    for name, field in owner.model_fields.items():
        if (inner := settings_in(field.annotation)) is not None:
            yield from _rows(inner, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f"`{field.default}`"
        changes = declaration(field)["changes"]
        kind = _type(field.annotation)
        yield [f"`{prefix}{name}`", kind, default, changes, str(field.description)]


def _type(kind: Any) -> str:
    """Write a type as people do: ``'full' or 'lora'``, ``str or list of str``."""
    inner = get_args(kind)
    if get_origin(kind) is Annotated:
        return _type(inner[0])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_type, inner))
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value!r}`" for value in inner)
    if get_origin(kind) is list:
        return f"list of {_type(inner[0])}"
    return {int: "whole number", float: "number", NoneType: "None"}.get(kind) or (
        get_origin(kind) or kind
    ).__name__


if __name__ == "__main__":
    FILE.write_text(settings_table(), encoding="utf-8")
