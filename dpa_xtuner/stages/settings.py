"""The settings, each declared once: its type, its limits, its help and what it changes.

:mod:`dpa_xtuner.stages.settings_table` writes the table of all settings.
"""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from mmengine.config import Config
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError, nearest, refuse
from dpa_xtuner.families import Family, find_family
from dpa_xtuner.loss import build_scheme
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.pictures import colour_of
from dpa_xtuner.registry import FAMILIES, PROJECTORS, find_named
from dpa_xtuner.stages.methods import METHODS, Method, find_method
from dpa_xtuner.stages.signatures import config_problems

Change = Literal["model", "weights", "speed", "nothing"]
"""What a setting affects. ``model``: the meaning of the trained weights; training and export must
agree on it. ``weights``: how they are trained; a stage that has begun keeps it. ``speed``: a stage
that resumes from a checkpoint keeps it. ``nothing``: it may change at any time."""


def setting(
    about: str, changes: Change = "weights", default: Any = ..., sets: str = "", **limits: Any
) -> Any:
    """Declare a setting.

    Args:
        about: its help, for the table in the docs.
        changes: what it affects. Settings of ``model`` and ``weights`` are written into the state
            file and compared on resuming.
        default: its default; without one it is required.
        sets: MMEngine's keys, separated by spaces, that a stage sets from it; a config must not
            set them.
        limits: limits of pydantic, such as ``gt=0``.
    """
    extra: dict[str, Any] = {"changes": changes, "sets": sets.split()}
    return Field(default, description=about, json_schema_extra=extra, **limits)


def declaration(field: FieldInfo) -> dict[str, Any]:
    """Return what :func:`setting` added to a field: ``changes`` and ``sets``."""
    return cast("dict[str, Any]", field.json_schema_extra)


def built_once(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache a builder, so that each object is built once in a process.

    Args:
        build: builds the object of ``dict(type=name, ...)``.
    """
    known: dict[str, Any] = {}

    def find(cfg: Any) -> Any:
        """Return the object of a config, built at the first call."""
        if repr(cfg) not in known:
            known[repr(cfg)] = build(cfg)
        return known[repr(cfg)]

    return find


find_scheme = built_once(build_scheme)
"""The weighting scheme of a complete ``loss``."""

find_encoder_spec = built_once(build_encoder)
"""The spec of a kind of visual encoder. Copy it to change its layer."""


def _whole_number(value: Any) -> Any:
    """Turn a float such as 1e3, which the command line gives, into a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _by_type(name: Any) -> Any:
    return {"type": name} if isinstance(name, str) else name


def _passes(check: Callable[[Any], Any]) -> AfterValidator:
    """Validate a value by ``check``, which raises; None passes."""

    def checked(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return AfterValidator(checked)


_Item = TypeVar("_Item")
_List = Annotated[list[_Item], BeforeValidator(_list)]
_Whole = Annotated[int, BeforeValidator(_whole_number)]
_Named = Annotated[dict[str, Any], BeforeValidator(_by_type)]
_Scheme = Annotated[dict[str, Any], _passes(find_scheme)]
_Encoder = Annotated[_Named, _passes(find_encoder_spec)]
# 2: the first two arguments, the sizes, come from the models.
_ProjectorConfig = Annotated[_Named, _passes(lambda cfg: find_named(PROJECTORS, cfg, 2))]
_Colour = Annotated[str, _passes(colour_of)]
_Template = Annotated[str | dict[str, Any] | None, _passes(resolve_template)]


class _Settings(BaseModel):
    # Strict: neither True nor "3" is a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def names_changing(cls, change: Change) -> set[str]:
        """Name the settings that affect ``change``; see :func:`setting`."""
        fields = cls.model_fields.items()
        return {name for name, field in fields if declaration(field)["changes"] == change}

    def changing(self, change: Change, leave_out: Set[str] = frozenset()) -> dict[str, Any]:
        """Collect the settings that affect ``change`` and are not at their default.

        Args:
            change: see :func:`setting`.
            leave_out: names of settings to leave out.
        """
        names = self.names_changing(change) - leave_out
        return self.model_dump(include=names, exclude_defaults=True)


class DataSettings(_Settings):
    """Data; see :class:`dpa_xtuner.data.DPADataset`."""

    data_path: str | _List[str] = setting("data file or folder, or a list of them, a mixture")
    image_folder: str | _List[str] = setting("folder of the images, or one for each file")
    weights: _List[Annotated[float, Field(gt=0)]] | None = setting(
        "fractions of an epoch that the files give", default=None
    )
    share: float = setting("fraction of the data to use", default=1.0, gt=0, le=1)
    skip_limit: float = setting(
        "fraction that may be unusable", "nothing", default=0.01, ge=0, le=1
    )
    num_proc: _Whole = setting("processes of the first tokenising", "nothing", default=1, ge=1)
    special_tokens: Literal["text", "token"] = setting(
        "what a special token in a text is read as; stock XTuner: token", default="text"
    )

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
        if self.weights is not None and len(self.weights) != len(self.files):
            raise ValueError(
                f"weights has {len(self.weights)} values and data_path {len(self.files)} files: "
                f"give one weight for each file"
            )
        return self


class CaptionSettings(DataSettings):
    """The captions of proxy and align."""

    held_out: _Whole = setting("records kept out of training, to measure on", ge=0)


class LoRASettings(_Settings):
    """The low-rank adapter, under peft's names."""

    r: _Whole = setting("rank", "model", gt=0)
    lora_alpha: float = setting("scale: the adapter counts lora_alpha / r", "model", gt=0)
    lora_dropout: float = setting("dropout before the adapter", "model", ge=0, lt=1)


class StageSettings(_Settings):
    """How one stage is trained."""

    lr: float = setting("peak learning rate", gt=0, sets="optim_wrapper.optimizer.lr auto_scale_lr")
    # Under normalize="micro_batch" it changes weights too. A finished stage ignores it all the
    # same, so that a run can continue with other GPUs or less memory.
    batch_size: _Whole = setting(
        "samples on a device at a time; on several devices, their average",
        "speed",
        gt=0,
        sets="train_dataloader.batch_size train_dataloader.batch_sampler",
    )
    global_batch_size: _Whole = setting(
        "samples of an optimizer step",
        gt=0,
        sets="train_dataloader.sampler optim_wrapper.accumulative_counts",
    )
    max_epochs: _Whole = setting("passes over the data", gt=0, sets="train_cfg")
    max_steps: _Whole | None = setting(
        "largest number of optimizer steps",
        default=None,
        gt=0,
        sets="train_cfg train_dataloader.num_batch_per_epoch",
    )
    max_length: _Whole = setting("tokens of a sample, images included; the rest is cut off", gt=1)
    pad_image_to_square: bool = setting("pad images to a square in the mean colour", "model")
    background: _Colour = setting("colour behind transparent images", "model", default="white")
    warmup_ratio: float = setting(
        "fraction of the steps in which lr rises", ge=0, lt=1, sets="param_scheduler"
    )
    save_steps: _Whole = setting(
        "optimizer steps between checkpoints",
        "nothing",
        gt=0,
        sets="default_hooks.checkpoint.interval",
    )
    normalize: Literal["micro_batch", "global"] = setting(
        "divide the loss by the weights of a micro-batch, or of the whole step",
        sets="model.normalize",
    )


class LLMSettings(StageSettings):
    """A stage that trains its LLM, in full or by LoRA."""

    train_llm: Literal["full", "lora"] = setting(
        "train the whole LLM, or an adapter", "model", sets="model.freeze_llm"
    )
    lora: LoRASettings = setting(
        "the adapter, where train_llm='lora'", "model", sets="model.lora model.llm_lora"
    )


class ProxySettings(LLMSettings):
    """Stage proxy; its loss is plain cross entropy."""


class PictureSettings(StageSettings):
    """A stage with pictures."""

    loss: _Scheme = setting(
        "weighting scheme, by name or a dict with arguments; empty: the method's", sets="model.loss"
    )


class AlignSettings(PictureSettings):
    """Stage align; its LLM is frozen."""

    contrast_cache: str | None = setting(
        "folder to keep the contrast pass in", "nothing", default=None
    )

    @model_validator(mode="after")
    def _contrast_to_cache(self) -> "AlignSettings":
        if self.contrast_cache is not None and not find_scheme(self.loss).contrast:
            raise ValueError(f"contrast_cache is set, but loss={self.loss!r} runs no contrast pass")
        return self


class TuneSettings(PictureSettings, LLMSettings):
    """Stage tune."""

    start_from: Literal["target", "proxy"] = setting(
        "start from the original LLM or the proxy", "model"
    )
    projector_lr: float | None = setting(
        "learning rate of the projector; None: lr", default=None, gt=0
    )
    train_visual_encoder: bool = setting(
        "train the visual encoder too", "model", default=False, sets="model.freeze_visual_encoder"
    )
    visual_encoder_lr: float | None = setting(
        "learning rate of a trained visual encoder; None: lr", default=None, gt=0
    )
    init_projector: str | None = setting(
        "folder of a projector to start from; the run is this stage alone", default=None
    )


class Settings(_Settings):
    """All settings of the method; every other key of a config is MMEngine's.

    ``align.loss`` and ``tune.loss`` are complete here. In a config, None or an empty dict means
    the scheme of the method, a dict without ``type`` that scheme with other arguments, and a name
    the scheme of that name. ``encoder`` and ``projector`` are dicts with ``type``.
    """

    method: Annotated[str, _passes(find_method)] = setting(
        f"{', '.join(METHODS)}: which stages there are, and their loss"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "precision of the computation; auto: what fits the device",
        default="auto",
        sets="model.precision model.llm.torch_dtype model.visual_encoder.torch_dtype",
    )
    log_to: Literal["tensorboard", "wandb", "swanlab"] | None = setting(
        "where the figures are logged besides the run's own folder", "nothing", default=None
    )
    llm_name_or_path: str = setting("the LLM: a folder or a hub name")
    family: Annotated[str | None, _passes(find_family)] = setting(
        "kind of LLM: its loader, tokenizer, template and LoRA layers", default=None
    )
    prompt_template: _Template = setting(
        "chat template, by XTuner's name or a dict; None: the family's", "model", default=None
    )
    visual_encoder_name_or_path: str = setting("the visual encoder: a folder or a hub name")
    encoder: _Encoder = setting(
        "kind of visual encoder, by name or a dict with arguments", "model", sets="model.encoder"
    )
    projector: _ProjectorConfig = setting(
        "kind of projector, by name or a dict with arguments", "model", sets="model.projector"
    )
    max_tiles: _Whole = setting("largest number of tiles of an image; 1: no tiles", "model", ge=1)
    captions: CaptionSettings = setting("data of proxy and align", sets="train_dataloader.dataset")
    instructions: DataSettings = setting("data of tune", sets="train_dataloader.dataset")
    proxy: ProxySettings | None = setting("stage proxy; None if the method has none")
    align: AlignSettings = setting("stage align")
    tune: TuneSettings = setting("stage tune")

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
            family = self.llm_family
            assert family is not None, "from_config refuses a config without both"
            return dict(family.template)
        return resolve_template(self.prompt_template)

    def of_stage(self, name: str) -> StageSettings:
        """Return the settings of one stage."""
        return getattr(self, name)

    def data_of(self, sample_format: str) -> DataSettings:
        """Return the data of a stage by its sample format (:class:`Stage`)."""
        return self.instructions if sample_format == "chat" else self.captions

    @property
    def unused_settings(self) -> dict[str, str]:
        """Settings that this method or scheme does not read, by prefix, and why."""
        found = {}
        if not self.has_proxy:
            found["proxy."] = f"method={self.method!r} has no stage proxy"
        if self.tune.init_projector is not None:
            reason = "with tune.init_projector the run has the stage tune alone"
            found |= dict.fromkeys(("proxy.", "align.", "captions."), reason)
        if not self.tune.train_visual_encoder:
            reason = "tune.train_visual_encoder=False trains no visual encoder"
            found["tune.visual_encoder_lr"] = reason
        for name in ("proxy", "tune"):
            if f"{name}." not in found and getattr(self, name).train_llm == "full":
                found[f"{name}.lora."] = f"{name}.train_llm='full' trains no LoRA"
        return found

    @model_validator(mode="before")
    @classmethod
    def _complete_losses(cls, given: dict) -> dict:
        known = METHODS.get(given.get("method", ""))  # the field's own check reports an unknown one
        scheme = known.loss if known else "uniform"
        completed = {
            name: {**given[name], "loss": _complete_loss(given[name].get("loss"), scheme)}
            for name in ("align", "tune")
            if isinstance(given.get(name), dict)
        }
        return given | completed

    @model_validator(mode="after")
    def _proxy_is_trained(self) -> "Settings":
        if self.tune.start_from == "proxy" and self.tune.init_projector is not None:
            raise ValueError(
                "tune.start_from='proxy' needs a stage proxy, but with tune.init_projector the run "
                "has the stage tune alone: set start_from to 'target'"
            )
        if self.has_proxy and self.proxy is None:
            raise ValueError(
                f"method={self.method!r} needs its stage proxy, but proxy=None: give its settings, "
                f"or choose a method without it: {_methods(proxy=False)}"
            )
        if self.tune.start_from == "proxy" and not self.recipe.proxy:
            raise ValueError(
                f"tune.start_from='proxy' needs a stage proxy, which method={self.method!r} does "
                f"not have: set it to 'target', or choose one of {_methods(proxy=True)}"
            )
        return self

    @classmethod
    def from_config(cls, cfg: Config) -> "Settings":
        """Read and check the settings, and check all other keys of a config.

        Raises:
            DPAError: keys are unknown, missing, or set by the stages themselves, or values can't be
                used; lists all of them, one a line.
        """
        given = _plain(cfg._cfg_dict)
        wrong = config_problems(given, set(cls.model_fields), owned_keys())
        settings = None
        try:
            ours = {name: given[name] for name in cls.model_fields if name in given}
            settings = cls.model_validate(ours)
        except ValidationError as error:
            for where, what in map(_explain, error.errors()):
                wrong[where] = f"{wrong[where]} or {what}" if where in wrong else what
        if settings is not None and not wrong:
            wrong = settings._conflicts(given)
        refuse(f"{cfg.filename} (or --cfg-options)", wrong)
        assert settings is not None, "refuse() has raised if they are wrong"
        return settings

    def _conflicts(self, cfg: dict) -> dict[str, str]:
        """Find settings that conflict with other keys of the config: key -> message."""
        found = {}
        llm = cfg.get("model", {}).get("llm", {})
        if self.family is None and not ("type" in llm and self.prompt_template is not None):
            FAMILIES.import_from_location()
            found["family"] = (
                f"the config does not say what kind of LLM {self.llm_name_or_path!r} is: set "
                f"family, one of {', '.join(sorted(FAMILIES.module_dict))}; for another family, "
                f"set both the loader (model.llm.type) and the chat template (prompt_template)"
            )
        if llm.get("quantization_config"):
            found |= self.quantised("model.llm.quantization_config")
        constructor = cfg.get("optim_wrapper", {}).get("constructor")
        for rate in ("projector_lr", "visual_encoder_lr") if constructor is not None else ():
            if getattr(self.tune, rate) is not None:
                found[f"tune.{rate}"] = (
                    f"optim_wrapper.constructor={constructor!r} does not know it: leave out one "
                    f"of them"
                )
        return found

    def quantised(self, where: str) -> dict[str, str]:
        """Find settings that would change the weights of a quantised LLM: key -> message.

        Args:
            where: what says that the LLM is quantised.
        """
        found = {}
        if self.has_proxy and self.proxy is not None and self.proxy.train_llm == "full":
            found["proxy.train_llm"] = "'full' would train the LLM: set it to 'lora'"
        if self.tune.train_llm == "full":
            found["tune.train_llm"] = "'full' would train the LLM: set it to 'lora'"
        if self.tune.start_from == "proxy":
            found["tune.start_from"] = "'proxy' would be added to the LLM: set it to 'target'"
        why = f"{where} quantises the LLM, and quantised weights can't be changed"
        return {key: f"{out}, or leave the quantisation out ({why})" for key, out in found.items()}


def _complete_loss(loss: str | dict | None, scheme: str) -> Any:
    loss = _by_type({} if loss is None else loss)
    return {"type": scheme, **loss} if isinstance(loss, dict) else loss


def _methods(proxy: bool) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.proxy == proxy)


# Keys that every stage sets, whatever the settings are.
_SET_BY_STAGES = (
    "data_preprocessor",
    "default_hooks.checkpoint.by_epoch",
    "default_hooks.logger.log_metric_by_epoch",
    "log_processor.by_epoch",
    "model.merged_adapter",
    "model.pretrained_projector",
    "model.type",
    "train_dataloader.collate_fn",
    "train_dataloader.drop_last",
)


def owned_keys() -> dict[str, str]:
    """Collect MMEngine's keys that the stages set themselves: key -> what to do instead."""
    owners: dict[type[BaseModel], str] = {Settings: ""}
    owners |= dict.fromkeys((LLMSettings, AlignSettings, TuneSettings), "<stage>.")
    found: dict[str, dict[str, None]] = {}
    for owner, prefix in owners.items():
        for name, field in owner.model_fields.items():
            for key in declaration(field)["sets"]:
                found.setdefault(key, {})[f"{prefix}{name}"] = None
    ways = {key: f"set {' or '.join(names)} instead" for key, names in found.items()}
    ways["model.projector_depth"] = "set projector.depth instead"
    return ways | dict.fromkeys(_SET_BY_STAGES, "leave it out")


def settings_in(annotation: Any) -> type[BaseModel] | None:
    """Find the class of settings in an annotation such as ``ProxySettings | None``."""
    either = (annotation, *get_args(annotation))
    return next((each for each in either if hasattr(each, "model_fields")), None)


def config_from_file(path: Path | str, options: dict | None = None) -> Config:
    """Read a config file, and apply ``--cfg-options``.

    Raises:
        DPAError: the file can't be executed, or an option does not fit into it.
    """
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, NameError, ImportError, TypeError, KeyError) as error:
        raise DPAError(f"The config {path} can't be read: {error}. Mend that file.") from error
    cfg.merge_from_dict(options or {})
    return cfg


def read_settings(cfg: Config) -> Settings:
    """Read and check the settings of a config, and refuse ``--cfg-options`` that have no effect.

    In a file, such settings are allowed.

    Raises:
        DPAError: as :meth:`Settings.from_config`; or options have no effect: lists them.
    """
    settings = Settings.from_config(cfg)
    if cfg.filename is None:
        return settings
    file = _plain(Config.fromfile(cfg.filename)._cfg_dict)
    wrong = {
        path: f"{reason}, so nothing reads it; leave it out"
        for path, *_ in differences(file, _plain(cfg._cfg_dict))
        for prefix, reason in settings.unused_settings.items()
        if path.startswith(prefix)
    }
    if file.get("launcher") not in (None, cfg.get("launcher")):  # XTuner overwrites it
        wrong["launcher"] = f"{file['launcher']!r} has no effect: give --launcher"
    refuse(f"{cfg.filename} (or --cfg-options)", wrong)
    return settings


def differences(before: dict, now: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Compare nested dicts: path, value before (None if there was none), value now."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in dict.items(value)}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _explain(problem: ErrorDetails) -> tuple[str, str]:
    """Turn an error of pydantic into the place of the problem and a message."""
    owner: type[BaseModel] | None = Settings
    path, unknown = [], None
    for part in problem["loc"]:
        fields = getattr(owner, "model_fields", {})
        if part in fields:
            owner = settings_in(fields[part].annotation)
        elif owner is not None:
            unknown = nearest(str(part), fields)
        elif isinstance(part, str):  # pydantic's name for one of several types
            continue
        path.append(str(part))
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return where, f"not a setting{unknown}"
    if problem["type"] == "value_error":  # ours; the message names the value
        return where, str(problem["ctx"]["error"])
    given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return where, f"{problem['msg']}{given}"
