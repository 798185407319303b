"""What only a whole optimizer step knows: the divisor of its gradients, and the log's figures."""

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dpa_xtuner.engine.hooks.unwrap import unwrap
from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import statistics
from dpa_xtuner.loss.relevance import EPS, FIGURES


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
        self.sums: dict[str, float] | None = None  # of a whole step, until they are logged
        engine = getattr(runner.optim_wrapper, "model", None)
        if engine is None:
            self._divide_gradients(runner.optim_wrapper)
        else:
            self._scale_deepspeed_loss(runner.optim_wrapper, engine)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Replace the micro-batch's figures by the step's, at its end; before it there are none."""
        if outputs is None:
            return
        for name in FIGURES:
            outputs.pop(name, None)
        if self.sums is not None:
            outputs.update(statistics(self.sums))
            if self.objective.normalize == "micro_batch":  # what was minimised
                outputs["loss"] = self.sums["micro_batch_loss"] / self.sums["micro_batches"]
            self.sums = None

    def _divide_gradients(self, wrapper) -> None:
        take_step = wrapper.step

        def step(**kwargs) -> None:
            factor = 1 / self._finish_sums()
            if factor != 1:
                for group in wrapper.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)
            take_step(**kwargs)

        wrapper.step = step

    def _scale_deepspeed_loss(self, wrapper, engine) -> None:
        take_step = wrapper.step
        optimizer = engine.optimizer
        divides = self.objective.normalize == "global"
        if divides and not hasattr(optimizer, "loss_scaler"):
            raise DPAError(
                f"normalize='global' does not work with {type(optimizer).__name__}: use "
                f"--deepspeed zero1, zero2 or zero3, or normalize='micro_batch'."
            )

        def step(**kwargs) -> None:
            if not engine.is_gradient_accumulation_boundary():
                take_step(**kwargs)
                return
            divisor = self._finish_sums()
            if not divides:
                take_step(**kwargs)
                return
            optimizer.loss_scale *= divisor
            try:
                take_step(**kwargs)
            finally:  # fp16's scale may have been adapted by the step: undo our factor only
                optimizer.loss_scale /= divisor

        wrapper.step = step

    def _finish_sums(self) -> float:
        """Keep the sums of the step for the log, and return what its gradients are divided by."""
        self.sums = self._exchange()
        if self.objective.normalize != "global":
            return 1.0
        # Gradients come as means over ranks and micro-batches, and should be sums.
        return (self.sums["weight"] + EPS) / self.sums["micro_batches"]

    def _exchange(self) -> dict[str, float]:
        """The sums of the step over all ranks: one collective, and one wait for the device."""
        names, values = zip(*self.objective.seen.items(), strict=True)
        sums = torch.stack(values)
        all_reduce(sums)
        self.objective.seen = {}
        return dict(zip(names, sums.tolist(), strict=True))
