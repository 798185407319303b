"""Divides gradients by the weight of a whole optimizer step."""

from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from dpa_xtuner.errors import DPAError
from dpa_xtuner.hooks.unwrap import unwrap
from dpa_xtuner.loss.relevance import EPS


@HOOKS.register_module()
class GlobalNormalizationHook(Hook):
    """Makes ``normalize="global"`` true, however a batch is cut.

    The weights of a step are only known after its last micro-batch has passed, so each
    micro-batch gives the gradient of its sum, and the optimizer's step divides: by the
    gradients' own factor, or with DeepSpeed, whose gradients are its own, by its loss
    scale, which it takes off before clipping.
    """

    def before_train(self, runner) -> None:
        """Put the division in front of the optimizer's step.

        Raises:
            DPAError: this optimizer has no place for it.
        """
        self.objective = unwrap(runner.model).objective
        wrapper = runner.optim_wrapper
        step = wrapper.step
        engine = getattr(wrapper, "model", None)  # DeepSpeed's
        if engine is not None and not hasattr(engine.optimizer, "loss_scaler"):
            raise DPAError(
                f"normalize='global' does not work with {type(engine.optimizer).__name__}: use "
                f"--deepspeed zero1, zero2 or zero3, or normalize='micro_batch'."
            )

        def divided_step(**kwargs) -> None:
            if engine is None:
                counts = wrapper._accumulative_counts
                factor = 1 / self._divisor(counts)
                for group in wrapper.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)
                step(**kwargs)
            elif not engine.is_gradient_accumulation_boundary():
                step(**kwargs)
            else:
                optimizer = engine.optimizer
                counts = engine.gradient_accumulation_steps()
                divisor = self._divisor(counts).item()
                optimizer.loss_scale *= divisor
                try:
                    step(**kwargs)
                finally:  # float16's may have been adapted meanwhile, so not to what it was
                    optimizer.loss_scale /= divisor

        wrapper.step = divided_step

    def _divisor(self, accumulative_counts: int) -> Tensor:
        # Gradients come as means over ranks and micro-batches, and should be sums.
        total = self.objective.weight_sum
        all_reduce(total)
        self.objective.weight_sum = total.new_zeros(())
        return (total + EPS) / (accumulative_counts * get_world_size())
