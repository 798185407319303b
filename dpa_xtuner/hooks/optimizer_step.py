"""What only a whole optimizer step knows: the divisor of its gradients, and the log's figures."""

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dpa_xtuner.errors import DPAError
from dpa_xtuner.hooks.unwrap import unwrap
from dpa_xtuner.loss import statistics
from dpa_xtuner.loss.relevance import EPS


@HOOKS.register_module(name=["OptimizerStepHook", "GlobalNormalizationHook"])
class OptimizerStepHook(Hook):
    """Makes ``normalize="global"`` true, however a batch is cut, and logs whole steps.

    The weights of a step are only known after its last micro-batch has passed, so each
    micro-batch gives the gradient of its sum, and before the optimizer's step we divide by the
    weights of all ranks and micro-batches. We divide ``p.grad``; DeepSpeed hides its gradients,
    so there we raise its loss scale for one step, which it divides by before clipping.

    The log gets the figures of the whole step, at its end. The priority is above that of
    MMEngine's hook that writes them down.
    """

    priority = "HIGHEST"

    def before_train(self, runner) -> None:
        """Put the exchange between the ranks, and the division, in front of the optimizer's step.

        Raises:
            DPAError: this optimizer has no place for it.
        """
        self.objective = unwrap(runner.model).objective
        self.step: dict[str, float] | None = None
        wrapper = runner.optim_wrapper
        take_step = wrapper.step
        engine = getattr(wrapper, "model", None)  # DeepSpeed's
        divides = self.objective.normalize == "global"
        if divides and engine is not None and not hasattr(engine.optimizer, "loss_scaler"):
            raise DPAError(
                f"normalize='global' does not work with {type(engine.optimizer).__name__}: use "
                f"--deepspeed zero1, zero2 or zero3, or normalize='micro_batch'."
            )

        def step_of_all(**kwargs) -> None:
            if engine is not None and not engine.is_gradient_accumulation_boundary():
                take_step(**kwargs)
                return
            self.step = self._exchange()
            # Gradients come as means over ranks and micro-batches, and should be sums.
            divisor = (self.step["weight"] + EPS) / self.step["micro_batches"] if divides else 1.0
            if engine is None:
                if divides:
                    for group in wrapper.param_groups:
                        for parameter in group["params"]:
                            if parameter.grad is not None:
                                parameter.grad.mul_(1 / divisor)
                take_step(**kwargs)
                return
            optimizer = engine.optimizer
            if divides:
                optimizer.loss_scale *= divisor
            try:
                take_step(**kwargs)
            finally:  # float16's may have been adapted meanwhile, so not to what it was
                if divides:
                    optimizer.loss_scale /= divisor

        wrapper.step = step_of_all

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Replace the micro-batch's figures by the step's, at its end; before it there are none."""
        if outputs is None:
            return
        outputs.clear()
        if self.step is not None:
            outputs.update(statistics(self.step))
            if self.objective.normalize == "micro_batch":  # what was minimised
                outputs["loss"] = self.step["micro_batch_loss"] / self.step["micro_batches"]
            self.step = None

    def _exchange(self) -> dict[str, float]:
        """The sums of the step over all ranks: one collective, and one wait for the device."""
        names, values = zip(*self.objective.seen.items(), strict=True)
        sums = torch.stack(values)
        all_reduce(sums)
        self.objective.seen = {}
        return dict(zip(names, sums.tolist(), strict=True))
