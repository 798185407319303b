"""Measures the language prior conflict on captions that are not trained on."""

from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor, nn

from dpa_xtuner.data import collate
from dpa_xtuner.hooks.unwrap import unwrap
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.pipeline import read_state
from dpa_xtuner.stages.state_file import steps_done


@HOOKS.register_module()
class HeldOutHook(Hook):
    """Logs the cross entropy per token of held-out captions, as the stage table says.

    In ``proxy``: text only, under the original LLM and under the proxy. The second is the *floor*
    that a frozen proxy reaches without looking. In ``align``: the same captions with their
    pictures beside that floor, if the method has one. The first token of a caption is left out
    of both, since without BOS the text-only view can't predict it.

    The figures go into the stage's ``stage.json``. The priority is that of :class:`HandOverHook`,
    which stands behind this hook and writes that file.

    Args:
        data: config of the held-out captions.
        precision: what the run computes in.
        start: as the others, of :class:`dpa_xtuner.stages.table.HeldOut`.
        end: see ``start``.
        shown: see ``start``.
        meaning: see ``start``.
        floor: see ``start``.
        earlier: see ``start``.
    """

    priority = "LOWEST"

    def __init__(
        self,
        data: dict,
        precision: str,
        start: str,
        end: str,
        shown: tuple[str, ...],
        meaning: str,
        floor: str = "",
        earlier: str | None = None,
    ):
        self.data, self.precision = data, Precision(precision)
        self.start, self.end, self.shown = start, end, shown
        self.meaning, self.floor, self.earlier = meaning, floor, earlier

    def before_train(self, runner) -> None:
        """Read what the earlier stage, and this one before it was stopped, have measured."""
        folder = Path(runner.work_dir)
        self.before = {}
        if self.earlier is not None:
            self.before = _measured(folder.parent / self.earlier)
        own = _measured(folder) if runner.iter > 0 else {}
        runner.state_file.measured = self.before | own
        self.held_out = DATASETS.build(self.data)

    def before_train_epoch(self, runner) -> None:
        """Measure the start; a resumed run has done so."""
        if runner.iter == 0:
            self._measure(runner, self.start)
            if is_main_process():
                runner.state_file.write_measured()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure whenever a checkpoint is due."""
        interval = runner.cfg.default_hooks.checkpoint.interval
        if batch_idx + 1 < runner.max_iters and self.every_n_train_iters(runner, interval):
            self._measure(runner, self.end)

    def after_train(self, runner) -> None:
        """Measure the end."""
        self._measure(runner, self.end)

    def _measure(self, runner, name: str) -> None:
        model, measured = unwrap(runner.model), runner.state_file.measured
        # DeepSpeed's weights are of that type themselves.
        amp = self.precision.autocast(get_device(), enabled=not hasattr(runner, "strategy"))
        size = runner.train_dataloader.batch_size
        measured[name] = cross_entropy_per_token(model, self.held_out, size, amp)
        shown = {key: measured[key] for key in self.shown if key in measured}
        beside = [key for key in shown if key in self.before]
        meaning = f"{self.meaning}, {self.floor}" if beside else self.meaning
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        runner.logger.info(f"Held-out captions, nats per token ({meaning}): {text}")
        step = steps_done(runner.cfg, runner.iter)
        for key in (name, *beside):
            runner.visualizer.add_scalar(f"held_out/{key}", measured[key], step=step)


def _measured(folder: Path) -> dict[str, float]:
    return dict(read_state(folder)["measured"])


@torch.no_grad()
def cross_entropy_per_token(
    model: nn.Module, dataset, batch_size: int, amp: torch.autocast
) -> float:
    """Mean cross entropy of a data set's supervised tokens, each sample's first left out.

    Every rank takes its share, and all take the same number of batches, as ZeRO-3 needs.

    Args:
        model: :class:`ProxyLLM` or :class:`DPALLaVAModel`, not wrapped.
        dataset: a :class:`dpa_xtuner.data.DPADataset`.
        batch_size: samples at a time on a device.
        amp: the context to compute in.

    Returns:
        Nats per token over all ranks.
    """
    rank, world = get_dist_info()
    batches = [
        range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)
    ]
    total = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    for start in range(0, len(batches), world):
        mine = start + rank
        batch = collate([dataset[i] for i in batches[min(mine, len(batches) - 1)]])
        data = model.data_preprocessor(batch, False)["data"]
        data = data | {"labels": without_first(data["labels"])}
        with amp:
            losses = model.scores(data).cross_entropy
        if mine < len(batches):
            total += torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
    model.train(training)
    total = total.to(get_device())
    all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


def without_first(labels: Tensor) -> Tensor:
    """Labels (B, T) with the first supervised token of each row ignored; a new tensor."""
    first = (labels != -100).int().argmax(dim=1, keepdim=True)
    return labels.scatter(1, first, -100)
