"""Measures the language prior conflict on captions that are not trained on."""

from pathlib import Path

from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.engine.state_file import steps_done
from dpa_xtuner.loss.held_out import cross_entropy_per_token
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.stages.table import HeldOut


@HOOKS.register_module()
class HeldOutHook(Hook):
    """Logs the cross entropy per token of held-out captions, as the stage table says.

    In ``proxy``: text only, under the original LLM and under the proxy. The second is the *floor*
    that a frozen proxy reaches without looking. In ``align``: the same captions with their
    pictures beside that floor, if the method has one. The first token of a caption is left out
    of both, since without BOS the text-only format can't predict it.

    The figures go into the stage's ``stage.json``. The priority is that of :class:`HandOverHook`,
    which stands behind this hook and writes that file.

    Args:
        data: config of the held-out captions.
        precision: what the run computes in.
        how: of :class:`dpa_xtuner.stages.table.HeldOut`.
    """

    priority = "LOWEST"

    def __init__(self, data: dict, precision: str, **how):
        self.data, self.precision, self.how = data, Precision(precision), HeldOut(**how)

    def before_train(self, runner) -> None:
        """Read what the earlier stage, and this one before it was stopped, have measured."""
        folder = Path(runner.work_dir)
        earlier = self.how.earlier
        self.before = {} if earlier is None else _measured(folder.parent / earlier)
        own = _measured(folder) if runner.iter > 0 else {}
        runner.state_file.measured = self.before | own
        self.held_out = DATASETS.build(self.data)

    def before_train_epoch(self, runner) -> None:
        """Measure the start; a resumed run has done so."""
        if runner.iter == 0:
            self._measure(runner, self.how.start)
            if is_main_process():
                runner.state_file.write_measured()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure whenever a checkpoint is due."""
        interval = runner.cfg.default_hooks.checkpoint.interval
        if batch_idx + 1 < runner.max_iters and self.every_n_train_iters(runner, interval):
            self._measure(runner, self.how.end)

    def after_train(self, runner) -> None:
        """Measure the end."""
        self._measure(runner, self.how.end)

    def _measure(self, runner, name: str) -> None:
        model, measured = unwrap(runner.model), runner.state_file.measured
        # DeepSpeed's weights are of that type themselves.
        amp = self.precision.autocast(get_device(), enabled=not hasattr(runner, "strategy"))
        size = runner.train_dataloader.batch_size
        measured[name] = cross_entropy_per_token(model, self.held_out, size, amp)
        shown = {key: measured[key] for key in self.how.shown if key in measured}
        beside = [key for key in shown if key in self.before]
        meaning = f"{self.how.meaning}, {self.how.beside}" if beside else self.how.meaning
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        runner.logger.info(f"Held-out captions, nats per token ({meaning}): {text}")
        step = steps_done(runner.cfg, runner.iter)
        for key in (name, *beside):
            runner.visualizer.add_scalar(f"held_out/{key}", measured[key], step=step)


def _measured(folder: Path) -> dict[str, float]:
    return dict(read_state(folder)["measured"])
