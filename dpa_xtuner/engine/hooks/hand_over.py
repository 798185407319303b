"""Hands one stage over to the next."""

from pathlib import Path

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.engine.state_file import steps_done
from dpa_xtuner.errors import DPAError
from dpa_xtuner.layout import ALIGN
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.stages.artifacts import (
    read_component_provenance,
    read_state,
    refuse_foreign,
    trained_key,
)
from dpa_xtuner.stages.components import (
    COMPONENTS,
    LLM,
    LLM_ADAPTER,
    PROJECTOR,
    PUBLISHED,
    count_parameters,
)
from dpa_xtuner.stages.inputs import provenance_of_loaded
from dpa_xtuner.stages.pipeline import resume_key


@HOOKS.register_module(name=["HandOverHook", "ProxyLLMHook"])
class HandOverHook(Hook):
    """Checks what a stage begins with, guards what is frozen, writes what the stage has trained.

    The priority is below that of the checkpoint hook, so that the last checkpoint is on disk
    before a stage is marked finished.

    Args:
        stage: name of the stage.
        stages: names of all stages of the method.
        loads: component -> folder that the model was built from.
        writes: component -> folder to write when the stage is done.
        guards: components whose weights must end as they began.
        provenance: what the stage is trained from, for ``stage.json`` and ``dpa.json``.
        samples: fingerprint of the data set; a resumed run must have the same.
    """

    priority = "LOWEST"

    def __init__(
        self,
        stage: str,
        stages: list[str],
        loads: dict,
        writes: dict,
        guards: list[str],
        provenance: dict,
        samples: str,
    ):
        self.stage, self.stages = stage, stages
        self.loads: dict[str, str] = dict(loads)
        self.writes = {each: writes[each] for each in COMPONENTS if each in writes}
        self.guards = [each for each in COMPONENTS if each in guards]
        self.provenance, self.samples = provenance, samples

    def before_train(self, runner) -> None:
        """Check what was loaded, log the stage's table, and mark the stage running.

        Raises:
            DPAError: a loaded component was trained on another LLM or encoder.
        """
        folder = Path(runner.work_dir)
        model = unwrap(runner.model)
        self.companions = {component: component.companion(runner.cfg) for component in self.writes}
        before = read_state(folder).get("origin", {}) if runner.iter else {}
        for side, value in model.fingerprints.items():
            self.provenance[side]["fingerprint"] = value
            if side in self.loads:  # its dpa.json says which published weights it was made from
                published = read_component_provenance(Path(self.loads[side]))[side]
                self.provenance[side]["fingerprint"] = published["fingerprint"]
        ours = {side: self.provenance[side] for side in model.fingerprints}
        refuse_foreign(folder, before, ours, "fingerprint")
        for loaded in map(Path, self.loads.values()):
            theirs = provenance_of_loaded(loaded, self.provenance[LLM]["name"])
            refuse_foreign(loaded, theirs, ours, "fingerprint")
        runner.logger.info(self._table(model))
        if PROJECTOR in self.loads:
            runner.logger.info(f"Stage {self.stage} begins from {self._start()}")
        self.frozen = {component: fingerprint(component.of(model)) for component in self.guards}
        barrier()
        self._write_running(runner, runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Write how far the stage is, whenever a checkpoint is due."""
        interval = runner.cfg.default_hooks.checkpoint.interval
        last = batch_idx + 1 == runner.max_iters
        if not last and self.every_n_train_iters(runner, interval):
            self._write_running(runner, batch_idx + 1)

    def after_train(self, runner) -> None:
        """Check that frozen weights are unchanged, write the components, mark the stage finished.

        Raises:
            DPAError: a guarded component has changed.
        """
        model = unwrap(runner.model)
        for component, before in self.frozen.items():
            if (now := fingerprint(component.of(model))) != before:
                raise DPAError(
                    f"The {component.label} is frozen in {self.stage} but its weights changed: "
                    f"{before[:12]} at the start, {now[:12]} at the end. Nothing was written; "
                    f"please report this."
                )
        written = self.provenance | {"step": steps_done(runner.cfg, runner.iter)}
        for component in PUBLISHED:
            if component in self.writes:
                value = fingerprint(component.of(model), model.precision.fingerprint_dtype)
                written[trained_key(component)] = value
        for component, folder in self.writes.items():
            component.save(model, Path(folder), written, self.companions[component])
            runner.logger.info(f"Wrote {component} to {folder}")
        barrier()
        if is_main_process():
            runner.state_file.write(self._state("finished", runner, runner.iter))
        barrier()

    def _write_running(self, runner, iterations: int) -> None:
        if is_main_process():
            runner.state_file.write(self._state("running", runner, iterations))
        barrier()  # or a rank could fail meanwhile, and the reason that it notes be overwritten

    def _state(self, status: str, runner, iterations: int) -> dict:
        state = {
            "status": status,
            "origin": self.provenance,
            "run": resume_key(runner.cfg),
            "samples": self.samples,
            "measured": runner.state_file.measured,
            "steps": steps_done(runner.cfg, iterations),
        }
        return state | {"writes": self.writes} if status == "finished" else state

    def _start(self) -> str:
        llm = self.provenance[LLM]
        weights = f"weights: {llm['name']}, fingerprint {llm['fingerprint'][:12]}"
        if "initialised_from" in self.provenance:
            return f"given {weights}, and the {PROJECTOR} {self.loads[PROJECTOR]}"
        from_proxy = self.loads.keys() & {LLM, LLM_ADAPTER}
        return f"{'the proxy' if from_proxy else 'the original LLM'}'s {weights} as in {ALIGN}"

    def _table(self, model: nn.Module) -> str:
        number = self.stages.index(self.stage) + 1
        rows = [f"Stage {self.stage} ({number} of {len(self.stages)})"]
        rows.append(f"  {'component':<15}{'trainable':>16}{'frozen':>16}  loaded from, written to")
        counts = count_parameters(model)
        # An adapter is merged into the LLM; a quantised LLM keeps it apart from its weights.
        kept_apart = LLM_ADAPTER in counts and not counts[LLM_ADAPTER][0]
        for component, (trainable, frozen) in counts.items():
            source = self.loads.get(component) or self.provenance.get(component, {}).get("name")
            if component == LLM and LLM_ADAPTER in self.loads and not kept_apart:
                source += f" + {self.loads[LLM_ADAPTER]}"
            if (component == LLM_ADAPTER and not kept_apart) or source is None:
                source = "new"
            target = f" -> {self.writes[component]}" if component in self.writes else ""
            rows.append(f"  {component:<15}{trainable:>16,}{frozen:>16,}  {source}{target}")
        return "\n".join(rows)
