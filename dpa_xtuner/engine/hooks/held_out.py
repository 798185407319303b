"""Measures the language prior conflict on captions that are not trained on."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

from dpa_xtuner.engine.hooks.unwrap import autocast, unwrap
from dpa_xtuner.engine.state_file import steps_done
from dpa_xtuner.loss.held_out import cross_entropy_per_token
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.stages.table import HeldOut


@HOOKS.register_module()
class HeldOutHook(Hook):
    """Logs the cross entropy per token of held-out captions, as the stage table says.

    In ``proxy``: text only, under the original LLM and under the proxy. The second figure is the
    *floor* that a frozen proxy reaches without looking. In ``align``: the same captions with their
    pictures, next to that floor if the method has one. Both leave out the first token of a
    caption, since without BOS the text-only format can't predict it.

    The figures go into the stage's ``stage.json``. The priority equals that of
    :class:`HandOverHook`, which runs after this hook and writes that file.

    Args:
        data: config of the held-out captions.
        batch_size: captions at a time on a device.
        how: the fields of :class:`dpa_xtuner.stages.table.HeldOut`.
    """

    priority = "LOWEST"

    def __init__(self, data: dict, batch_size: int, **how):
        self.data, self.batch_size, self.how = data, batch_size, HeldOut(**how)

    def before_train(self, runner) -> None:
        """Read what the earlier stage measured, and this stage before it was interrupted."""
        folder = Path(runner.work_dir)
        earlier = self.how.earlier
        self.before = {} if earlier is None else _measured(folder.parent / earlier)
        resumed = _measured(folder) if runner.iter > 0 else {}
        runner.state_file.measured = self.before | resumed
        self.held_out = DATASETS.build(self.data)

    def before_train_epoch(self, runner) -> None:
        """Measure the start, unless the run is resumed."""
        if runner.iter == 0:
            self._measure(runner, self.how.start, runner.iter)
            if is_main_process():
                runner.state_file.write_measured()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure whenever a checkpoint is due."""
        interval = runner.cfg.default_hooks.checkpoint.interval
        if batch_idx + 1 < runner.max_iters and self.every_n_train_iters(runner, interval):
            self._measure(runner, self.how.end, batch_idx + 1)

    def after_train(self, runner) -> None:
        """Measure the end."""
        self._measure(runner, self.how.end, runner.iter)

    def _measure(self, runner, name: str, iterations: int) -> None:
        model, measured = unwrap(runner.model), runner.state_file.measured
        measured[name] = cross_entropy_per_token(
            model, self.held_out, self.batch_size, autocast(runner)
        )
        shown = {key: measured[key] for key in self.how.shown if key in measured}
        earlier = [key for key in shown if key in self.before]
        meaning = f"{self.how.meaning}, {self.how.earlier_meaning}" if earlier else self.how.meaning
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        runner.logger.info(f"Held-out captions, nats per token ({meaning}): {text}")
        step = steps_done(runner.cfg, iterations)
        for key in (name, *earlier):
            runner.visualizer.add_scalar(f"held_out/{key}", measured[key], step=step)


def _measured(folder: Path) -> dict[str, float]:
    return dict(read_state(folder)["measured"])
