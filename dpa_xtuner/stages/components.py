"""The components of a model: each knows how it is configured, frozen, counted and written.

The stage table (:mod:`dpa_xtuner.stages.table`) says which component each stage builds, loads,
trains and writes. Everything else loops over :data:`COMPONENTS` and asks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, nn
from xtuner.registry import BUILDER

from dpa_xtuner import layout
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.model.llm_folder import save_llm
from dpa_xtuner.stages.settings import Settings


@dataclass(frozen=True)
class ModelPlan:
    """What the components of a stage's model need to know before it is built.

    Attributes:
        cfg: the config, filled in by :func:`dpa_xtuner.stages.run.fill_in_loaders`.
        settings: read from it.
        stage: name of the stage.
        builds: components that the model has.
        loads: component -> folder that it is loaded from.
        trains: components that get gradients.
        lora_targets: the layers that LoRA adapts; None for every linear layer but the head.
        deepspeed: whether DeepSpeed keeps the float32 copies of the weights.
    """

    cfg: Config
    settings: Settings
    stage: str
    builds: tuple[str, ...]
    loads: dict[str, str]
    trains: tuple[str, ...]
    lora_targets: list[str] | None
    deepspeed: bool

    @property
    def sees_pictures(self) -> bool:
        """Whether the model takes images."""
        return VISUAL_ENCODER in self.builds


class Component(str):
    """A component of a model. It is its own name, in the table, in records and for folders.

    Attributes:
        label: what people call it.
        module: the attribute of the model that holds it.
        loaded_as: the key of the model's config that takes the folder it is loaded from.
        settings: settings of a stage that matter only where the stage trains it.
        rate: of these, the one that is its own learning rate.
    """

    label: str
    module: str
    loaded_as: str = ""
    settings: tuple[str, ...] = ()
    rate: str | None = None

    def of(self, model: nn.Module) -> Any:
        """The module of a stage's model that holds it."""
        return getattr(model, self.module)

    def owns(self, parameter: str) -> bool:
        """Whether a parameter of a model is one of its own, by the parameter's name."""
        return parameter.startswith(f"{self.module}.")

    def configure(self, model: dict, plan: ModelPlan) -> None:
        """Say in the config of a stage's model how this component is built, loaded and frozen.

        Args:
            model: the config; changed in place.
            plan: of the stage.
        """
        if self in plan.loads:
            model[self.loaded_as] = plan.loads[self]

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

    def configure(self, model: dict, plan: ModelPlan) -> None:
        """See :meth:`Component.configure`."""
        loader, trained = dict(plan.cfg.model[self]), self in plan.trains
        if self in plan.loads:
            loader["pretrained_model_name_or_path"] = plan.loads[self]
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

    def companion(self, cfg: Config) -> Any:
        """Its tokenizer."""
        return BUILDER.build(cfg.tokenizer.to_dict())

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """As a ``from_pretrained`` folder with its tokenizer."""
        save_llm(self.of(model), companion, folder, state_dict=state)


class _LLMAdapter(Component):
    label, module, loaded_as, settings = "LLM's adapter", "llm", "merged_adapter", ("lora",)

    def owns(self, parameter: str) -> bool:
        """The LoRA weights of the LLM."""
        return super().owns(parameter) and ".lora_" in parameter

    def configure(self, model: dict, plan: ModelPlan) -> None:
        """See :meth:`Component.configure`.

        Raises:
            DPAError: the stage trains an adapter, and has no settings for it.
        """
        super().configure(model, plan)
        key, lora = "llm_lora" if plan.sees_pictures else "lora", None
        if self in plan.trains:
            own = getattr(plan.settings.of_stage(plan.stage), "lora", None)
            if own is None:
                raise DPAError(
                    f"Stage {plan.stage} trains {self}, and {plan.stage}.lora is no setting: give "
                    f"its class of settings the field lora."
                )
            lora = dict(
                type="peft.LoraConfig", task_type="CAUSAL_LM", bias="none", **own.model_dump(),
                target_modules=plan.lora_targets,
            )  # fmt: skip
        model[key] = lora

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

    def configure(self, model: dict, plan: ModelPlan) -> None:
        """See :meth:`Component.configure`."""
        if self not in plan.builds:
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
        spec = cast(DPALLaVAModel, model).encoder_spec
        spec.save(self.of(model), folder, state, companion)


class _Projector(Component):
    label, module, loaded_as = "projector", "projector", "pretrained_projector"
    settings, rate = ("projector_lr",), "projector_lr"

    def configure(self, model: dict, plan: ModelPlan) -> None:
        """See :meth:`Component.configure`."""
        if self not in plan.builds:
            return
        super().configure(model, plan)
        model[self] = plan.settings.projector
        if self not in plan.trains:
            model["freeze_projector"] = True


LLM = _LLM(layout.LLM)
LLM_ADAPTER = _LLMAdapter(layout.LLM_ADAPTER)
VISUAL_ENCODER = _VisualEncoder(layout.VISUAL_ENCODER)
PROJECTOR = _Projector(layout.PROJECTOR)
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


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        with gathered([tensor]):
            if is_main_process():
                state[name] = tensor.detach().to("cpu", copy=True)
    return state
