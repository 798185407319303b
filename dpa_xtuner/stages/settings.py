"""The method's part of a config, checked before anything is loaded."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from mmengine.config import Config
from mmengine.runner import Runner
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dpa_xtuner.data.mixture import check_choice
from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.declared import mistyped, parameters
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.families import Family, find_family
from dpa_xtuner.loss import build_scheme
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.registry import FAMILIES, PROJECTORS, find_named
from dpa_xtuner.stages.methods import METHODS, Method, find_method


def _whole(value: Any) -> Any:
    """Of a number such as 1e3, which the command line gives as a float, the whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_Item = TypeVar("_Item")
_List = Annotated[list[_Item], BeforeValidator(_list)]
_Whole = Annotated[int, BeforeValidator(_whole)]


class _Strict(BaseModel):
    # Strict: True is no number, and neither is "3".
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSettings(_Strict):
    """LLaVA-format data: a JSON or JSONL file and the folder its images are in, or lists of both.

    ``weights`` say how much of an epoch each file of a list gives, ``share`` is the part of the
    data that is used, and ``skip_limit`` the part that may be unusable; see
    :class:`dpa_xtuner.data.DPADataset`.
    """

    data_path: str | _List[str]
    image_folder: str | _List[str]
    weights: _List[float] | None = None
    share: float = 1.0
    skip_limit: float = Field(default=0.01, ge=0, le=1)

    @property
    def files(self) -> list[str]:
        """The data files, one or more."""
        return [self.data_path] if isinstance(self.data_path, str) else self.data_path

    @property
    def folders(self) -> list[str]:
        """The image folder of each data file."""
        if isinstance(self.image_folder, str):
            return [self.image_folder] * len(self.files)
        return self.image_folder

    @model_validator(mode="after")
    def _lists_agree(self) -> "DataSettings":
        if not self.files or len(self.folders) != len(self.files):
            raise ValueError(
                f"data_path names {len(self.files)} files and image_folder {len(self.folders)} "
                f"folders: give one folder for all, or one for each file"
            )
        check_choice(len(self.files), 0, "train", self.share, self.weights)
        return self


class CaptionSettings(DataSettings):
    """The captions of proxy and align; ``held_out`` of them are kept for measuring."""

    held_out: _Whole = Field(ge=0)


class LoRASettings(_Strict):
    """peft's names: rank, scale and dropout."""

    r: _Whole = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(ge=0, lt=1)


class StageSettings(_Strict):
    """How one stage is trained.

    ``global_batch_size`` samples make an optimizer step on any number of GPUs;
    ``batch_size`` of them pass through a device at a time. ``max_steps`` ends a stage
    before its ``max_epochs`` do. ``normalize`` is that of
    :func:`dpa_xtuner.loss.relevance_loss`.
    """

    lr: float = Field(gt=0)
    batch_size: _Whole = Field(gt=0)
    global_batch_size: _Whole = Field(gt=0)
    max_epochs: _Whole = Field(gt=0)
    max_steps: _Whole | None = Field(default=None, gt=0)
    max_length: _Whole = Field(gt=1)
    pad_image_to_square: bool
    warmup_ratio: float = Field(ge=0, lt=1)
    save_steps: _Whole = Field(gt=0)
    normalize: Literal["micro_batch", "global"]


class LLMSettings(StageSettings):
    """A stage that trains its LLM: all of it, or a LoRA on it."""

    train_llm: Literal["full", "lora"]
    lora: LoRASettings


class ProxySettings(LLMSettings):
    """Stage proxy, whose loss is plain cross entropy."""


class PictureSettings(StageSettings):
    """A stage with pictures; ``loss`` is its weighting scheme, a dict with ``type``."""

    loss: dict[str, Any]

    @field_validator("loss")
    @classmethod
    def _known_scheme(cls, loss: dict[str, Any]) -> dict[str, Any]:
        build_scheme(loss)
        return loss


class AlignSettings(PictureSettings):
    """Stage align, whose LLM is frozen; ``contrast_cache`` is a folder to keep p_wo in."""

    contrast_cache: str | None = None

    @model_validator(mode="after")
    def _contrast_to_cache(self) -> "AlignSettings":
        if self.contrast_cache is not None and not build_scheme(self.loss).contrast:
            raise ValueError(f"contrast_cache is set, but loss={self.loss!r} runs no contrast pass")
        return self


class TuneSettings(PictureSettings, LLMSettings):
    """Stage tune; ``start_from`` says whether its LLM is the original one or the proxy.

    ``projector_lr`` is the projector's learning rate, None for the stage's ``lr``.
    ``train_visual_encoder`` trains the visual encoder too, at ``visual_encoder_lr`` or ``lr``.
    ``init_projector`` is the folder of a projector that a stage of an earlier run wrote. With it
    the run has the stage tune alone.
    """

    start_from: Literal["target", "proxy"]
    projector_lr: float | None = Field(default=None, gt=0)
    train_visual_encoder: bool = False
    visual_encoder_lr: float | None = Field(default=None, gt=0)
    init_projector: str | None = None


class Settings(_Strict):
    """All settings of the method; every other key of a config is MMEngine's.

    ``align.loss`` and ``tune.loss`` are complete here: in a config, None or an empty dict
    means the scheme of the method, a dict without ``type`` that scheme with other arguments,
    and a name the scheme of that name. ``encoder`` and ``projector`` are dicts with ``type``.
    """

    method: str
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    llm_name_or_path: str
    family: str | None = None
    prompt_template: str | dict[str, Any] | None = None
    visual_encoder_name_or_path: str
    encoder: dict[str, Any]
    projector: dict[str, Any]
    max_tiles: _Whole = Field(ge=1)
    captions: CaptionSettings
    instructions: DataSettings
    proxy: ProxySettings | None
    align: AlignSettings
    tune: TuneSettings

    @property
    def recipe(self) -> Method:
        """The stages and the loss of the method."""
        return find_method(self.method)

    @property
    def has_proxy(self) -> bool:
        """Whether the run trains a proxy LLM."""
        return self.recipe.proxy and self.tune.init_projector is None

    @property
    def llm_family(self) -> type[Family] | None:
        """The LLM's family, if one is named."""
        return None if self.family is None else find_family(self.family)

    @property
    def template(self) -> dict[str, Any]:
        """The chat template: the config's own, or the family's."""
        if self.prompt_template is None:
            return dict(self.llm_family.template)
        return resolve_template(self.prompt_template)

    @model_validator(mode="before")
    @classmethod
    def _complete_losses(cls, given: dict) -> dict:
        known = METHODS.get(given.get("method"))  # an unknown one is told of by its own field
        scheme = known.loss if known else "uniform"
        completed = {
            name: {**given[name], "loss": _complete_loss(given[name].get("loss"), scheme)}
            for name in ("align", "tune")
            if isinstance(given.get(name), dict)
        }
        return given | completed

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        find_method(name)
        return name

    @field_validator("family")
    @classmethod
    def _known_family(cls, name: str | None) -> str | None:
        if name is not None:
            find_family(name)
        return name

    @field_validator("prompt_template")
    @classmethod
    def _known_template(cls, template: str | dict | None) -> str | dict | None:
        if template is not None:
            resolve_template(template)
        return template

    @field_validator("encoder", "projector", mode="before")
    @classmethod
    def _dict_of_name(cls, value: Any) -> Any:
        return _by_type(value)

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, encoder: dict[str, Any]) -> dict[str, Any]:
        build_encoder(encoder)
        return encoder

    @field_validator("projector")
    @classmethod
    def _known_projector(cls, projector: dict[str, Any]) -> dict[str, Any]:
        find_named(PROJECTORS, projector, 2)  # the sizes are the models'
        return projector

    @model_validator(mode="after")
    def _proxy_is_trained(self) -> "Settings":
        if self.tune.start_from == "proxy" and self.tune.init_projector is not None:
            raise ValueError(
                "tune.start_from='proxy' needs a stage proxy, and with tune.init_projector the run "
                "has the stage tune alone: set start_from to 'target'"
            )
        if self.has_proxy and self.proxy is None:
            raise ValueError(
                f"method={self.method!r} needs its stage proxy, but proxy=None: give its settings, "
                f"or choose a method without it: {_methods(proxy=False)}"
            )
        if self.tune.start_from == "proxy" and not self.recipe.proxy:
            raise ValueError(
                f"tune.start_from='proxy' needs a stage proxy, which method={self.method!r} has "
                f"not: set it to 'target', or choose one of {_methods(proxy=True)}"
            )
        return self

    @classmethod
    def from_config(cls, cfg: Config) -> "Settings":
        """Read and check them.

        Raises:
            DPAError: keys that nothing reads, missing ones, or values out of range, each
                on a line of its own.
        """
        _refuse_unknown_keys(cfg)
        given = {name: cfg[name] for name in cls.model_fields if name in cfg}
        try:
            settings = cls.model_validate(_plain(given))
        except ValidationError as error:
            said: dict[str, list[str]] = {}
            for where, what in map(_explain, error.errors()):
                said.setdefault(where, []).append(what)
            lines = "\n".join(
                "  " + (f"{where}: " if where else "") + " or ".join(what)
                for where, what in said.items()
            )
            raise DPAError(f"{cfg.filename} has settings that can't be used:\n{lines}") from None
        _need_family(cfg, settings)
        if cfg.get("model", {}).get("llm", {}).get("quantization_config"):
            refuse_training_quantised(settings, "model.llm.quantization_config")
        return settings

    @property
    def idle(self) -> dict[str, str]:
        """Settings that this method or scheme does not read, by prefix, and why."""
        found, with_llm = {}, ["proxy", "tune"]
        if not self.has_proxy:
            found["proxy."] = f"method={self.method!r} has no stage proxy"
            with_llm.remove("proxy")
        if self.tune.init_projector is not None:
            reason = "with tune.init_projector the run has the stage tune alone"
            found |= dict.fromkeys(("proxy.", "align.", "captions."), reason)
        if not self.tune.train_visual_encoder:
            reason = "tune.train_visual_encoder=False trains no visual encoder"
            found["tune.visual_encoder_lr"] = reason
        for name in with_llm:
            if getattr(self, name).train_llm == "full":
                found[f"{name}.lora."] = f"{name}.train_llm='full' trains no LoRA"
        return found


def _complete_loss(loss: str | dict | None, scheme: str) -> Any:
    loss = _by_type({} if loss is None else loss)
    return {"type": scheme, **loss} if isinstance(loss, dict) else loss


def _by_type(name: Any) -> Any:
    return {"type": name} if isinstance(name, str) else name


def _methods(proxy: bool) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.proxy == proxy)


# Keys of a DPA config beside the settings and MMEngine's own.
_OTHER_KEYS = {
    "_scope_",
    "custom_imports",
    "image_processor",
    "runner_type",
    "strategy",
    "tokenizer",
}


def known_keys() -> set[str]:
    """All top-level keys that a DPA config may have."""
    runner = set(signature(Runner.__init__).parameters) - {"self", "cfg"}
    return set(Settings.model_fields) | runner | _OTHER_KEYS


# Dicts that are looked into before what takes them can say anything.
_DICTS = (
    "custom_imports",
    "default_hooks.checkpoint",
    "env_cfg.dist_cfg",
    "image_processor",
    "model.llm",
    "model.visual_encoder",
    "optim_wrapper.optimizer",
    "tokenizer",
    "train_dataloader",
)


def _refuse_unknown_keys(cfg: Config) -> None:
    known, runner = known_keys(), parameters(Runner)[0]
    lines = [f"  {key}: not a known key{nearest(key, known)}" for key in cfg if key not in known]
    for key in runner.keys() & dict.keys(cfg._cfg_dict):
        if key not in _DICTS and (expected := mistyped(runner[key], cfg[key])):
            lines.append(f"  {key}: expected {expected} (got {cfg[key]!r})")
    for path in _DICTS:
        node: Any = cfg._cfg_dict
        for key in path.split("."):
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict):
            lines.append(f"  {path}: expected a dict (got {node!r})")
    if lines:
        listed = "\n".join(lines)
        raise DPAError(f"{cfg.filename} (or --cfg-options) has keys that can't be used:\n{listed}")


def _need_family(cfg: Config, settings: Settings) -> None:
    own_loader = "type" in cfg.get("model", {}).get("llm", {})
    if settings.family is None and not (own_loader and settings.prompt_template is not None):
        FAMILIES.import_from_location()
        raise DPAError(
            f"{cfg.filename} does not say what kind of LLM {settings.llm_name_or_path!r} is: set "
            f"family, one of {', '.join(sorted(FAMILIES.module_dict))}; or, for another, both its "
            f"loader (model.llm.type) and its chat template (prompt_template)."
        )


def refuse_training_quantised(settings: Settings, where: str) -> None:
    """Refuse stages that would have to change the weights of an LLM that is quantised.

    Args:
        settings: the method's.
        where: what says that the LLM is quantised, for the message.

    Raises:
        DPAError: such stages, each on a line of its own.
    """
    lines = []
    if settings.has_proxy and settings.proxy.train_llm == "full":
        lines.append("  proxy.train_llm='full' would train them: set it to 'lora'")
    if settings.tune.train_llm == "full":
        lines.append("  tune.train_llm='full' would train them: set it to 'lora'")
    if settings.tune.start_from == "proxy":
        lines.append("  tune.start_from='proxy' would add the proxy to them: set it to 'target'")
    if lines:
        listed = "\n".join(lines)
        raise DPAError(
            f"{where} quantises the LLM, and quantised weights can't be changed:\n{listed}\n"
            f"Or leave the quantisation out."
        )


def config_from_file(path: Path | str, options: dict | None = None) -> Config:
    """Read a config file, and change it as ``--cfg-options`` say.

    Raises:
        DPAError: it can't be carried out, or an option does not fit into it.
    """
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, NameError, ImportError, TypeError, KeyError) as error:
        raise DPAError(f"The config {path} can't be read: {error}. Mend that file.") from error
    cfg.merge_from_dict(options or {})
    return cfg


def refuse_idle_options(cfg: Config, settings: Settings) -> None:
    """Refuse ``--cfg-options`` that have no effect; a file may set what its method leaves out.

    Raises:
        DPAError: there are some, each on a line of its own.
    """
    if not settings.idle or cfg.filename is None:
        return
    file = _plain(Config.fromfile(cfg.filename)._cfg_dict)
    changed = [path for path, *_ in differences(file, _plain(cfg._cfg_dict))]
    lines = [
        f"  {path}: {reason}, so nothing reads it; leave it out"
        for path in changed
        for prefix, reason in settings.idle.items()
        if path.startswith(prefix)
    ]
    if lines:
        raise DPAError("--cfg-options sets what has no effect:\n" + "\n".join(lines))


def differences(before: dict, now: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """What differs in nested dicts: path, value before (None where there was none), value now."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in dict.items(value)}
    return value


def _explain(problem: dict) -> tuple[str, str]:
    """Where a problem is, and what it is."""
    model, path, unknown = Settings, [], None
    for part in problem["loc"]:
        fields = getattr(model, "model_fields", {})
        if part in fields:
            annotation = fields[part].annotation
            either = (annotation, *get_args(annotation))  # Settings or None
            model = next((a for a in either if hasattr(a, "model_fields")), None)
        elif model is not None:
            unknown = nearest(str(part), fields)
        elif isinstance(part, str):  # pydantic's name of one of several types
            continue
        path.append(str(part))
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return where, f"not a setting{unknown}"
    if problem["type"] == "value_error":  # our own, which name the value themselves
        return where, str(problem["ctx"]["error"])
    given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return where, f"{problem['msg']}{given}"
