"""The demo's own commands; ``make demo`` runs the first two around the training.

python -m dpa_xtuner.demo prepare data
python -m dpa_xtuner.demo report data WORK_DIR
python -m dpa_xtuner.demo vit
"""

import argparse
from pathlib import Path

import dpa_xtuner.plugin  # noqa: F401  # before XTuner and peft are imported
from dpa_xtuner.demo.prepare import LLM_FOLDER, SHIPPED_VIT, prepare
from dpa_xtuner.demo.trained import print_report
from dpa_xtuner.demo.vit import train_shipped
from dpa_xtuner.errors import cli_errors


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m dpa_xtuner.demo")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "prepare", help="write SmolLM2-135M-Instruct and the OpenMoji data under one folder"
    )
    command.add_argument("root", nargs="?", type=Path, default=Path("data"), help="default: data")
    command.set_defaults(run=prepare)
    command = commands.add_parser(
        "report", help="ask the model the held-out questions, before and after training"
    )
    command.add_argument("root", type=Path, help="folder of prepare")
    command.add_argument("work_dir", type=Path, help="folder of the training")
    command.set_defaults(run=print_report)
    command = commands.add_parser("vit", help="train the shipped visual encoder again")
    command.add_argument(
        "llm_folder", nargs="?", type=Path, default=Path("data") / LLM_FOLDER,
        help="LLM whose word embeddings stand for the drawings' names",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=SHIPPED_VIT, help="folder to write")
    command.set_defaults(run=train_shipped)
    arguments = vars(parser.parse_args())
    run = arguments.pop("run")
    with cli_errors():
        run(**arguments)


if __name__ == "__main__":
    main()
