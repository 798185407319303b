"""The demo's model before and after training, and its answers."""

import math
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedModel,
)

from dpa_xtuner.demo import report
from dpa_xtuner.demo.prepare import DATA_FOLDER, LLM_FOLDER, VIT_FOLDER
from dpa_xtuner.demo.report import DemoModel
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import write_text
from dpa_xtuner.layout import LLM, LLM_ADAPTER, PROJECTOR, STATE_FILE, TUNE
from dpa_xtuner.model.projectors import build_projector, load_projector
from dpa_xtuner.precision import choose_precision
from dpa_xtuner.stages.artifacts import read_state


def print_report(root: Path, work_dir: Path) -> None:
    """Print how well the held-out questions are answered, and draw some answers.

    The report is kept in ``work_dir``. A second call prints it again, unless the model was
    trained since.

    Args:
        root: folder of :func:`dpa_xtuner.demo.prepare.prepare`.
        work_dir: folder of the training.

    Raises:
        DPAError: the training is not finished.
    """
    table, picture = work_dir / "report.txt", work_dir / "answers.png"
    if not table.is_file() or _changed(work_dir / TUNE / STATE_FILE) > _changed(table):
        after = after_training(root, work_dir)
        questions = report.load_questions(root / DATA_FOLDER / "heldout_questions.json")
        before = report.ask_questions(before_training(root), questions)
        answered = report.ask_questions(after, questions)
        report.draw_answers(questions, answered.answers, picture)
        write_text(table, report.compare(before, answered))
    print(f"\n{table.read_text(encoding='utf-8')}\n\n{picture.resolve()}")


def _changed(file: Path) -> float:
    return file.stat().st_mtime if file.is_file() else math.inf


def before_training(root: Path) -> DemoModel:
    """Load the original LLM with a freshly initialised projector.

    Args:
        root: folder of :func:`dpa_xtuner.demo.prepare.prepare`.
    """
    llm, vit = _llm(root / LLM_FOLDER), _vit(root)
    torch.manual_seed(0)
    projector = build_projector("mlp", vit.config.hidden_size, llm.config.hidden_size)
    return _demo_model(root, llm, vit, projector)


def after_training(root: Path, work_dir: Path) -> DemoModel:
    """Load what stage tune wrote.

    Args:
        root: folder of :func:`dpa_xtuner.demo.prepare.prepare`.
        work_dir: folder of the training.

    Raises:
        DPAError: the stage is not finished.
    """
    written = read_state(work_dir / TUNE).get("writes")
    if written is None:
        raise DPAError(
            f"{work_dir / TUNE} is not finished: see the log in it, then run the training again."
        )
    if LLM in written:
        llm = _llm(Path(written[LLM]))
    else:
        llm = PeftModel.from_pretrained(_llm(root / LLM_FOLDER), written[LLM_ADAPTER])
        llm = llm.merge_and_unload()
    vit = _vit(root)
    projector = load_projector(written[PROJECTOR], vit.config.hidden_size, llm.config.hidden_size)
    return _demo_model(root, llm, vit, projector)


def _llm(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=choose_precision("auto", "cpu").dtype
    )


def _vit(root: Path) -> CLIPVisionModel:
    # Its file has float16 weights, which transformers 5 would keep.
    return CLIPVisionModel.from_pretrained(root / VIT_FOLDER, torch_dtype=torch.float32)


def _demo_model(
    root: Path, llm: PreTrainedModel, vit: CLIPVisionModel, projector: nn.Module
) -> DemoModel:
    return DemoModel(
        llm=llm,
        vit=vit,
        projector=projector,
        tokenizer=AutoTokenizer.from_pretrained(root / LLM_FOLDER),
        processor=CLIPImageProcessor.from_pretrained(root / VIT_FOLDER),
    )
