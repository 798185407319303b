"""One command: from a config's run to a folder that other programs open."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log

import dpa_xtuner
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.export.folders import write_llm, write_parts, write_xtuner
from dpa_xtuner.export.hf import write_hf
from dpa_xtuner.export.refusals import FORMATS, refuse_inexpressible
from dpa_xtuner.export.source import Source, read_source
from dpa_xtuner.export.weights import StageWeights
from dpa_xtuner.files import acquire_lock, whole_folder, write_json
from dpa_xtuner.model.components import LLM, PROJECTOR, VISUAL_ENCODER
from dpa_xtuner.precision import DTYPES
from dpa_xtuner.stages.artifacts import ORIGIN
from dpa_xtuner.stages.table import TUNE

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_WRITERS = {"hf": write_hf, "xtuner": write_xtuner, "parts": write_parts, LLM: write_llm}


def export_config(
    config: Path,
    stage: str = TUNE,
    fmt: str = "hf",
    out: Path | None = None,
    checkpoint: Path | None = None,
    dtype: str | None = None,
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
        dtype: of the weights: bfloat16, float16 or float32; what the stage computed in where it
            is None.
        work_dir: of the run; ``work_dirs/<config's name>`` where it is None.
        options: as of ``--cfg-options``.

    Returns:
        The folder, links resolved. Its ``dpa.json`` says what it was made from; while that is
        so, and for the same format and dtype, a second call finds it and does nothing.

    Raises:
        DPAError: there is nothing to export, the format can't hold it, or the folder is
            somebody else's, holds other files too, or is being written by another process.
    """
    for name, value, known in (("format", fmt, FORMATS), ("dtype", dtype, _DTYPES)):
        if value is not None and value not in known:
            hint = nearest(value, known) or "."
            raise DPAError(f"--{name} {value!r} is not known{hint} Known: {', '.join(known)}.")
    source = read_source(config, stage, work_dir, checkpoint, options)
    dtype = dtype or str(source.precision.dtype).removeprefix("torch.")
    out = (out or source.base / stage / fmt).resolve()
    refuse_inexpressible(source, fmt)
    if fmt == LLM and _is_written(source, out):
        print_log(f"{out}, which stage {stage} wrote, is that folder", "current")
        return out
    provenance = _provenance(source, fmt, dtype)
    if _is_fresh(out, provenance):
        print_log(f"{out} is up to date", "current")
        return out
    lock = acquire_lock(
        out.with_name(f".{out.name}.lock"),
        f"Another export is writing {out}. Wait for it, or export to another folder with -o.",
    )
    try:
        _refuse_to_replace(out, source)
        about = _write(source, fmt, dtype, out, {"config": str(config), **provenance})
    finally:
        lock.release()
    for line in _told(source, fmt, out, about):
        print_log(line, "current")
    return out


def _write(
    source: Source, fmt: str, dtype: str, out: Path, record: dict[str, Any]
) -> dict[str, Any]:
    with torch.no_grad(), whole_folder(out) as partial:
        about = _WRITERS[fmt](source, StageWeights(source), partial, _DTYPES[dtype])
        known = {"run": str(source.base.resolve()), "files": _sizes(partial)}
        write_json(partial / ORIGIN, record | about | known)
    return about


def _provenance(source: Source, fmt: str, dtype: str) -> dict[str, Any]:
    found = {"format": fmt, "dtype": dtype, "dpa_xtuner": dpa_xtuner.__version__}
    return json.loads(json.dumps(found | source.provenance()))  # as it is read back: no tuples


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file but the record itself."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    sizes.pop(ORIGIN, None)
    return sizes


def _record(out: Path) -> dict[str, Any]:
    """What an earlier export says of itself; empty where there is none."""
    try:
        record = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and {"format", "stage"} <= record.keys() else {}


def _is_fresh(out: Path, provenance: dict[str, Any]) -> bool:
    """Whether a folder was made from the same, and all that was written is still there."""
    record = _record(out)
    if not record or any(record.get(key) != provenance[key] for key in provenance):
        return False
    return "files" in record and record["files"].items() <= _sizes(out).items()


def _is_written(source: Source, out: Path) -> bool:
    """Whether a folder is the LLM that the stage itself wrote, tokenizer included."""
    written = source.written(LLM)
    is_there = written is not None and written.resolve() == out
    return is_there and (out / "tokenizer_config.json").is_file()


def _refuse_to_replace(out: Path, source: Source) -> None:
    """Refuse a folder that is not an earlier export of the same stage, and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    record = _record(out)
    if not record:
        raise DPAError(
            f"{out} exists, and is no earlier export. Remove it, or choose another folder with -o."
        )
    run = source.base.resolve()
    # A run that was moved takes the exports inside it along.
    same_run = record.get("run") == str(run) or out.is_relative_to(run)
    if not same_run or record["stage"] != source.stage.name:
        raise DPAError(
            f"{out} is an export of stage {record['stage']} of {record.get('run', 'a run')}, not "
            f"of stage {source.stage.name} of {run}. Remove it, or choose another folder with -o."
        )
    # The first version's exports list no files.
    if others := sorted(_sizes(out).keys() - record.get("files", _sizes(out)).keys()):
        raise DPAError(
            f"{out} holds files that are not of the export, and would be lost: "
            f"{', '.join(others[:5])}{', ...' * (len(others) > 5)}. Move them away, or choose "
            f"another folder with -o."
        )


def _told(source: Source, fmt: str, out: Path, about: dict[str, Any]) -> list[str]:
    lines = [f"Wrote {out}"]
    if fmt == "hf" and source.stage_settings.pad_image_to_square:
        lines.append(
            "Images were padded to a square in training, which no image processor of transformers "
            "4.48 does: pad them in the mean colour first (padded in dpa_xtuner/pictures.py)"
        )
    if fmt == "xtuner" and not source.stage_settings.pad_image_to_square:
        lines.append(
            "Images were not padded to a square in training, and xtuner chat pads every image: "
            "only square ones are seen as in training"
        )
    if about.get("template_differs"):
        asker = "xtuner chat" if fmt == "xtuner" else "the exported chat template"
        listed = ", ".join(about["template_differs"])
        lines.append(
            f"Not the tokens of training, as {asker} asks: {listed}. The prompt template was "
            f"tokenised in another way, or can't be said in full"
        )
    if "llm_adapter_on" in about:
        lines.append(f"llm_adapter belongs on {about['llm_adapter_on']}, not on the LLM alone")
    if fmt == LLM and (projector := source.written(PROJECTOR)):
        options = f"llm_name_or_path={out} tune.init_projector={projector.resolve()}"
        if encoder := source.written(VISUAL_ENCODER):
            options += f" {VISUAL_ENCODER.setting}={encoder.resolve()}"
        lines.append(f"Tune it further: --cfg-options {options}")
    if "command" in about:
        lines.append(f"Open it: {about['command'].replace('FOLDER', shlex.quote(str(out)))}")
    return lines
