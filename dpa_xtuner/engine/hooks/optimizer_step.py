"""Normalises the gradients of a whole optimizer step, and logs the figures of whole steps."""

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

    The sum of a step's weights is known only after its last micro-batch. So each micro-batch gives
    the gradient of its sum, and before the optimizer's step we divide by the weights of all ranks
    and micro-batches. We divide ``p.grad``. DeepSpeed hides its gradients, so we raise its loss
    scale for one step; DeepSpeed divides by it before clipping.

    The log gets the figures of the whole step, at its end. The priority is above that of the
    MMEngine hook that logs them.
    """

    priority = "HIGHEST"

    def before_train(self, runner) -> None:
        """Exchange sums between the ranks, and divide, before each optimizer step.

        Raises:
            DPAError: this DeepSpeed optimizer has no loss scale.
        """
        self.objective = unwrap(runner.model).objective
        self.sums: dict[str, float] | None = None  # of a whole step, until they are logged
        engine = getattr(runner.optim_wrapper, "model", None)
        if engine is None:
            self._divide_gradients(runner.optim_wrapper)
        else:
            self._scale_deepspeed_loss(runner.optim_wrapper, engine)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Log the figures of the step at its end, and none of single micro-batches."""
        if outputs is None:
            return
        for name in FIGURES:  # of a micro-batch
            outputs.pop(name, None)
        if self.sums is not None:
            outputs.update(statistics(self.sums))
            if self.objective.normalize == "micro_batch":  # what was minimised
                outputs["loss"] = self.sums["micro_batch_loss"] / self.sums["micro_batches"]
            self.sums = None

    def _divide_gradients(self, wrapper) -> None:
        take_step = wrapper.step

        def step(**kwargs) -> None:
            """Divide the gradients of the step, then take it."""
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
            """Take the step at a raised loss scale; nothing changes between two steps."""
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
            finally:  # the step may have adapted fp16's scale: undo our factor only
                optimizer.loss_scale /= divisor

        wrapper.step = step

    def _finish_sums(self) -> float:
        """Keep the step's sums for the log, and return the divisor of its gradients."""
        self.sums = self._exchange()
        if self.objective.normalize != "global":
            return 1.0
        # Gradients arrive as means over ranks and micro-batches; we want sums.
        return (self.sums["weight"] + EPS) / self.sums["micro_batches"]

    def _exchange(self) -> dict[str, float]:
        """Add up the step's sums over all ranks: one collective, one wait for the device."""
        names, values = zip(*self.objective.seen.items(), strict=True)
        sums = torch.stack(values)  # (number of sums,)
        all_reduce(sums)
        self.objective.seen = {}
        return dict(zip(names, sums.tolist(), strict=True))
