"""Imports between the package's folders flow one way, as docs/architecture.md draws them."""

import ast
from pathlib import Path

import dpa_xtuner

PACKAGE = Path(dpa_xtuner.__file__).parent
# Folder -> the folders it may import, besides single files such as errors.py.
MAY_IMPORT = {
    "data": set(),
    "families": {"data"},
    "loss": {"data"},
    "model": {"families", "loss"},
    "stages": {"data", "families", "loss", "model"},
    "planning": {"data", "loss", "model", "stages"},
    "engine": {"data", "loss", "model", "planning", "stages"},
    "export": {"data", "model", "stages"},
    "analysis": {"data", "export", "families", "loss", "model", "stages"},
    "evaluation": {"model"},
    "chat": {"analysis", "data", "evaluation", "export", "loss"},
    "demo": {"evaluation", "model", "stages"},
}


def imported(file: Path) -> set[str]:
    """The parts of the package that a file imports, also those that only type checkers see."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dpa_xtuner.")}
    return found


def test_every_folder_imports_only_what_is_below_it():
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert folders == MAY_IMPORT.keys()
    for folder, allowed in MAY_IMPORT.items():
        for file in (PACKAGE / folder).rglob("*.py"):
            others = imported(file) & folders - {folder}
            assert others <= allowed, f"{file} imports {others - allowed}"


def test_no_single_file_but_the_plugin_imports_a_folder():
    for file in PACKAGE.glob("*.py"):
        if file.name != "plugin.py":
            assert not imported(file) & MAY_IMPORT.keys(), file
