"""Check all data of a config, without training."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS, DefaultScope

from dpa_xtuner.data import DataReport, DPADataset, check_dataset
from dpa_xtuner.data.figures import file_figures
from dpa_xtuner.data.problems import NothingUsableError, Problem, list_problems
from dpa_xtuner.data.sample_page import page
from dpa_xtuner.files import prepare_to_write, write_text
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import dataset_config
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import config_from_file


def check_config(
    path: Path,
    options: dict | None,
    sample: int | None,
    report: Path | None = None,
    html: Path | None = None,
) -> bool:
    """Check the data of ``align`` and ``tune``, and print a report on each.

    ``proxy`` reads the captions of ``align``.

    Args:
        path: a DPA config.
        options: settings as in ``--cfg-options``.
        sample: number of samples whose images are opened; None opens all.
        report: JSON lines to write, one for each problem; None writes none.
        html: page to write that shows samples; None writes none.

    Returns:
        Whether all data can be used.

    Raises:
        DPAError: settings, models or data files can't be read, or no record can be used.
    """
    for file in filter(None, (report, html)):
        prepare_to_write(file)
    run = Run.of(config_from_file(path, options), Precision("fp32"))  # no weight is loaded
    ok, lines = True, []
    datasets: dict[str, DPADataset] = {}
    for name, stage in run.stages.items():
        if not stage.sees_pictures:
            continue
        print(f"\nStage {name}")
        everything = dict(skip_limit=1.0, held_out=0, share=1.0, weights=None)
        try:
            with DefaultScope.overwrite_default_scope("mmengine"):
                built = DATASETS.build(dataset_config(run, stage) | everything)
        except NothingUsableError as error:
            print(error)
            ok = False
            lines += _lines(name, error.problems, error.files)
            continue
        found = check_dataset(built, sample=sample)
        _print_found(built, found, run.tokenizer)
        ok = ok and found.ok
        lines += _lines(name, found.problems, built.files)
        datasets[f"Stage {name}"] = built
    if report is not None:
        write_text(report, "".join(f"{line}\n" for line in lines))
        print(f"\nWrote {len(lines)} problems to {report}")
    if html is not None:
        write_text(html, page(datasets, run.tokenizer))
        print(f"\nWrote samples as the model sees them to {html}")
    return ok


def _print_found(built: DPADataset, found: DataReport, tokenizer: Any) -> None:
    """Print the figures of each file, and the problems: of a mixture, file by file."""
    for figures in file_figures(built, tokenizer):
        print(figures)
        inside = [p for p in found.problems if p.record_id.startswith(f"{figures.file}: ")]
        if len(built.files) > 1 and inside:
            listed = list_problems(_bare(problem, [figures.file]) for problem in inside)
            print(f"{len(inside):>8}  problems:\n{listed}")
    if len(built.files) == 1:
        print(found)
    else:
        print(f"{len(found.problems)} problems in all; the images of {found.checked} of "
              f"{found.samples} samples were opened")  # fmt: skip


def _bare(problem: Problem, files: Sequence[str | Path]) -> Problem:
    """Take the file off a record's id: a mixture's records are "file: id"."""
    named = (f"{file}: " for file in files)
    prefix = next((name for name in named if problem.record_id.startswith(name)), "")
    return replace(problem, record_id=problem.record_id.removeprefix(prefix))


def _lines(stage: str, problems: list[Problem], files: Sequence[str | Path]) -> list[str]:
    """Return the report's line for each problem of a stage."""
    return [
        json.dumps(
            {
                "stage": stage,
                "file": problem.file,
                "record": problem.place,
                "id": _bare(problem, files).record_id,
                "reason": problem.reason,
            }
        )
        for problem in problems
    ]
