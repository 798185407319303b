"""Runs OpenCompass's tasks for models and data sets, in a folder in which a rerun continues.

The names of answers and scores hold a ``cache_key``, so none comes from a stale cache.
"""

import gc
import itertools
import json
import os
import sys
import traceback
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from dpa_xtuner.files import acquire_lock, write_text

RUN = "results"
"""OpenCompass's folder below the work dir."""

PARTS = 8
"""Parts that a data set is cut into for several GPUs. The number is fixed, since parts of different
cuts can't be joined."""

ModelAndData = tuple[str, str]
"""OpenCompass's names (``abbr``) of a model and of a data set."""

_LOADED: dict[str, Any] = {}  # the one model that this process holds, by its abbr


def run(
    models: list[dict], data_sets: list[dict], work_dir: Path, workers: int = 1, fresh: bool = False
) -> dict[ModelAndData, dict | str]:
    """Answer and score what is missing.

    Args:
        models: OpenCompass's configs of models; each ``abbr`` holds a cache key.
        data_sets: OpenCompass's configs of data sets, likewise.
        work_dir: folder of all files, for one evaluation at a time.
        workers: processes that answer at a time, each on its own GPU; 1 for this process alone.
        fresh: whether to answer and score again.

    Returns:
        For each pair the evaluator's result, or the log file and the error.

    Raises:
        DPAError: another evaluation is writing to the work dir.
    """
    folder = work_dir.resolve() / RUN
    pairs = {(m["abbr"], d["abbr"]): (m, d) for m in models for d in data_sets}
    lock = acquire_lock(
        work_dir / ".lock",
        f"Another evaluation is writing to {work_dir}: wait for it, or give --work-dir.",
    )
    try:
        for pair in pairs:
            _clean_up(folder, pair, fresh)
        missing = {pair: both for pair, both in pairs.items() if _result(folder, pair) is None}
        errors = _answer_in_parts(missing, folder, workers) if workers > 1 else {}
        for pair, both in missing.items():
            errors[pair] = (
                errors.get(pair, "")
                or (workers == 1 and answer(*both, folder))
                or _logged("OpenICLEvalTask", *both, folder)
            )
    finally:
        _LOADED.clear()
        lock.release()
    return {pair: _result(folder, pair) or errors[pair] for pair in pairs}


def answer(model: dict, data_set: dict, folder: Path) -> str:
    """Let a model answer a data set; the model stays loaded for the next one.

    Returns:
        The log file and the error, or nothing.
    """
    if model["abbr"] not in _LOADED:
        _LOADED.clear()  # never two models in memory
        gc.collect()
    return _logged("OpenICLInferTask", model, data_set, folder)


def _logged(name: str, model: dict, data_set: dict, folder: Path) -> str:
    """Run a task of OpenCompass; its error goes to a log file and does not stop the run."""
    log = folder / "logs" / model["abbr"] / f"{data_set['abbr']}.out"
    log.unlink(missing_ok=True)
    try:
        _run_task(name, model, data_set, folder)
    except Exception as error:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        print(f"{model['abbr']}, {data_set['abbr']}: {last}, see {log}", file=sys.stderr)
        return f"{log} ({last[:300]})"
    return ""


def _run_task(name: str, model: dict, data_set: dict, folder: Path) -> None:
    from mmengine.config import Config
    from opencompass import tasks

    details = {"runner": {"task": {"dump_details": True}}}
    config = {"models": [model], "datasets": [[data_set]], "work_dir": str(folder), "eval": details}
    task = getattr(tasks, name)(Config(config))
    if name == "OpenICLEvalTask":
        return task.run()
    # Without this, OpenCompass creates a folder in the current one.
    task.dataset_cfgs[0][0]["infer_cfg"]["inferencer"]["output_json_filepath"] = str(folder)
    task.run(_LOADED.get(model["abbr"]), model["abbr"])
    _LOADED[model["abbr"]] = task.model


def _answer_in_parts(
    missing: dict[ModelAndData, tuple[dict, dict]], folder: Path, workers: int
) -> dict[ModelAndData, str]:
    """Cut data sets into parts, and let processes answer the missing ones."""
    errors: dict[ModelAndData, str] = {}
    pools = [
        ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (number, folder / "logs"))
        for number in range(workers)
    ]
    turns, asked = itertools.cycle(pools), []
    try:
        for pair, (model, data_set) in missing.items():
            for part in _parts(data_set, folder):
                if not (folder / "predictions" / pair[0] / f"{part['abbr']}.json").is_file():
                    asked.append((pair, next(turns).submit(answer, model, part, folder)))
        for pair, future in asked:
            try:
                error = future.result()
            except BrokenExecutor as broken:  # the process was killed
                error = f"{folder / 'logs'} ({broken})"
            errors[pair] = errors.get(pair) or error
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    return errors


def _parts(data_set: dict, folder: Path) -> list[dict]:
    from mmengine.config import ConfigDict
    from opencompass.partitioners import NumWorkerPartitioner

    cut = NumWorkerPartitioner(
        str(folder), num_split=PARTS, dataset_size_path=None, force_rebuild=True
    )
    with suppress(Exception):  # scoring reports what is wrong with the data set
        return cut.split_dataset(ConfigDict(data_set))
    return []


def _start_worker(number: int, logs: Path) -> None:
    """Use the GPU of this number, write to a log, and end when the parent is killed."""
    import torch

    Thread(target=_end_with_parent, daemon=True).start()
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (logs / f"worker_{number}.out").open("a", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.set_device(number)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)


def _result(folder: Path, pair: ModelAndData) -> dict | None:
    return _read(folder / "results" / pair[0] / f"{pair[1]}.json")


def _clean_up(folder: Path, pair: ModelAndData, fresh: bool) -> None:
    """Remove half-written files of a killed run, since OpenCompass trusts existing files.

    If no sample of a data set was answered, its files are removed too, since the fault is not in
    the samples. OpenCompass drops all answers of an unfinished data set if it can't read one line,
    such as the last one, or one with a line separator of Unicode: we keep the lines before it.
    """
    model, data_set = pair
    result, answers = (
        folder / "results" / model / f"{data_set}.json",
        folder / "predictions" / model,
    )
    files = [result, *answers.glob(f"{data_set}.json"), *answers.glob(f"{data_set}_[0-9]*.json")]
    unfinished = list(answers.glob(f"tmp_{data_set}*.jsonl"))
    found = _read(result)
    mute = found is not None and len(found["failed"]) == found["samples"]
    for file in [*files, *(unfinished if fresh else ())]:
        if fresh or mute or _read(file) is None:
            file.unlink(missing_ok=True)
    for file in [] if fresh else unfinished:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = itertools.takewhile(lambda line: line is not None, map(_parsed, lines))
        write_text(file, "".join(json.dumps(line) + "\n" for line in whole))


def _read(file: Path) -> dict | None:
    return _parsed(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None


def _parsed(text: str) -> dict | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
