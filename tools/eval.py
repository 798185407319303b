"""Evaluate models on the paper's benchmarks, through OpenCompass and VLMEvalKit.

    python tools/eval.py dpa_internlm2_7b path/to/another_llava --benchmarks mmbench mmvp

A model is a config (path or name), whose finished run is exported first, or the folder of a Hugging
Face LLaVA. The table is printed and saved in the work dir as table.md, .csv and .json, several
models with differences to the first. The same command again does what is missing, and nothing
else.

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
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["DPA_WITHOUT_XTUNER"] = "1"  # which this process, and OpenCompass's, have no need of

from _configs import config_names, find_config

from dpa_xtuner.errors import DPAError, check_installed, cli_errors, nearest

if TYPE_CHECKING:
    from dpa_xtuner.evaluation.report import Details, Report

EXPORT = Path(__file__).with_name("export.py")


def main() -> int:
    """Evaluate; exit code 1 if a task failed or there was nothing to evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="config or LLaVA folder; for text also an LLM's folder",
    )
    parser.add_argument("--benchmarks", nargs="+", default=["all"], metavar="NAME",
                        help="mmbench ai2d docvqa ocrbench cvbench mmvp naturalbench, or all "
                        "(default); text-only: mmlu arc boolq gsm8k arc_likelihood hellaswag "
                        "piqa, or text")  # fmt: skip
    parser.add_argument("--data", type=Path,
                        default=os.environ.get("LMUData", "data/benchmarks"),  # noqa: SIM112
                        help="folder of the benchmarks' files (tools/get_benchmarks.py); default: "
                        "$LMUData or data/benchmarks")  # fmt: skip
    parser.add_argument("--ignore-md5", action="store_true",
                        help="evaluate files that are not the published ones as well; the table "
                        "says which")  # fmt: skip
    parser.add_argument("--limit", type=_positive, metavar="N",
                        help="questions or groups of each data set, evenly spread (text-only: the "
                        "first); default: all")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N",
                        help="GPUs that answer at a time; default: one, or the CPU where there is "
                        "none")  # fmt: skip
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="B", help="default: 8")
    parser.add_argument("--show", type=_positive, metavar="N",
                        help="draw N wrong answers of each data set to wrong_answers.html; "
                        "of text-only ones to wrong_answers_text.html")  # fmt: skip
    parser.add_argument("--work-dir", type=Path, default="work_dirs/eval",
                        help="default: work_dirs/eval")  # fmt: skip
    parser.add_argument("--import", nargs="+", default=[], metavar="MODULE", dest="modules",
                        help="Python modules that register benchmarks of your own "
                        "(dpa_xtuner.evaluation.benchmarks.register_benchmark)")  # fmt: skip
    arguments = parser.parse_args()
    with cli_errors():
        return _evaluate(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected 1 or more")
    return number


def _evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate: what has pictures, then what is text alone and has a table of its own."""
    from dpa_xtuner.evaluation import text_benchmarks as text
    from dpa_xtuner.evaluation.benchmarks import find_benchmarks

    for module in arguments.modules:
        _import(module)
    texts, names = text.choose(arguments.benchmarks)
    benchmarks = find_benchmarks(names, also=("text", *text.TEXT_BENCHMARKS))
    models = [_model(name) for name in arguments.models]
    check_installed("eval", "opencompass", "vlmeval")
    there, left_out, other_files = _with_files(benchmarks, arguments.data, arguments.ignore_md5)
    texts_there, texts_left_out = text.with_files(texts, arguments.data)
    left_out += texts_left_out
    for line in left_out:
        print(f"Left out: {line}", file=sys.stderr, flush=True)
    for line in other_files:
        print(line, file=sys.stderr, flush=True)
    if not there and not texts_there:
        raise DPAError(
            f"--data {arguments.data} has the files of none of these benchmarks, see above."
        )
    code = _evaluate_pictures(arguments, models, there, left_out, other_files) if there else 0
    if texts_there:
        code = _evaluate_texts(arguments, models, texts_there, left_out) or code
    return code


def _import(module: str) -> None:
    """Import a module that registers benchmarks, from the current folder as well.

    Processes that answer on GPUs of their own import it again.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (before, os.getcwd())))
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, TypeError, ValueError):  # no name of a module, or its parents' trouble
        found = None
    if found is None:
        raise DPAError(
            f"--import {module}: there is no such module. Expected the name of one on PYTHONPATH "
            f"or in the current folder, such as my_package.my_benchmarks."
        )
    try:
        importlib.import_module(module)
    except DPAError:
        raise
    except Exception as error:  # its own trouble
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise DPAError(
            f"--import {module}: {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno})"
        ) from error


def _evaluate_pictures(
    arguments: argparse.Namespace,
    models: list[Path],
    there: list,
    left_out: list[str],
    other_files: list[str],
) -> int:
    from dpa_xtuner.evaluation.report import save_beside_runs
    from dpa_xtuner.evaluation.run import check_folder, evaluate

    gpus = _gpus(arguments.gpus)
    folders = [_folder(model) for model in models]
    for folder in folders:
        check_folder(folder)
    report, details = evaluate(
        folders, there, arguments.data, arguments.work_dir,
        limit=arguments.limit, gpus=gpus, batch_size=arguments.batch_size,
        left_out=left_out, other_files=other_files,
    )  # fmt: skip
    code = _told(arguments, report, details, "table", "wrong_answers.html")
    if arguments.limit is None and not other_files:
        save_beside_runs(report)
    return code


def _evaluate_texts(
    arguments: argparse.Namespace, models: list[Path], there: list, left_out: list[str]
) -> int:
    from dpa_xtuner.evaluation import text

    gpus = _gpus(arguments.gpus)
    llms = text.llms_of([_folder(model) for model in models])
    report, details = text.evaluate(
        llms, there, arguments.data, arguments.work_dir,
        limit=arguments.limit, gpus=gpus, batch_size=arguments.batch_size, left_out=left_out,
    )  # fmt: skip
    return _told(arguments, report, details, "text", "wrong_answers_text.html")


def _told(
    arguments: argparse.Namespace, report: Report, details: Details, table: str, page: str
) -> int:
    """Save and print the table, draw wrong answers; exit code 1 if something failed."""
    from dpa_xtuner.evaluation import show
    from dpa_xtuner.evaluation.report import save

    folder = arguments.work_dir
    print(f"\n{save(report, folder, table)}\n{folder / f'{table}.md'}")
    if arguments.show:
        show.save(details, arguments.show, folder / page)
        print(folder / page)
    for line in report.failures():
        print(f"dpa_xtuner: {line}", file=sys.stderr)
    return 1 if report.failures() else 0


def _model(name: str) -> Path:
    """A LLaVA folder, or the file of a config."""
    if Path(name).is_dir():
        return Path(name)
    if (name.endswith(".py") and Path(name).is_file()) or name in config_names():
        return find_config(name)
    raise DPAError(
        f"{name!r} is neither a folder nor a config{nearest(name, config_names())}. Give the "
        f"folder of a Hugging Face LLaVA, or a config: python tools/list_configs.py."
    )


def _with_files(
    benchmarks: list, data: Path, ignore_md5: bool
) -> tuple[list, list[str], list[str]]:
    """Benchmarks whose files are there; what is left out for want of them; files of another md5."""
    from dpa_xtuner.evaluation.benchmarks import missing_files

    missing = missing_files(benchmarks, data)
    others = [file for file in missing if file.md5 and ignore_md5]
    missing = [file for file in missing if file not in others]
    lacking = {file.benchmark.name for file in missing}
    return (
        [benchmark for benchmark in benchmarks if benchmark.name not in lacking],
        [f"{file.benchmark.title}: {file}" for file in missing],
        [
            f"{file.benchmark.title}: {file.path} is not the published file (its md5 is "
            f"{file.md5}, expected {file.file.md5}); compare its scores with those of this file "
            f"alone."
            for file in others
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
    """A model's folder: a config's finished run is exported by a process that may import XTuner."""
    if model.suffix != ".py":
        return model
    folder = Path("work_dirs", model.stem, "tune", "hf")
    others = {k: v for k, v in os.environ.items() if k != "DPA_WITHOUT_XTUNER"}
    command = [sys.executable, str(EXPORT), str(model), "-o", str(folder)]
    if subprocess.run(command, env=others).returncode:
        raise DPAError(
            f"{model} can't be exported, see above. A run in another work dir: export it by "
            f"tools/export.py --work-dir, and give the folder."
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
