"""Hands one stage over to the next, and watches what the method is about."""

from pathlib import Path

from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from torch import nn
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.hooks.unwrap import unwrap
from dpa_xtuner.loss.held_out import cross_entropy_per_token
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.parts import count_parameters
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import read_origin, refuse_foreign, save_part
from dpa_xtuner.stages.initial import record_of_loaded
from dpa_xtuner.stages.pipeline import read_state, run_facts
from dpa_xtuner.stages.state_file import steps_done


@HOOKS.register_module()
class ProxyLLMHook(Hook):
    """Measures the language prior conflict, guards the frozen LLM, writes what a stage made.

    In ``proxy``: cross entropy per token of held-out captions, text only, under the
    original LLM and under the proxy. The second is the *floor* that a frozen proxy reaches
    without looking. In ``align``: the same captions with their pictures beside that floor,
    if the method has one, and the frozen LLM's bits at the end against those at the start.
    The first token of a caption is left out of both, since without BOS the text-only view
    can't predict it.

    The priority is below the checkpoint hook's, so that the last checkpoint is on disk
    before a stage is called finished.

    Args:
        stage: its name.
        stages: names of all stages of the method.
        loads: part -> folder that the model was built from.
        writes: part -> folder to write when the stage is done.
        origin: what the stage is trained from, for the records.
        samples: fingerprint of the data set, which a resumed run has to find again.
        held_out: config of the held-out captions, or None.
    """

    priority = "LOWEST"

    def __init__(
        self,
        stage: str,
        stages: list[str],
        loads: dict,
        writes: dict,
        origin: dict,
        samples: str,
        held_out: dict | None,
    ):
        self.stage, self.stages, self.loads, self.writes = stage, stages, loads, writes
        self.origin, self.samples, self.held_out_cfg = origin, samples, held_out
        self.precision = Precision(origin["precision"])
        self.measured: dict[str, float] = {}

    def before_train(self, runner) -> None:
        """Check what was loaded, log the stage's table, and measure the start.

        Raises:
            DPAError: a loaded part was trained on another LLM or encoder.
        """
        self.folder = Path(runner.work_dir)
        model = unwrap(runner.model)
        self.tokenizer = BUILDER.build(runner.cfg.tokenizer.to_dict())
        before = read_state(self.folder).get("origin", {}) if runner.iter else {}
        for side, value in model.fingerprints.items():
            self.origin[side]["fingerprint"] = value
        if "llm" in self.loads:  # the proxy in full: what it was trained from is in its record
            trained_from = read_origin(Path(self.loads["llm"]))["llm"]
            self.origin["llm"]["fingerprint"] = trained_from["fingerprint"]
        own = {side: self.origin[side] for side in model.fingerprints}
        refuse_foreign(self.folder, before, own, "fingerprint")
        for folder in map(Path, self.loads.values()):
            record = record_of_loaded(folder, self.origin["llm"]["name"])
            refuse_foreign(folder, record, own, "fingerprint")
        runner.logger.info(self._table(model))
        if "projector" in self.loads:
            runner.logger.info(f"Stage {self.stage} begins from {self._start()}")
        if self.stage == "align":
            self.frozen = fingerprint(model.llm)
            if "proxy" in self.stages:
                self.measured = dict(_measured(self.folder.parent / "proxy"))
        if runner.iter > 0:  # resumed: the start was measured before
            self.measured |= _measured(self.folder)
        if self.held_out_cfg is not None:
            self.held_out = DATASETS.build(self.held_out_cfg)
            if runner.iter == 0:
                self._measure(runner)
        barrier()
        if is_main_process():
            runner.state_file.write(self._state("running", runner, runner.iter))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure and note how far the stage is, whenever a checkpoint is due."""
        interval = runner.cfg.default_hooks.checkpoint.interval
        last = batch_idx + 1 == runner.max_iters
        if last or not self.every_n_train_iters(runner, interval):
            return
        if self.held_out_cfg is not None:
            self._measure(runner)
        if is_main_process():
            runner.state_file.write(self._state("running", runner, batch_idx + 1))

    def after_train(self, runner) -> None:
        """Measure the end, check that frozen means frozen, write the parts, call it finished.

        Raises:
            DPAError: the LLM that ``align`` froze has changed.
        """
        model = unwrap(runner.model)
        if self.held_out_cfg is not None:
            self._measure(runner)
        if self.stage == "align" and (now := fingerprint(model.llm)) != self.frozen:
            raise DPAError(
                f"The LLM is frozen in align but its weights changed: {self.frozen[:12]} at the "
                f"start, {now[:12]} at the end. Nothing was written; please report this."
            )
        record = self.origin | {"step": self._steps(runner)}
        if "llm" in self.writes:
            record["trained_llm"] = fingerprint(model.llm, self.precision.fingerprint_dtype)
        for part, folder in self.writes.items():
            save_part(model, part, Path(folder), record, self.tokenizer)
            runner.logger.info(f"Wrote {part} to {folder}")
        barrier()
        if is_main_process():
            runner.state_file.write(self._state("finished", runner, runner.iter))
        barrier()

    def _measure(self, runner) -> None:
        model = unwrap(runner.model)
        # DeepSpeed's weights are of that type themselves.
        amp = self.precision.autocast(get_device(), enabled=not hasattr(runner, "strategy"))
        now = cross_entropy_per_token(model, self.held_out, runner.train_dataloader.batch_size, amp)
        step = self._steps(runner)
        if self.stage == "proxy":
            name = "original" if runner.iter == 0 else "floor"
            self.measured[name] = now
            text = ", ".join(f"{key} {value:.3f}" for key, value in self.measured.items())
            meaning = "text only: under the original LLM, and under the proxy (the floor)"
        else:
            name = "align"
            self.measured[name] = now
            text, meaning = f"align {now:.3f}", "with pictures"
            if "floor" in self.measured:
                text += f", floor {self.measured['floor']:.3f}"
                meaning += ", and the floor without: below it the picture is used"
        runner.logger.info(f"Held-out captions, nats per token ({meaning}): {text}")
        runner.visualizer.add_scalar(f"held_out/{name}", now, step=step)
        if self.stage == "align" and "floor" in self.measured:
            runner.visualizer.add_scalar("held_out/floor", self.measured["floor"], step=step)

    def _steps(self, runner) -> int:
        return steps_done(runner.cfg, runner.iter)

    def _state(self, status: str, runner, iterations: int) -> dict:
        state = {
            "status": status,
            "origin": self.origin,
            "run": run_facts(runner.cfg),
            "samples": self.samples,
            "measured": self.measured,
            "steps": steps_done(runner.cfg, iterations),
        }
        return state | {"writes": self.writes} if status == "finished" else state

    def _start(self) -> str:
        llm = self.origin["llm"]
        weights = f"weights: {llm['name']}, fingerprint {llm['fingerprint'][:12]}"
        if "initialised_from" in self.origin:
            return f"given {weights}, and the projector {self.loads['projector']}"
        from_proxy = self.loads.keys() & {"llm", "llm_adapter"}
        return f"{'the proxy' if from_proxy else 'the original LLM'}'s {weights} as in align"

    def _table(self, model: nn.Module) -> str:
        number = self.stages.index(self.stage) + 1
        rows = [f"Stage {self.stage} ({number} of {len(self.stages)})"]
        rows.append(f"  {'part':<15}{'trainable':>16}{'frozen':>16}  loaded from, written to")
        counts = count_parameters(model)
        # Merged into the LLM; a quantised one keeps the proxy's adapter beside its weights.
        beside = "llm_adapter" in counts and not counts["llm_adapter"][0]
        for part, (trainable, frozen) in counts.items():
            source = self.loads.get(part) or self.origin.get(part, {}).get("name")
            if part == "llm" and "llm_adapter" in self.loads and not beside:
                source += f" + {self.loads['llm_adapter']}"
            if (part == "llm_adapter" and not beside) or source is None:
                source = "new"
            target = f" -> {self.writes[part]}" if part in self.writes else ""
            rows.append(f"  {part:<15}{trainable:>16,}{frozen:>16,}  {source}{target}")
        return "\n".join(rows)


def _measured(folder: Path) -> dict[str, float]:
    return read_state(folder)["measured"]
