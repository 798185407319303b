"""Many runs of one config: plan them, note how far each is, and tabulate what they measured."""

import csv
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from dpa_xtuner import tables
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import read_json, write_json, write_text
from dpa_xtuner.layout import STAGE_NAMES
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.stages.settings import Settings, config_from_file

STATE_FILE = "sweep.json"
"""In a sweep's folder: name of each run -> its settings, config and status."""

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: name of its folder, made of its settings.
        options: dotted setting -> value, as text for ``--cfg-options``.
        config: SHA-256 of the complete config with these settings.
        refused: why it can't be run; empty if it can.
    """

    name: str
    options: dict[str, str]
    config: str
    refused: str


def grid(axes: list[str]) -> list[dict[str, str]]:
    """Combine all values of axes such as ``["method=vanilla,dpa", "proxy.lora.r=64,256"]``.

    Raises:
        DPAError: an axis does not have this form.
    """
    values = []
    for axis in axes:
        key, equals, listed = axis.partition("=")
        if not equals or not key or not listed:
            raise DPAError(f"--grid {axis!r}: expected SETTING=VALUE,VALUE,...")
        # A comma in brackets is part of a value.
        values.append([(key, value) for value in re.split(r",(?![^\[(]*[\])])", listed)])
    return [dict(combination) for combination in itertools.product(*values)]


def read_list(path: str) -> list[dict[str, str]]:
    """Read ``runs`` from a YAML, JSON or Python file: a list of dicts, dotted setting -> value.

    Raises:
        DPAError: the file is missing, or does not have such a list.
    """
    try:
        runs = Config.fromfile(path).get("runs")
    except (OSError, ValueError) as error:
        raise DPAError(f"--list {path}: {error}") from None
    is_list = isinstance(runs, list) and all(isinstance(run, dict) for run in runs)
    if not is_list or any(isinstance(v, dict) for run in runs for v in run.values()):
        raise DPAError(
            f"--list {path} has no 'runs', a list of settings with a value each, such as\n"
            f"runs:\n  - {{method: vanilla}}\n  - {{method: dpa, proxy.lora.r: 64}}"
        )
    return [{key: str(value) for key, value in dict.items(run)} for run in runs]


def plan(config: Path, wanted: list[dict[str, str]], common: dict[str, str]) -> list[Run]:
    """List the runs of a sweep, without duplicates.

    Settings that a run's method does not read are left out. In a grid over methods and the proxy's
    ranks, each method without a proxy is therefore run once.

    Args:
        config: a DPA config.
        wanted: the settings of each run.
        common: settings that all runs share.
    """
    runs: dict[str, Run] = {}
    for options in wanted:
        refused = ""
        try:
            unused = tuple(Settings.from_config(_merged(config, common | options)).unused_settings)
            options = {k: v for k, v in options.items() if not k.startswith(unused)}
        except DPAError as error:
            refused = str(error)
        content = "" if refused else _merged(config, common | options).dump()
        digest = hashlib.sha256(content.encode()).hexdigest()
        runs.setdefault(_name(options), Run(_name(options), options, digest, refused))
    return list(runs.values())


def _merged(config: Path, options: dict[str, str]) -> Config:
    parsed = {key: DictAction._parse_iterable(v) for key, v in options.items()}
    return config_from_file(config, parsed)


def _name(options: dict[str, str]) -> str:
    whole = ",".join(f"{key}={value}" for key, value in options.items()) or "as_it_is"
    safe = re.sub(r"[^\w.=,+-]", "_", whole)
    if safe == whole and len(whole) <= _LONGEST_NAME:
        return whole
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def read_runs(work_dir: Path) -> dict[str, dict]:
    """Read what a sweep's folder says of its runs; empty if there is no sweep in it.

    Raises:
        DPAError: the file is broken.
    """
    advice = "Remove it: finished runs are then looked at again, which takes seconds each."
    return read_json(work_dir / STATE_FILE, advice)


def write_status(work_dir: Path, run: Run, status: str) -> None:
    """Write down how far a run is.

    Args:
        work_dir: folder of the sweep.
        run: one of its runs.
        status: ``running``, ``finished``, ``stopped``, ``failed (...)`` or ``refused``.
    """
    runs = read_runs(work_dir)
    runs[run.name] = {"options": run.options, "config": run.config, "status": status}
    work_dir.mkdir(parents=True, exist_ok=True)
    write_json(work_dir / STATE_FILE, runs)


def is_finished(work_dir: Path, run: Run) -> bool:
    """Tell whether a run has finished with its present config."""
    known = read_runs(work_dir).get(run.name, {})
    return known.get("status") == "finished" and known.get("config") == run.config


def rows(work_dir: Path, suffix: str = "") -> list[dict[str, Any]]:
    """Collect the settings that differ, the status and the numbers of each run.

    The numbers are the held-out captions' cross entropy (``original``, ``floor``, ``align``), the
    last logged cross entropy of each stage, and the numbers of the run's ``scores.json`` files.

    Args:
        work_dir: folder of the sweep.
        suffix: end of the runs' folder names; ``-rehearsal`` for rehearsed runs.
    """
    runs = read_runs(work_dir)
    keys = list(dict.fromkeys(key for run in runs.values() for key in run["options"]))
    differ = [key for key in keys if len({run["options"].get(key) for run in runs.values()}) > 1]
    found = []
    for name, run in runs.items():
        settings = {key: run["options"].get(key) for key in differ} or {"run": name}
        folder = work_dir / f"{name}{suffix}"
        found.append(settings | {"status": run["status"]} | _numbers(folder))
    return found


def _numbers(folder: Path) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for stage in STAGE_NAMES:
        numbers |= read_state(folder / stage).get("measured", {})
    for stage in STAGE_NAMES:
        if (last := _last_logged(folder / stage, "cross_entropy")) is not None:
            numbers[f"{stage} cross_entropy"] = last
    for file in sorted(folder.rglob("scores.json")):
        numbers |= _leaves(json.loads(file.read_text(encoding="utf-8")))
    return numbers


def _last_logged(folder: Path, key: str) -> float | None:
    last = (-1, None)
    for file in folder.glob("*/vis_data/scalars.json"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                logged = json.loads(line)
            except json.JSONDecodeError:  # a killed run did not complete its last line
                continue
            if key in logged:
                last = max(last, (logged["step"], logged[key]))
    return last[1]


def _leaves(scores: dict, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def save_table(work_dir: Path, suffix: str = "") -> str:
    """Write :func:`rows` to ``sweep.md`` and ``sweep.csv``, and return the Markdown."""
    found = rows(work_dir, suffix)
    columns = list(dict.fromkeys(key for row in found for key in row))
    text = [[_cell(row.get(column)) for column in columns] for row in found]
    markdown = tables.markdown(columns, text, numbers=False)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(work_dir / "sweep.md", markdown + "\n")
    write_text(work_dir / "sweep.csv", out.getvalue())
    return markdown


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
