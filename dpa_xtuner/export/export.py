"""One command: from a config's run to a folder that other programs open."""

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log

import dpa_xtuner
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.export.folders import write_parts, write_xtuner
from dpa_xtuner.export.hf import write_hf
from dpa_xtuner.export.refusals import FORMATS, refuse_inexpressible
from dpa_xtuner.export.source import Source, read_source
from dpa_xtuner.export.weights import Weights
from dpa_xtuner.files import whole_folder, write_json
from dpa_xtuner.stages.artifacts import ORIGIN

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
_WRITERS = {"hf": write_hf, "xtuner": write_xtuner, "parts": write_parts}


def export_config(
    config: Path,
    stage: str = "tune",
    fmt: str = "hf",
    out: Path | None = None,
    checkpoint: Path | None = None,
    dtype: str = "bfloat16",
    work_dir: Path | None = None,
    options: dict | None = None,
) -> Path:
    """Export what a stage of a config's run has trained, unless that is there already.

    Args:
        config: a DPA config.
        stage: its stage.
        fmt: one of :data:`FORMATS`.
        out: where to; ``<work dir>/<stage>/<format>`` where it is None.
        checkpoint: a .pth file or DeepSpeed folder of the stage, in place of what it wrote.
        dtype: of the weights: bfloat16, float16 or float32.
        work_dir: of the run; ``work_dirs/<config's name>`` where it is None.
        options: as of ``--cfg-options``.

    Returns:
        The folder. Its ``dpa.json`` says what it was made from; while that is so, and for the
        same format and dtype, a second call finds it and does nothing.

    Raises:
        DPAError: there is nothing to export, the format can't hold it, or the folder is
            somebody else's.
    """
    for name, value, known in (("format", fmt, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in known:
            hint = nearest(value, known) or "."
            raise DPAError(f"--{name} {value!r} is not known{hint} Known: {', '.join(known)}.")
    source = read_source(config, stage, work_dir, checkpoint, options)
    out = out or source.base / stage / fmt
    record = _existing(out)
    refuse_inexpressible(source, fmt)
    made_from = _made_from(source, fmt, dtype)
    if record is not None and all(record.get(key) == made_from[key] for key in made_from):
        print_log(f"{out} is up to date", "current")
        return out
    with torch.no_grad(), whole_folder(out) as partial:
        about = _WRITERS[fmt](source, Weights(source), partial, DTYPES[dtype])
        write_json(partial / ORIGIN, {"config": str(config), **made_from, **about})
    for line in _told(source, fmt, out, about):
        print_log(line, "current")
    return out


def _made_from(source: Source, fmt: str, dtype: str) -> dict[str, Any]:
    facts = {"format": fmt, "dtype": dtype, "dpa_xtuner": dpa_xtuner.__version__}
    return json.loads(json.dumps(facts | source.facts()))  # as it is read back: no tuples


def _existing(out: Path) -> dict | None:
    """The record of what was exported to a folder before; None where there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if "format" not in record:
        raise DPAError(f"{out} exists, and is no earlier export. Choose another folder with -o.")
    return record


def _told(source: Source, fmt: str, out: Path, about: dict[str, Any]) -> list[str]:
    lines = [f"Wrote {out}"]
    if fmt == "hf" and source.own.pad_image_to_square:
        lines.append(
            "Images were padded to a square in training, which no image processor of transformers "
            "4.48 does: pad them in the mean colour first (tools/eval.py does)"
        )
    if about.get("template_differs"):
        listed = ", ".join(about["template_differs"])
        lines.append(
            f"Not as in training: {listed}. The prompt template was tokenised piece by piece, "
            f"which one text can't give with this tokenizer"
        )
    if "command" in about:
        lines.append(f"Open it: {about['command'].replace('FOLDER', str(out))}")
    return lines
