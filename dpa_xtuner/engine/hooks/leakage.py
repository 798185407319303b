"""Measures the style leakage of a projector when ``align`` is done."""

from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

from dpa_xtuner.engine.hooks.unwrap import autocast, unwrap
from dpa_xtuner.engine.state_file import steps_done
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.leakage import style_leakage
from dpa_xtuner.model.llm import load


@HOOKS.register_module()
class LeakageHook(Hook):
    """Logs what held-out captions cost the *original* LLM behind the projector.

    See :func:`dpa_xtuner.model.leakage.style_leakage`; the figures go into the stage's
    ``stage.json``. Where the stage ran on a proxy, the original LLM takes its place first: so this
    hook comes after :class:`HandOverHook`, when the stage is finished and on disk.

    Args:
        data: config of the held-out captions.
        batch_size: captions at a time on a device.
        original: config that loads the original LLM; None where it is the one in memory.
    """

    priority = "LOWEST"

    def __init__(self, data: dict, batch_size: int, original: dict | None):
        self.data, self.batch_size, self.original = data, batch_size, original

    def after_train(self, runner) -> None:
        """Measure, log and write down."""
        model = unwrap(runner.model)
        assert isinstance(model, DPALLaVAModel), "a stage that sees pictures"
        if self.original is not None:
            if _splits_weights(runner):
                runner.logger.info(
                    "The style leakage is not measured: under ZeRO-3 the original LLM can't take "
                    "the proxy's place."
                )
                return
            # Frees the memory before another LLM of its size: DeepSpeed refers to the parameters.
            for parameter in model.llm.parameters():
                parameter.data = parameter.data.new_empty(0)
            del model.llm
            model.llm = load(self.original)
            model.to(get_device())
        held_out = DATASETS.build(self.data)
        found = style_leakage(model, held_out, self.batch_size, autocast(runner))
        if not found:
            runner.logger.info(
                "The style leakage is not measured: no held-out caption has a picture that can be "
                "changed for another's."
            )
            return
        text = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        runner.logger.info(
            f"Held-out captions under the original LLM, nats per token: {text} (the style that the "
            f"projector carries: what the picture of another caption takes off)"
        )
        step = steps_done(runner.cfg, runner.iter)
        for name, value in found.items():
            runner.visualizer.add_scalar(f"held_out/{name}", value, step=step)
        runner.state_file.measured |= found
        if is_main_process():
            runner.state_file.write_measured()


def _splits_weights(runner) -> bool:
    strategy = runner.cfg.get("strategy")
    return strategy is not None and strategy.config["zero_optimization"]["stage"] == 3
