"""What the study measures inside the stages, as a hook of theirs."""

from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

from dpa_xtuner.data import DPADataset, collate
from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.files import write_json
from dpa_xtuner.layout import ALIGN, TUNE
from dpa_xtuner.loss import supervised_mask
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.llm import decode, output_head
from dpa_xtuner.model.projectors import read_projector

MEASURES = "measures.json"
"""In a stage's folder: what :class:`StudyHook` has measured, by optimizer step."""


@HOOKS.register_module()
class StudyHook(Hook):
    """Asks held-out questions over the steps of `tune`, and looks at the weights of its answers.

    Args:
        questions: data file of the held-out questions, with pictures of their own.
        every: steps between two looks.
        projector: folder of a projector that `align` starts from; None: a new one.
    """

    priority = "LOWEST"

    def __init__(self, questions: str, every: int, projector: str | None = None):
        self.questions, self.every, self.projector = questions, every, projector
        self.found: dict[int, dict[str, float | None]] = {}

    def before_train(self, runner) -> None:
        """Load the questions, or the projector to start from."""
        self.batches: list[dict] = []
        if self.projector is not None and Path(runner.work_dir).name == ALIGN:
            projector = unwrap(runner.model).projector
            projector.load_state_dict(read_projector(projector, self.projector))
        if Path(runner.work_dir).name != TUNE:
            return
        how = runner.cfg.train_dataloader.dataset.to_dict()
        dataset: DPADataset = DATASETS.build(how | {"data_path": self.questions})
        rows = [dataset[i] for i in range(len(dataset))]
        model = unwrap(runner.model)
        for start in range(0, len(rows), 128):
            batch = collate(rows[start : start + 128])
            self.batches.append(model.data_preprocessor(batch, False)["data"])

    def before_train_epoch(self, runner) -> None:
        """Look before the first step: right after `align`."""
        self._look(runner, 0)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Look every few steps, and write after the last."""
        step = batch_idx + 1
        if step % self.every == 0 or step == runner.max_iters:
            self._look(runner, step)
        if step == runner.max_iters and self.batches:
            content = {"steps": list(self.found), "looks": list(self.found.values())}
            write_json(Path(runner.work_dir) / MEASURES, content)

    def _look(self, runner, step: int) -> None:
        if self.batches and step not in self.found:
            self.found[step] = look(unwrap(runner.model), self.batches)


@torch.no_grad()
def look(model: DPALLaVAModel, batches: list[dict]) -> dict[str, float | None]:
    """Measure the answers to questions, of which the first token alone is counted.

    Args:
        model: keeps its mode.
        batches: of :func:`dpa_xtuner.data.collate`, on the model's device.

    Returns:
        ``accuracy`` (the token is the likeliest of the vocabulary); and for the tokens that are
        learned (p_w at least 0.5) and for those that are not: ``d_learned`` and ``d_unlearned``,
        the mean p_w - p_wo, and ``learned``, the fraction of the first kind.
    """
    training = model.training
    model.train(False)
    right, with_picture, without = [], [], []
    for data in batches:
        supervised = supervised_mask(data["labels"])  # (B, T - 1)
        first = supervised.int().argmax(1)  # (B,)
        rows = torch.arange(len(first), device=first.device)
        hidden = decode(model.llm, model.splice(data))[rows, first]  # (B, H)
        target = data["labels"][rows, first + 1]  # (B,)
        logits = output_head(model.llm)(hidden)  # (B, V)
        right.append(logits.argmax(-1) == target)
        with_picture.append(logits.softmax(-1)[rows, target])
        # The supervised tokens come row by row: (B, 2), an answer and its full stop.
        p_wo = contrast_log_probs(model.llm, data).probability.view(len(first), -1)
        without.append(p_wo[:, 0])
    model.train(training)
    p_w, p_wo = torch.cat(with_picture), torch.cat(without)
    learned, d = p_w >= 0.5, p_w - p_wo
    return {
        "accuracy": torch.cat(right).float().mean().item(),
        "learned": learned.float().mean().item(),
        "d_learned": d[learned].mean().item() if learned.any() else None,
        "d_unlearned": d[~learned].mean().item() if (~learned).any() else None,
    }
