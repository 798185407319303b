"""The components of a model: each knows how it is built, frozen, counted, written and read.

The stage table (:mod:`dpa_xtuner.stages.table`) says which component each stage builds, loads,
trains and writes. Everything else loops over :data:`COMPONENTS` and asks.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, nn
from transformers import PretrainedConfig
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.model.configs import architecture
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.model.llm_folder import save_llm

if TYPE_CHECKING:  # models build on components, stages on models
    from dpa_xtuner.model.dpa_llava import DPALLaVAModel
    from dpa_xtuner.stages.run import Run
    from dpa_xtuner.stages.settings import Settings, StageSettings
    from dpa_xtuner.stages.table import StagePlan


class Component(str):
    """A component of a model. It is its own name, in the table, in records and for folders.

    Attributes:
        label: what people call it.
        module: the attribute of the model that holds it.
        settings: settings of a stage that matter only where the stage trains it.
        rate: of these, the one that is its own learning rate.
    """

    label: str
    module: str
    settings: tuple[str, ...] = ()
    rate: str | None = None

    def of(self, model: nn.Module) -> Any:
        """The module of a stage's model that holds it."""
        return getattr(model, self.module)

    def owns(self, parameter: str) -> bool:
        """Whether a parameter of a model is one of its own, by the parameter's name."""
        return parameter.startswith(f"{self.module}.")

    def configure(self, model: dict, plan: StagePlan) -> None:
        """Say in the config of a stage's model how this component is built, loaded and frozen.

        Args:
            model: the config; changed in place.
            plan: of the stage.
        """
        raise NotImplementedError

    def companion(self, cfg: Config) -> Any:
        """What is written beside the weights, such as a tokenizer; None for nothing."""
        return None

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is written of it, on the CPU of rank 0.

        Every rank must call it, since ZeRO-3 gathers; other ranks get an empty dict.
        """
        return _whole(dict(self.of(model).named_parameters()))

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """Write it as its own library reads it.

        Args:
            model: the stage's model, not wrapped.
            state: from :meth:`state`.
            folder: where to; exists.
            companion: from :meth:`companion`.
        """
        self.of(model).save_pretrained(folder, state_dict=state)


class Published(Component):
    """A component that a run begins with as it was published: records hold what it was."""

    @property
    def setting(self) -> str:
        """The setting that names the published model."""
        return f"{self}_name_or_path"

    def name(self, settings: Settings) -> str:
        """The published model that a run begins with."""
        return getattr(settings, self.setting)

    def facts(self, run: Run) -> dict:
        """Name and architecture, as records have them.

        Raises:
            DPAError: neither a folder nor the hub has the model.
        """
        return {"name": self.name(run.settings), "architecture": architecture(self.config(run))}

    def config(self, run: Run) -> PretrainedConfig:
        """The published configuration.

        Raises:
            DPAError: neither a folder nor the hub has it.
        """
        raise NotImplementedError

    def configure(self, model: dict, plan: StagePlan) -> None:
        """See :meth:`Component.configure`."""
        loader, trained = dict(plan.cfg.model[self]), self in plan.stage.trains
        if self in plan.stage.loads:
            loader["pretrained_model_name_or_path"] = plan.loaded_from(self)
        if trained and not plan.deepspeed:
            # Weights that an optimizer changes are float32 under autocast; DeepSpeed keeps
            # its own float32 copies.
            loader["torch_dtype"] = "torch.float32"
        model[self] = loader
        if plan.sees_pictures:
            model[f"freeze_{self}"] = not trained


class _LLM(Published):
    label, module = "LLM", "llm"

    def owns(self, parameter: str) -> bool:
        """All of the LLM's but adapters."""
        return super().owns(parameter) and ".lora_" not in parameter

    def config(self, run: Run) -> PretrainedConfig:
        """See :meth:`Published.config`."""
        return run.llm_config

    def companion(self, cfg: Config) -> Any:
        """Its tokenizer."""
        return BUILDER.build(cfg.tokenizer.to_dict())

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """As a ``from_pretrained`` folder with its tokenizer."""
        save_llm(self.of(model), companion, folder, state_dict=state)


class _LLMAdapter(Component):
    label, module, settings = "LLM's adapter", "llm", ("lora",)

    def owns(self, parameter: str) -> bool:
        """The LoRA weights of the LLM."""
        return super().owns(parameter) and ".lora_" in parameter

    def configure(self, model: dict, plan: StagePlan) -> None:
        """See :meth:`Component.configure`.

        Raises:
            DPAError: the stage trains an adapter, and has no settings for it.
        """
        key, lora = "llm_lora" if plan.sees_pictures else "lora", None
        if self in plan.stage.trains:
            if not hasattr(plan.own, "lora"):
                raise DPAError(
                    f"Stage {plan.stage.name} trains {self}, and {plan.stage.name}.lora is no "
                    f"setting: give its class of settings the field lora."
                )
            lora = dict(
                type="peft.LoraConfig", task_type="CAUSAL_LM", bias="none",
                **plan.own.lora.model_dump(), target_modules=lora_targets(plan.cfg, plan.settings),
            )  # fmt: skip
        model[key] = lora
        if self in plan.stage.loads:
            model["merged_adapter"] = plan.loaded_from(self)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that are trained, as peft names them."""
        named = self.of(model).named_parameters()
        return _whole({name: p for name, p in named if p.requires_grad})

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """As a PEFT folder."""
        # peft would look for the base model's config on a hub.
        self.of(model).save_pretrained(folder, state_dict=state, save_embedding_layers=False)


class _VisualEncoder(Published):
    label, module = "visual encoder", "visual_encoder"
    settings, rate = ("train_visual_encoder", "visual_encoder_lr"), "visual_encoder_lr"

    def config(self, run: Run) -> PretrainedConfig:
        """See :meth:`Published.config`; the configuration may also be of another kind."""
        return run.encoder_config

    def configure(self, model: dict, plan: StagePlan) -> None:
        """See :meth:`Component.configure`."""
        if self not in plan.stage.builds:
            for key in (self, "visual_select_layer"):
                model.pop(key, None)
            return
        super().configure(model, plan)
        model["encoder"] = plan.settings.encoder

    def companion(self, cfg: Config) -> Any:
        """Its image processor."""
        return BUILDER.build(cfg.image_processor.to_dict())

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters, also those that its features don't read, and buffers such as a norm's."""
        module = self.of(model)
        kept = module.state_dict().keys()
        buffers = {name: b for name, b in module.named_buffers() if name in kept}
        return super().state(model) | (_whole(buffers) if buffers else {})

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """As a ``from_pretrained`` folder with its image processor."""
        spec = cast("DPALLaVAModel", model).encoder_spec
        spec.save(self.of(model), folder, state, companion)


class _Projector(Component):
    label, module, settings, rate = "projector", "projector", ("projector_lr",), "projector_lr"

    def configure(self, model: dict, plan: StagePlan) -> None:
        """See :meth:`Component.configure`."""
        if self not in plan.stage.builds:
            return
        model[self] = plan.settings.projector
        if self in plan.stage.loads:
            model["pretrained_projector"] = plan.loaded_from(self)
        if self not in plan.stage.trains:
            model["freeze_projector"] = True


LLM = _LLM("llm")
LLM_ADAPTER = _LLMAdapter("llm_adapter")
VISUAL_ENCODER = _VisualEncoder("visual_encoder")
PROJECTOR = _Projector("projector")
COMPONENTS = (LLM, LLM_ADAPTER, VISUAL_ENCODER, PROJECTOR)
"""Every component that a stage may build, in the order of the log."""
PUBLISHED = (LLM, VISUAL_ENCODER)
"""Those that a run begins with as they were published. Records hold their names, architectures and
fingerprints."""


def find_component(name: str) -> Component:
    """The component of a name.

    Raises:
        DPAError: there is none.
    """
    for component in COMPONENTS:
        if component == name:
            return component
    raise DPAError(
        f"{name!r} is not a component of a model{nearest(name, COMPONENTS) or '.'} Known: "
        f"{', '.join(COMPONENTS)}."
    )


def count_parameters(model: nn.Module) -> dict[Component, tuple[int, int]]:
    """Trainable and frozen parameters of each component, ZeRO-3's split ones counted whole."""
    counts: dict[Component, tuple[int, int]] = {}
    for component in COMPONENTS:
        sizes = [0, 0]
        for name, parameter in model.named_parameters():
            if component.owns(name):
                size = getattr(parameter, "ds_numel", parameter.numel())
                sizes[not parameter.requires_grad] += size
        if any(sizes):
            counts[component] = sizes[0], sizes[1]
    return counts


def trained_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: what is trained, and the buffers beside it.

    Args:
        model: the stage's.
        state: its whole state dict.
    """
    named = model.named_parameters(remove_duplicate=False)
    trains = {name: parameter.requires_grad for name, parameter in named}
    modules = {name.split(".")[0] for name, trained in trains.items() if trained}
    buffers = {name for name, _ in model.named_buffers() if name.split(".")[0] in modules}
    # MMEngine sets an attribute of it, which a plain dict can't have.
    return OrderedDict((k, v) for k, v in state.items() if trains.get(k, k in buffers))


def lora_targets(cfg: Config, settings: Settings) -> list[str] | None:
    """The family's, where its loader is used; None for every linear layer but the head."""
    family = settings.llm_family
    if family is None or cfg.model[LLM].type != family.llm:
        return None
    return list(family.lora_targets)


def own_rates(own: StageSettings, trains: tuple[str, ...]) -> dict[str, float]:
    """The learning rates of a stage's own components, by the setting's name.

    Args:
        own: settings of the stage.
        trains: the components that it trains.
    """
    names = [c.rate for c in COMPONENTS if c.rate is not None and c in trains]
    given = {name: getattr(own, name, None) for name in names}
    return {name: rate for name, rate in given.items() if rate is not None}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        with gathered([tensor]):
            if is_main_process():
                state[name] = tensor.detach().to("cpu", copy=True)
    return state
