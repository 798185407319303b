"""The components of a model: each knows how it is configured, frozen, counted and written.

The stage table (:mod:`dpa_xtuner.stages.table`) says which component each stage builds, loads,
trains and writes. Everything else loops over :data:`COMPONENTS` and asks.
"""

from pathlib import Path
from typing import Any, cast

from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, nn
from xtuner.registry import BUILDER

from dpa_xtuner import layout
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder, write_json
from dpa_xtuner.layout import PROVENANCE_FILE
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.model.llm_folder import save_llm
from dpa_xtuner.stages.artifacts import KIND
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import Settings
from dpa_xtuner.stages.table import Stage
from dpa_xtuner.versions import installed_versions


class Component(str):
    """A component of a model. As a string, it is its name in the table, in files and of folders.

    Attributes:
        label: its name for people.
        module: the attribute of the model that holds it.
        loaded_as: the key of the model's config for the folder it is loaded from.
        rate: the setting of a stage that is the component's learning rate.
    """

    label: str
    module: str
    loaded_as: str = ""
    rate: str | None = None

    def of(self, model: nn.Module) -> Any:
        """Return the module of a stage's model that holds it."""
        return getattr(model, self.module)

    def owns(self, parameter: str) -> bool:
        """Tell by a parameter's name whether it belongs to this component."""
        return parameter.startswith(f"{self.module}.")

    def configure(self, model: dict, run: Run, stage: Stage) -> None:
        """Set in a model's config how this component is built, loaded and frozen.

        Args:
            model: the config; changed in place.
            run: the run.
            stage: the row of the stage table.
        """
        if self in stage.loads:
            model[self.loaded_as] = str(run.work_dir / stage.loads[self])

    def companion(self, cfg: Config) -> Any:
        """Build what is written next to the weights, such as a tokenizer; None for nothing."""
        return None

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Collect the weights to write, on the CPU of rank 0.

        Every rank must call it, since ZeRO-3 gathers; other ranks get an empty dict.
        """
        return _gathered_on_cpu(dict(self.of(model).named_parameters()))

    def save(self, model: nn.Module, folder: Path, provenance: dict, companion: Any = None) -> None:
        """Write the trained component in the format of its own library, with its ``dpa.json``.

        Every rank must call it, since ZeRO-3 gathers; rank 0 writes. All weights are safetensors.

        Args:
            model: the stage's model, not wrapped by DDP or DeepSpeed.
            folder: target folder; replaced if it exists.
            provenance: goes into ``dpa.json``, together with the tensors' shapes.
            companion: the result of :meth:`companion`.
        """
        state = self.state(model)
        if not is_main_process():
            return
        with whole_folder(folder) as partial:
            shapes = {name: list(tensor.shape) for name, tensor in state.items()}
            self.write(model, state, partial, companion)  # transformers 5 empties the state
            versions = installed_versions()
            content = {KIND: self, **provenance, "versions": versions, "shapes": shapes}
            write_json(partial / PROVENANCE_FILE, content)

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """Write it in the format of its own library.

        Args:
            model: the stage's model, not wrapped.
            state: the result of :meth:`state`.
            folder: target folder; exists.
            companion: the result of :meth:`companion`.
        """
        self.of(model).save_pretrained(folder, state_dict=state)


class Published(Component):
    """A component that a run loads as it was published; ``dpa.json`` says which model it was."""

    @property
    def setting(self) -> str:
        """The setting that names the published model."""
        return f"{self}_name_or_path"

    def name(self, settings: Settings) -> str:
        """Return the folder or hub name of the published model."""
        return getattr(settings, self.setting)

    def configure(self, model: dict, run: Run, stage: Stage) -> None:
        """See :meth:`Component.configure`."""
        loader, trained = dict(run.cfg.model[self]), self in stage.trains
        if self in stage.loads:
            loader["pretrained_model_name_or_path"] = str(run.work_dir / stage.loads[self])
        if trained and not run.deepspeed:
            # Trained weights are float32, under autocast. DeepSpeed keeps its own float32 copies.
            loader["torch_dtype"] = "torch.float32"
        model[self] = loader
        if stage.sees_pictures:
            model[f"freeze_{self}"] = not trained


class _LLM(Published):
    label, module = "LLM", "llm"

    def owns(self, parameter: str) -> bool:
        """Tell whether a parameter is the LLM's, adapters left out."""
        return super().owns(parameter) and ".lora_" not in parameter

    def companion(self, cfg: Config) -> Any:
        """Build its tokenizer."""
        return BUILDER.build(cfg.tokenizer.to_dict())

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """Write a ``from_pretrained`` folder with its tokenizer."""
        save_llm(self.of(model), companion, folder, state_dict=state)


class _LLMAdapter(Component):
    label, module, loaded_as = "LLM's adapter", "llm", "merged_adapter"

    def owns(self, parameter: str) -> bool:
        """Tell whether a parameter is one of the LLM's LoRA weights."""
        return super().owns(parameter) and ".lora_" in parameter

    def configure(self, model: dict, run: Run, stage: Stage) -> None:
        """See :meth:`Component.configure`.

        Raises:
            DPAError: the stage trains an adapter, but has no settings for it.
        """
        super().configure(model, run, stage)
        key, lora = "llm_lora" if stage.sees_pictures else "lora", None
        if self in stage.trains:
            settings = getattr(run.settings.of_stage(stage.name), "lora", None)
            if settings is None:
                raise DPAError(
                    f"Stage {stage.name} trains {self}, but {stage.name}.lora is not a setting: "
                    f"add the field lora to its class of settings."
                )
            lora = dict(
                type="peft.LoraConfig", task_type="CAUSAL_LM", bias="none", **settings.model_dump(),
                target_modules=run.lora_targets,
            )  # fmt: skip
        model[key] = lora

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Collect the trained weights, under peft's names."""
        named = self.of(model).named_parameters()
        return _gathered_on_cpu({name: p for name, p in named if p.requires_grad})

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """Write a PEFT folder."""
        # Without save_embedding_layers=False, peft would look for the base model on the hub.
        self.of(model).save_pretrained(folder, state_dict=state, save_embedding_layers=False)


class _VisualEncoder(Published):
    label, module, rate = "visual encoder", "visual_encoder", "visual_encoder_lr"

    def configure(self, model: dict, run: Run, stage: Stage) -> None:
        """See :meth:`Component.configure`."""
        if self not in stage.builds:
            for key in (self, "visual_select_layer"):
                model.pop(key, None)
            return
        super().configure(model, run, stage)
        model["encoder"] = run.settings.encoder

    def companion(self, cfg: Config) -> Any:
        """Build its image processor."""
        return BUILDER.build(cfg.image_processor.to_dict())

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Collect all parameters, also unused ones, and persistent buffers, such as a norm's."""
        module = self.of(model)
        kept = module.state_dict().keys()
        buffers = {name: b for name, b in module.named_buffers() if name in kept}
        return super().state(model) | (_gathered_on_cpu(buffers) if buffers else {})

    def write(self, model: nn.Module, state: dict[str, Tensor], folder: Path, companion) -> None:
        """Write a ``from_pretrained`` folder with its image processor."""
        spec = cast(DPALLaVAModel, model).encoder_spec
        spec.save(self.of(model), folder, state, companion)


class _Projector(Component):
    label, module, loaded_as = "projector", "projector", "pretrained_projector"
    rate = "projector_lr"

    def configure(self, model: dict, run: Run, stage: Stage) -> None:
        """See :meth:`Component.configure`."""
        if self not in stage.builds:
            return
        super().configure(model, run, stage)
        model[self] = run.settings.projector
        if self not in stage.trains:
            model["freeze_projector"] = True


LLM = _LLM(layout.LLM)
LLM_ADAPTER = _LLMAdapter(layout.LLM_ADAPTER)
VISUAL_ENCODER = _VisualEncoder(layout.VISUAL_ENCODER)
PROJECTOR = _Projector(layout.PROJECTOR)
COMPONENTS: tuple[Component, ...] = (LLM, LLM_ADAPTER, VISUAL_ENCODER, PROJECTOR)
"""Every component that a stage may build, in the order of the log."""
PUBLISHED: tuple[Published, ...] = (LLM, VISUAL_ENCODER)
"""The components that a run loads as they were published. State files and ``dpa.json`` hold their
names, architectures and fingerprints."""


def count_parameters(model: nn.Module) -> dict[Component, tuple[int, int]]:
    """Count trainable and frozen parameters of each component; ZeRO-3's split ones count whole."""
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


def _gathered_on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        with gathered([tensor]):
            if is_main_process():
                state[name] = tensor.detach().to("cpu", copy=True)
    return state
