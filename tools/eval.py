"""Evaluate models on the paper's benchmarks, through OpenCompass and VLMEvalKit.

    python tools/eval.py dpa_internlm2_7b path/to/another_llava --benchmarks mmbench mmvp

A model is a config (path or name), whose finished run is exported first, or the folder of a Hugging
Face LLaVA. The table is printed and saved in the work dir as table.md, .csv and .json, with
differences to the first model. Run the same command again to continue after an interruption.

    python tools/eval.py dpa_internlm2_7b --benchmarks text

asks the original LLM, the proxy and the tuned LLM text-only questions; the table is text.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from _configs import find_run, parser_of, whole

from dpa_xtuner.errors import DPAError, check_installed, cli_errors
from dpa_xtuner.layout import HF_FOLDER, TUNE

if TYPE_CHECKING:
    from dpa_xtuner.evaluation.evaluate import Options

EXPORT = Path(__file__).with_name("export.py")


def main() -> int:
    """Evaluate; exit code 1 if a task failed or there was nothing to evaluate."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="config or LLaVA folder; for text also an LLM's folder")  # fmt: skip
    add("--benchmarks", nargs="+", default=["all"], metavar="NAME",
        help="mmbench ai2d docvqa ocrbench cvbench mmvp naturalbench, or all (default); text-only: "
        "mmlu arc boolq gsm8k arc_likelihood hellaswag piqa, or text")  # fmt: skip
    add("--data", type=Path, default=os.environ.get("LMUData", "data/benchmarks"),  # noqa: SIM112
        help="folder of the benchmarks' files (tools/get_benchmarks.py); default: $LMUData or "
        "data/benchmarks")  # fmt: skip
    add(
        "--ignore-md5",
        action="store_true",
        help="also evaluate files that are not the published ones; the table names them",
    )
    add("--limit", type=whole(1), metavar="N",
        help="questions or groups of each data set, evenly spread (text-only: the first); default: "
        "all")  # fmt: skip
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs that answer at a time; default: one, or the CPU if there is none",
    )
    add("--batch-size", type=whole(1), default=8, metavar="B", help="default: 8")
    add("--fresh", action="store_true", help="ask all questions again")
    add("--show", type=whole(1), metavar="N",
        help="draw N wrong answers of each data set to wrong_answers.html; of text-only ones to "
        "wrong_answers_text.html")  # fmt: skip
    add("--work-dir", type=Path, default="work_dirs/eval", help="default: work_dirs/eval")
    add("--import", nargs="+", default=[], metavar="MODULE", dest="modules",
        help="Python modules that register further benchmarks "
        "(dpa_xtuner.evaluation.benchmarks.register_benchmark)")  # fmt: skip
    with cli_errors():
        return _evaluate(parser.parse_args())


def _evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate on pictures, then on text alone, which has its own table."""
    from dpa_xtuner.evaluation import text_benchmarks as text
    from dpa_xtuner.evaluation.benchmarks import find_benchmarks
    from dpa_xtuner.evaluation.evaluate import Options

    for module in arguments.modules:
        _import(module)
    texts, names = text.split_names(arguments.benchmarks)
    benchmarks = find_benchmarks(names, also=("text", *text.TEXT_BENCHMARKS))
    expected = "the folder of a Hugging Face LLaVA, or a config's file or name"
    models = [find_run(name, expected) for name in arguments.models]
    check_installed("eval", "opencompass", "vlmeval")
    gpus = _gpus(arguments.gpus)
    there, left_out, other_files = _with_files([*benchmarks, *texts], arguments)
    for line in [*(f"Left out: {line}" for line in left_out), *other_files]:
        print(line, file=sys.stderr, flush=True)
    if not there:
        raise DPAError(f"--data {arguments.data} has no files of these benchmarks, see above.")
    options = Options(
        arguments.limit, gpus, arguments.batch_size, arguments.fresh, left_out, other_files
    )
    codes = [
        _evaluate_kind(kind, arguments, models, asked, options)
        for kind, chosen in (("visual", benchmarks), ("text", texts))
        if (asked := [benchmark for benchmark in chosen if benchmark in there])
    ]
    return max(codes)


def _evaluate_kind(
    kind: str, arguments: argparse.Namespace, models: list[Path], asked: list, options: Options
) -> int:
    """Evaluate on benchmarks of one kind, ``visual`` or ``text``; return the exit code.

    The table is saved and printed, and wrong answers are drawn. The code is 1 if something failed.
    """
    from dpa_xtuner.evaluation import show
    from dpa_xtuner.evaluation.evaluate import evaluate
    from dpa_xtuner.evaluation.report import save_beside_runs, save_report
    from dpa_xtuner.files import write_text

    of_kind = importlib.import_module(f"dpa_xtuner.evaluation.{kind}")
    folder, limit, table, suffix = arguments.work_dir, options.limit, "table", ""
    described = of_kind.models_of([_folder(model) for model in models], options)
    data_sets = {b: of_kind.data_sets_of(b, arguments.data, folder, limit) for b in asked}
    if kind == "text":
        options = replace(options, other_files=())  # only benchmarks with pictures have them
        table, suffix = "text", "_text"
    report, details = evaluate(described, data_sets, folder, options)
    if kind == "visual" and limit is None and not options.other_files:
        save_beside_runs(report)
    print(f"\n{save_report(report, folder, table)}\n{folder / f'{table}.md'}")
    if arguments.show:
        page = folder / f"wrong_answers{suffix}.html"
        write_text(page, show.page(details, arguments.show))
        print(page)
    for line in report.failures():
        print(f"dpa_xtuner: {line}", file=sys.stderr)
    return 1 if report.failures() else 0


def _import(module: str) -> None:
    """Import a module that registers benchmarks, also from the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, TypeError, ValueError):  # not a module name, or a parent fails to import
        found = None
    if found is None:
        raise DPAError(
            f"--import {module}: there is no such module. Give the name of a module on PYTHONPATH "
            f"or in the current folder, such as my_package.my_benchmarks."
        )
    try:
        importlib.import_module(module)
    except DPAError:
        raise
    except Exception as error:  # an error in the user's module
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise DPAError(
            f"--import {module}: {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno})"
        ) from error


def _with_files(
    benchmarks: list, arguments: argparse.Namespace
) -> tuple[list, list[str], list[str]]:
    """Return benchmarks whose files exist, missing files, and files with another md5."""
    missing = {benchmark: benchmark.missing(arguments.data) for benchmark in benchmarks}
    ignored = [m for found in missing.values() for m in found if m.md5 and arguments.ignore_md5]
    lacking = {b: [m for m in found if m not in ignored] for b, found in missing.items()}
    return (
        [benchmark for benchmark, found in lacking.items() if not found],
        [str(file) for found in lacking.values() for file in found],
        [
            f"{file.title}: {file.path} is not the published file (its md5 is {file.md5}, expected "
            f"{file.file.md5}); compare its scores only with those of the same file."
            for file in ignored
        ],
    )


def _gpus(wanted: int | None) -> int:
    import torch

    found = torch.cuda.device_count()
    if wanted is None:
        return min(found, 1)
    if not 0 <= wanted <= found:
        raise DPAError(f"--gpus {wanted}; this machine has {found}.")
    return wanted


@functools.cache
def _folder(model: Path) -> Path:
    """Return a model's folder; a config's finished run is exported by a process with XTuner."""
    if model.suffix != ".py":
        return model
    folder = Path("work_dirs", model.stem, TUNE, HF_FOLDER)
    command = [sys.executable, str(EXPORT), str(model), "-o", str(folder)]
    if subprocess.run(command).returncode:
        raise DPAError(
            f"{model} can't be exported, see above. If the run is in another work dir, export it "
            f"with tools/export.py --work-dir, and give the folder."
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
