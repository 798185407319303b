"""OpenCompass's local runner, in this process, where a failing task is that task's own trouble."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path

from mmengine.config import ConfigDict
from opencompass.partitioners import NumWorkerPartitioner
from opencompass.registry import PARTITIONERS, RUNNERS, TASKS
from opencompass.runners import LocalRunner
from opencompass.utils import get_logger, model_abbr_from_cfg


@RUNNERS.register_module()
class InProcessRunner(LocalRunner):
    """Run tasks one after the other as ``opencompass --debug`` does, and go on after a failure.

    A model is loaded once for all its tasks, imports are paid for once, and progress bars are
    seen. The traceback of a task that raises goes to its log file.
    """

    def __init__(self, task: ConfigDict) -> None:
        super().__init__(task=task, debug=True)
        self.cur_model = self.cur_model_abbr = None

    def launch(self, tasks: list[ConfigDict]) -> list[tuple[str, int]]:
        """Run tasks.

        Args:
            tasks: Task configs, from a partitioner.

        Returns:
            Name and exit code of each.
        """
        status = []
        for cfg in tasks:
            if model_abbr_from_cfg(cfg["models"][0]) != self.cur_model_abbr:
                self.cur_model = None  # never two models in memory
                gc.collect()
            try:
                status += super().launch([cfg])
            except Exception:
                task = TASKS.build(dict(cfg=cfg, type=self.task_cfg["type"]))
                log = Path(task.get_log_path("out"))
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(traceback.format_exc(), encoding="utf-8")
                last = traceback.format_exc().strip().splitlines()[-1]
                get_logger().error(f"{task.name} failed ({last}), see {log}")
                status.append((task.name, 1))
        return status


@PARTITIONERS.register_module()
class PartsPartitioner(NumWorkerPartitioner):
    """OpenCompass's partitioner for several workers, without the data sets that can't be built.

    OpenCompass builds them to count samples, and one that fails would end the whole run.
    """

    def partition(
        self, model_dataset_combinations: list[dict], *args, **kwargs
    ) -> list[ConfigDict]:
        """Partition what can be built; see OpenCompass's."""
        for combination in model_dataset_combinations:
            datasets = combination["datasets"]
            combination["datasets"] = [d for d in datasets if self._builds(d)]
        return super().partition(model_dataset_combinations, *args, **kwargs)

    def _builds(self, dataset: ConfigDict) -> bool:
        try:
            self.get_size(dataset)
        except Exception:
            get_logger().error(f"{dataset['abbr']} can't be built\n{traceback.format_exc()}")
            return False
        return True
