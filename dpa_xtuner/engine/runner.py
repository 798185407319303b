"""The runners: MMEngine's, but they train the next unfinished stage, then the one after it."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmengine.runner import FlexibleRunner as MMEngineFlexibleRunner
from mmengine.runner import Runner as MMEngineRunner

from dpa_xtuner import compat
from dpa_xtuner.curves import CURVES_FILE, draw_curves
from dpa_xtuner.engine.log import describe, quieten, quieten_start
from dpa_xtuner.engine.process import (
    check_ranks_agree,
    lock_stage_folder,
    remove_partial,
    run_next,
)
from dpa_xtuner.engine.state_file import StateFile, steps_done
from dpa_xtuner.engine.stopping import guard, stopped_in_order
from dpa_xtuner.errors import DPAError, cli_errors
from dpa_xtuner.files import move_into_place
from dpa_xtuner.layout import STAGE_NAMES
from dpa_xtuner.planning.rehearsal import rehearse, users_files_named
from dpa_xtuner.registry import RUNNERS
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.stages.build import global_rank
from dpa_xtuner.stages.pipeline import next_stage

if TYPE_CHECKING:  # a mixin before one of MMEngine's runners, whose methods it calls
    from mmengine.runner import Runner as _Mixed
else:
    _Mixed = object


class _StageRunner(_Mixed):
    """The methods that both runners add to MMEngine's."""

    @classmethod
    def from_cfg(cls, cfg: Config):
        """Build the runner of the next unfinished stage; exit when there is none."""
        guard()
        scope = DefaultScope.overwrite_default_scope("mmengine")
        with cli_errors(), scope, stopped_in_order():
            rank = global_rank(cfg.launcher)
            quieten_start(rank)
            if os.environ.get("DPA_REHEARSE", "0") not in ("", "0"):
                cfg = rehearse(cfg)
            with users_files_named(Path(cfg.work_dir)):
                stage = next_stage(cfg)
            if stage is None:
                print_log(f"All stages are finished:\n{summary(cfg.work_dir)}", "current")
                raise SystemExit(0)
            if "strategy" in stage:
                compat.deepspeed_without_onebit()
                compat.deepspeed_leaves_float32()
                if stage.launcher == "none":
                    compat.deepspeed_without_mpi()
            lock = lock_stage_folder(stage) if rank == 0 else None
            state_file = StateFile(Path(stage.work_dir), rank)
            if rank == 0:
                state_file.begin()
            with state_file.ends_noted():
                runner = super().from_cfg(stage)
                runner.lock = lock  # held as long as the runner lives
                runner.state_file = state_file
                check_ranks_agree(stage)
                if is_main_process():
                    remove_partial(Path(runner.work_dir))
            return runner

    def train(self):
        """Train the stage, then continue with the next one in a fresh process."""
        base = Path(self.cfg.work_dir).parent
        noted = self.state_file.ends_noted(lambda: steps_done(self.cfg, self.iter))
        with cli_errors(every_rank=True), users_files_named(base), noted:
            model = super().train()
        with stopped_in_order():
            if is_main_process():
                _draw(base)
            run_next(self.cfg)
        print_log(f"Finished:\n{summary(base)}", "current")
        return model

    def _log_env(self, *args) -> None:
        """Log one line; MMEngine's method logs the whole environment and config of each stage."""
        quieten(self.logger)  # built by now
        name = Path(self.cfg.filename or f"{self.timestamp}.py").name  # as in dump_config
        self.logger.info(describe(str(Path(self.work_dir) / name)))

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Save as MMEngine does, but give the checkpoint its name once all of it is on disk.

        Args:
            out_dir: folder of the checkpoint.
            filename: its name.
            args: other arguments of MMEngine's method.
            kwargs: the same, by name.

        Raises:
            DPAError: it can't be written.
        """
        partial = Path(out_dir) / f".{filename}.partial"
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
        except (OSError, RuntimeError) as error:
            # On a full disk, torch.save raises RuntimeError and names its archive's source file.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise DPAError(
                f"The checkpoint {Path(out_dir) / filename} can't be written: {error}. Older "
                f"checkpoints are complete: make room and run the same command again."
            ) from error
        barrier()
        if is_main_process():
            move_into_place(partial, Path(out_dir) / filename)
        barrier()


@RUNNERS.register_module()
class Runner(_StageRunner, MMEngineRunner):
    """MMEngine's Runner for the stages."""


@RUNNERS.register_module()
class FlexibleRunner(_StageRunner, MMEngineFlexibleRunner):
    """MMEngine's FlexibleRunner for the stages; ``--deepspeed`` asks for it."""


def _draw(run: Path) -> None:
    """Draw the curves of a run; a picture that can't be drawn must not end a training."""
    try:
        draw_curves([run], run / CURVES_FILE)
    except Exception as error:
        print_log(f"{run / CURVES_FILE} was not drawn: {error}", "current", logging.WARNING)


def summary(work_dir: str | Path) -> str:
    """List the finished stages below a work dir and what they wrote, a line each."""
    lines = []
    for name in STAGE_NAMES:
        state = read_state(Path(work_dir) / name)
        for component, folder in state.get("writes", {}).items():
            lines.append(f"  {name:<6} {component:<12} {folder}")
    return "\n".join(lines)
