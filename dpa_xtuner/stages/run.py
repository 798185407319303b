"""A run, resolved once from its config: all that is known before weights are loaded."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.utils import get_object_from_string
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from xtuner.registry import BUILDER

from dpa_xtuner.declared import problems, taken
from dpa_xtuner.errors import DPAError, nearest, refuse
from dpa_xtuner.families import check_model_type
from dpa_xtuner.families.base import Family
from dpa_xtuner.families.template_check import check_template
from dpa_xtuner.layout import LLM, STAGE_NAMES, VISUAL_ENCODER
from dpa_xtuner.model.configs import read_config
from dpa_xtuner.model.encoders import VisionEncoderSpec
from dpa_xtuner.model.projectors import ProjectorModule, build_projector, projected_tokens
from dpa_xtuner.precision import Precision, choose_precision
from dpa_xtuner.stages.artifacts import read_state
from dpa_xtuner.stages.settings import Settings, find_encoder_spec, read_settings
from dpa_xtuner.stages.table import Stage, stage_table

# The methods to which a from_pretrained passes its keywords.
_LOADING = ("from_pretrained", "_from_pretrained", "from_dict", "get_image_processor_dict")
# A folder that has none of these has no tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tokenization_*.py")


@dataclass(frozen=True)
class Run:
    """A run. It reads each model's configuration and the tokenizer once.

    Attributes:
        cfg: the config, filled in by :func:`fill_in_loaders`.
        settings: the settings of that config.
        precision: what all stages compute in.
    """

    cfg: Config
    settings: Settings
    precision: Precision

    @classmethod
    def of(cls, cfg: Config, precision: Precision | None = None) -> "Run":
        """Read and check the settings of a config, and resolve its run.

        Args:
            cfg: a DPA config; not changed.
            precision: what all stages compute in; None for that of the first stage, or what fits
                the device.

        Raises:
            DPAError: settings can't be used, the config names two LLMs, or the run began with
                another precision than the settings name.
        """
        settings = read_settings(cfg)
        precision = precision or _precision(Path(cfg.work_dir), settings)
        return cls(fill_in_loaders(cfg, settings, precision), settings, precision)

    @property
    def work_dir(self) -> Path:
        """The folder that holds the stages' folders."""
        return Path(self.cfg.work_dir)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed trains the run."""
        return "strategy" in self.cfg

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The rows of the stage table, by name."""
        return stage_table(self.settings)

    @cached_property
    def llm_config(self) -> PretrainedConfig:
        """The LLM's published configuration.

        Raises:
            DPAError: neither a folder nor the hub has it.
        """
        return read_config("llm_name_or_path", self.cfg.model.llm)

    @cached_property
    def encoder_spec(self) -> VisionEncoderSpec:
        """The spec of the visual encoder's kind, with the layer that the config sets."""
        spec = copy.copy(find_encoder_spec(self.settings.encoder))
        if (layer := self.cfg.model.get("visual_select_layer")) is not None:
            spec.layer = layer
        return spec

    @cached_property
    def encoder_config(self) -> PretrainedConfig:
        """The visual encoder's published configuration.

        Raises:
            DPAError: neither a folder nor the hub has it, or it belongs to another kind.
        """
        return self.encoder_spec.config(self.settings.visual_encoder_name_or_path)

    def config_of(self, component: str) -> PretrainedConfig:
        """Return the published configuration of the LLM or of the visual encoder.

        Raises:
            DPAError: neither a folder nor the hub has it.
        """
        return self.llm_config if component == LLM else self.encoder_config

    @cached_property
    def projector(self) -> ProjectorModule:
        """The projector, on the meta device."""
        width = self.encoder_spec.hidden_size(self.encoder_config)
        with torch.device("meta"):
            return build_projector(self.settings.projector, width, self.llm_config.hidden_size)

    @cached_property
    def tiles(self) -> dict[str, int]:
        """The tokens of an image or tile, its size, and the largest number of tiles."""
        patches = self.encoder_spec.tokens(self.encoder_config)
        return {
            "image_tokens": projected_tokens(self.projector, patches),
            "tile_size": self.encoder_spec.image_size(self.encoder_config),
            "max_tiles": self.settings.max_tiles,
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The LLM's tokenizer.

        Raises:
            DPAError: it can't be loaded, or the config gives it unknown keys.
        """
        return _load("tokenizer", "llm_name_or_path", self.cfg)

    @cached_property
    def image_processor(self) -> Any:
        """The visual encoder's image processor.

        Raises:
            DPAError: it can't be loaded, or the config gives it unknown keys.
        """
        return _load("image_processor", "visual_encoder_name_or_path", self.cfg)

    @property
    def lora_targets(self) -> list[str] | None:
        """The layers that LoRA adapts; None for every linear layer but the head.

        They are the family's, if its loader is used.
        """
        family = self.settings.llm_family
        if family is None or self.cfg.model[LLM].type != family.llm:
            return None
        return list(family.lora_targets)


def _precision(base: Path, settings: Settings) -> Precision:
    """Choose the precision of a run: that of its first stage, or what fits the device.

    All stages must agree: fingerprints are taken of rounded weights, and another precision rounds
    differently.

    Args:
        base: the work dir.
        settings: the settings of the run.

    Raises:
        DPAError: the run began with another precision than the settings name, or the device
            does not support it.
    """
    device = get_device()
    for name in STAGE_NAMES:
        begun = read_state(base / name).get("origin", {}).get("precision")
        if begun is None:
            continue
        if settings.precision not in ("auto", begun):
            raise DPAError(
                f"precision={settings.precision!r}, but {base / name} began in {begun!r}, and a "
                f"run can't change its precision. Set precision={begun!r}, or use another "
                f"--work-dir."
            )
        return choose_precision(begun, device, f"stage {name} began in it")
    return choose_precision(settings.precision, device)


def fill_in_loaders(cfg: Config, settings: Settings, precision: Precision) -> Config:
    """Fill in how models, tokenizer and image processor are loaded, and from where.

    Args:
        cfg: a DPA config; not changed. The result keeps the keys that it sets itself.
        settings: the settings of that config.
        precision: dtype of the models' weights.

    Raises:
        DPAError: the image processor is unknown, or the config names two LLMs.
    """
    cfg = copy.deepcopy(cfg)
    llm, encoder = settings.llm_name_or_path, settings.visual_encoder_name_or_path
    family, spec = settings.llm_family, find_encoder_spec(settings.encoder)
    name = {"pretrained_model_name_or_path": llm}
    for path, given in (("model.llm", cfg.model.llm), ("tokenizer", cfg.get("tokenizer", {}))):
        if (other := {**name, **given}["pretrained_model_name_or_path"]) != llm:
            raise DPAError(
                f"{path}.pretrained_model_name_or_path={other!r} has no effect: set "
                f"llm_name_or_path."
            )
    loader = {"type": family.llm, **family.loading} if family else {}
    tokenizer = {"type": family.tokenizer if family else Family.tokenizer}
    dtype = {"torch_dtype": str(precision.dtype)}
    cfg.model.precision = precision.name
    cfg.model.llm = {**loader, **cfg.model.llm, **name, **dtype}
    cfg.tokenizer = {**tokenizer, **cfg.get("tokenizer", {}), **name}
    cfg.model.visual_encoder = {
        **spec.loader(encoder), **cfg.model.get(VISUAL_ENCODER, {}), **dtype
    }  # fmt: skip
    if cfg.model.llm.get("quantization_config", {}).get("load_in_4bit"):
        cfg.model.llm.quantization_config.setdefault("bnb_4bit_compute_dtype", str(precision.dtype))
    cfg.image_processor = {**spec.processor(encoder), **cfg.get("image_processor", {})}
    return cfg


def check_models(run: Run, stages: list[Stage]) -> None:
    """Refuse models that don't fit the config.

    Args:
        run: the run.
        stages: the stages to run.

    Raises:
        DPAError: a model is missing, has another family, kind or chat template, does not fit the
            projector, or is quantised although a stage would change its weights.
    """
    cfg, settings = run.cfg, run.settings
    check_loader("model.llm", cfg.model.llm.to_dict(), run.llm_config)
    name, family = settings.llm_name_or_path, settings.llm_family
    if getattr(run.llm_config, "quantization_config", None):  # it was published quantised
        refuse(str(cfg.filename), settings.quantised(f"The config.json of {name}"))
    if family is not None and cfg.model.llm.type == family.llm:
        check_model_type(family, name, run.llm_config.model_type)
    if cfg.model.llm.get("output_router_logits", False):
        raise DPAError(
            "model.llm.output_router_logits=True asks for the router's auxiliary loss, which no "
            "stage adds to its own. Leave it out."
        )
    if any(stage.sees_pictures for stage in stages):
        config = run.encoder_config
        check_loader("model.visual_encoder", cfg.model.visual_encoder.to_dict(), config)
        run.encoder_spec.check_layer(config)
        _ = run.image_processor, run.tiles  # building them raises what is wrong
    template = settings.prompt_template
    named = str(settings.family) if template is None else "prompt_template"
    check_template(
        settings.template, run.tokenizer, template if isinstance(template, str) else named
    )


def _load(key: str, setting: str, cfg: Config) -> Any:
    """Load a tokenizer or image processor, or name the setting that is wrong."""
    how = cfg[key].to_dict()
    loader = _loader(key, how)
    try:
        built = BUILDER.build(dict(how))
    except (OSError, TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        # transformers 5 raises a ValueError where a folder has no tokenizer.
        lacks_it = key == "tokenizer" and _lacks_a_tokenizer(Path(cfg[setting]))
        if not (isinstance(error, OSError) or lacks_it):
            raise DPAError(f"{key}: {error}. Check its keys in the config.") from None
        reason = str(error).strip().splitlines()[0]
        raise DPAError(
            f"The {key} of {setting}={cfg[setting]!r} can't be loaded ({reason}). Give a local "
            f"folder that has it with --cfg-options {setting}=FOLDER, or connect to the hub."
        ) from None
    _check_keywords(key, how, loader, type(built), set(dir(type(built))))
    return built


def _lacks_a_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES)


def check_loader(side: str, how: dict, config: PretrainedConfig) -> None:
    """Check the keywords of an LLM's or encoder's loader, before its weights are read.

    Args:
        side: the config's key that holds them.
        how: the loader's type and keywords.
        config: the model's published configuration; transformers takes its keys as keywords too.

    Raises:
        DPAError: unknown keywords, or values that can't be used.
    """
    known = {*dir(config), *config.to_dict()}
    _check_keywords(side, how, _loader(side, how), PreTrainedModel, known)
    attention = how.get("attn_implementation")
    kinds = ["eager", *ALL_ATTENTION_FUNCTIONS]
    if attention is not None and attention not in kinds:
        raise DPAError(
            f"{side}.attn_implementation={attention!r}: expected one of {', '.join(kinds)}"
            f"{nearest(str(attention), kinds) or '.'}"
        )


def _loader(key: str, how: dict) -> Callable:
    found = how["type"]
    if isinstance(found, str) and (found := get_object_from_string(found)) is None:
        raise DPAError(f"{key}.type={how['type']!r} can't be imported: mend it, or leave it out.")
    return found


def _check_keywords(where: str, how: dict, loader: Callable, made: type, others: set[str]) -> None:
    """Refuse keywords that neither a ``from_pretrained`` nor the class it builds takes.

    Args:
        where: the config's key that holds them, for the message.
        how: the loader's type and keywords.
        loader: the ``from_pretrained``.
        made: the class that it builds.
        others: names of other valid keywords.
    """
    calls = [loader, made, *(getattr(made, name) for name in _LOADING if hasattr(made, name))]
    known = {"type", "trust_remote_code"}.union(others, *map(taken, calls))
    unknown = how.keys() - known
    wrong = {f"{where}.{key}": f"not a known key{nearest(key, known)}" for key in unknown}
    typed = dict(problems([made], how, ("type",)))
    wrong |= {f"{where}.{key}": what for key, what in typed.items() if key in known}
    if not isinstance(trust := how.get("trust_remote_code", False), bool):  # any text is true
        wrong[f"{where}.trust_remote_code"] = f"expected True or False (got {trust!r})"
    refuse(f"The loader of {where}", wrong)
