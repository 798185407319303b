"""Exports a stage of a run to a folder that other programs can open."""

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
from dpa_xtuner.files import acquire_lock, read_json, whole_folder, write_json
from dpa_xtuner.layout import HF_FOLDER, PROVENANCE_FILE, TUNE
from dpa_xtuner.model_card import MODEL_CARD, write_card
from dpa_xtuner.precision import DTYPES
from dpa_xtuner.stages.components import LLM, PROJECTOR, VISUAL_ENCODER
from dpa_xtuner.versions import installed_versions

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
    """Export what a stage of a config's run has trained, unless the export is up to date.

    Args:
        config: a DPA config.
        stage: name of the stage.
        fmt: one of :data:`FORMATS`.
        out: target folder; None for ``<work dir>/<stage>/<format>``.
        checkpoint: a .pth file or DeepSpeed folder of the stage, in place of what it wrote.
        dtype: dtype of the weights: bfloat16, float16 or float32; None for the stage's own.
        work_dir: work dir of the run; None for ``work_dirs/<config's name>``.
        options: settings as in ``--cfg-options``.

    Returns:
        The folder, links resolved. Its ``dpa.json`` says what it was made from. A second call with
        the same inputs, format and dtype does nothing.

    Raises:
        DPAError: there is nothing to export, the format can't hold it, the folder is not an
            earlier export, holds other files too, or another process is writing it.
    """
    for name, value, known in (("format", fmt, FORMATS), ("dtype", dtype, _DTYPES)):
        if value is not None and value not in known:
            hint = nearest(value, known) or "."
            raise DPAError(f"--{name} {value!r} is not known{hint} Known: {', '.join(known)}.")
    source = read_source(config, stage, work_dir, checkpoint, options)
    dtype = dtype or str(source.run.precision.dtype).removeprefix("torch.")
    out = (out or source.run.work_dir / stage / fmt).resolve()
    refuse_inexpressible(source, fmt)
    if fmt == LLM and _is_written(source, out):
        print_log(f"{out}, which stage {stage} wrote, is already that folder", "current")
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
    for line in _messages(source, fmt, out, about):
        print_log(line, "current")
    return out


def _write(
    source: Source, fmt: str, dtype: str, out: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    with torch.no_grad(), whole_folder(out) as partial:
        about = _WRITERS[fmt](StageWeights(source, _DTYPES[dtype]), partial)
        known = {"run": str(source.run.work_dir.resolve()), "files": _file_sizes(partial)}
        known["versions"] = installed_versions()
        trained = source.stage_provenance
        known["training"] = {key: trained.get(key) for key in ("data", "settings", "seed")}
        write_json(partial / PROVENANCE_FILE, provenance | about | known)
        if fmt == HF_FOLDER:
            write_card(partial)
    return about


def _provenance(source: Source, fmt: str, dtype: str) -> dict[str, Any]:
    found = {"format": fmt, "dtype": dtype, "dpa_xtuner": dpa_xtuner.__version__}
    found |= source.export_provenance()
    return json.loads(json.dumps(found))  # as JSON reads it back: no tuples


def _file_sizes(folder: Path) -> dict[str, int]:
    """Measure each file but ``dpa.json`` and the card, which an evaluation rewrites; in bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name not in (PROVENANCE_FILE, MODEL_CARD)}


def _earlier_export(out: Path) -> dict[str, Any]:
    """Read the ``dpa.json`` of an earlier export; return an empty dict if there is none."""
    found = read_json(out / PROVENANCE_FILE, f"Remove {out}, or choose another folder with -o.")
    return found if {"format", "stage"} <= found.keys() else {}


def _is_fresh(out: Path, provenance: dict[str, Any]) -> bool:
    """Tell whether a folder has this provenance and still has all files of the export."""
    earlier = _earlier_export(out)
    if not earlier or any(earlier.get(key) != provenance[key] for key in provenance):
        return False
    return "files" in earlier and earlier["files"].items() <= _file_sizes(out).items()


def _is_written(source: Source, out: Path) -> bool:
    """Tell whether a folder is the LLM that the stage itself wrote, tokenizer included."""
    written = source.written(LLM)
    is_there = written is not None and written.resolve() == out
    return is_there and (out / "tokenizer_config.json").is_file()


def _refuse_to_replace(out: Path, source: Source) -> None:
    """Refuse a folder unless it is an earlier export of the same run and stage, without more."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    earlier = _earlier_export(out)
    if not earlier:
        raise DPAError(
            f"{out} exists, but is not an earlier export. Remove it, or choose another folder with "
            f"-o."
        )
    run = source.run.work_dir.resolve()
    # If a run was moved, the exports inside it moved along.
    same_run = earlier.get("run") == str(run) or out.is_relative_to(run)
    if not same_run or earlier["stage"] != source.stage.name:
        raise DPAError(
            f"{out} is an export of stage {earlier['stage']} of {earlier.get('run', 'a run')}, not "
            f"of stage {source.stage.name} of {run}. Remove it, or choose another folder with -o."
        )
    # Exports of the first version list no files.
    if others := sorted(_file_sizes(out).keys() - earlier.get("files", _file_sizes(out)).keys()):
        raise DPAError(
            f"{out} holds files that don't belong to the export and would be lost: "
            f"{', '.join(others[:5])}{', ...' * (len(others) > 5)}. Move them away, or choose "
            f"another folder with -o."
        )


def _messages(source: Source, fmt: str, out: Path, about: dict[str, Any]) -> list[str]:
    lines = [f"Wrote {out}"]
    if fmt == "hf" and source.stage_settings.pad_image_to_square:
        lines.append(
            "Images were padded to a square in training. Newer versions of transformers do so by "
            "themselves; on 4.48, pad them as README.md in the folder shows"
        )
    if fmt == "xtuner" and not source.stage_settings.pad_image_to_square:
        lines.append(
            "Images were not padded to a square in training, but xtuner chat pads every image: "
            "only square images are seen as in training"
        )
    if about.get("template_differs"):
        prompter = "xtuner chat" if fmt == "xtuner" else "the exported chat template"
        listed = ", ".join(about["template_differs"])
        lines.append(
            f"With {prompter}, these prompts don't have the tokens of training: {listed}. It "
            f"tokenises the prompt template in another way, or can't express all of it"
        )
    if "llm_adapter_on" in about:
        lines.append(f"Load llm_adapter on {about['llm_adapter_on']}, not on the LLM alone")
    if fmt == LLM and (projector := source.written(PROJECTOR)):
        options = f"llm_name_or_path={out} tune.init_projector={projector.resolve()}"
        if encoder := source.written(VISUAL_ENCODER):
            options += f" {VISUAL_ENCODER.setting}={encoder.resolve()}"
        lines.append(f"Tune it further: --cfg-options {options}")
    if "command" in about:
        lines.append(f"Open it: {about['command'].replace('FOLDER', shlex.quote(str(out)))}")
    return lines
