"""The method's part of a config, checked before anything is loaded."""

from inspect import signature
from typing import Any, Literal

from mmengine.config import Config
from mmengine.runner import Runner
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.loss import build_scheme


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Strict):
    """A LLaVA-format data set: its JSON or JSONL file and the folder its images are in.

    ``skip_limit`` is the share of it that may be unusable.
    """

    data_path: str
    image_folder: str
    skip_limit: float = Field(default=0.01, ge=0, le=1)


class CaptionSettings(DataSettings):
    """The captions of proxy and align; ``held_out`` of them are kept for measuring."""

    held_out: int = Field(ge=0)


class LoRASettings(_Strict):
    """peft's names: rank, scale and dropout."""

    r: int = Field(gt=0)
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
    batch_size: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    max_epochs: int = Field(gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    max_length: int = Field(gt=1)
    pad_image_to_square: bool
    warmup_ratio: float = Field(ge=0, lt=1)
    save_steps: int = Field(gt=0)
    normalize: Literal["micro_batch", "global"]


class ProxySettings(StageSettings):
    """Stage proxy always trains LoRA, with plain cross entropy."""

    lora: LoRASettings


class PictureSettings(StageSettings):
    """A stage with pictures; ``loss`` is its weighting scheme, a name or a dict with ``type``."""

    loss: str | dict[str, Any]

    @field_validator("loss")
    @classmethod
    def _known_scheme(cls, loss: str | dict[str, Any]) -> str | dict[str, Any]:
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


class TuneSettings(PictureSettings):
    """Stage tune: which LLM it starts from, and whether all of it is trained or a LoRA on it."""

    start_from: Literal["target", "proxy"]
    train_llm: Literal["full", "lora"]
    lora: LoRASettings


class Settings(_Strict):
    """All settings of the method; every other key of a config is MMEngine's."""

    llm_name_or_path: str
    visual_encoder_name_or_path: str
    prompt_template: str
    captions: CaptionSettings
    instructions: DataSettings
    proxy: ProxySettings
    align: AlignSettings
    tune: TuneSettings

    @field_validator("prompt_template")
    @classmethod
    def _known_template(cls, name: str) -> str:
        resolve_template(name)
        return name

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
            return cls.model_validate(_plain(given))
        except ValidationError as error:
            lines = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
            raise DPAError(f"{cfg.filename} has settings that can't be used:\n{lines}") from None


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


def _refuse_unknown_keys(cfg: Config) -> None:
    known = known_keys()
    unknown = [key for key in cfg if key not in known]
    if unknown:
        lines = "\n".join(f"  {key}: not a known key{nearest(key, known)}" for key in unknown)
        raise DPAError(f"{cfg.filename} (or --cfg-options) sets keys that nothing reads:\n{lines}")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in dict.items(value)}
    return value


def _explain(problem: dict) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model = Settings
        for part in problem["loc"][:-1]:
            model = model.model_fields[part].annotation
        return f"{where}: not a setting{nearest(problem['loc'][-1], model.model_fields)}"
    given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return f"{where}: {problem['msg']}{given}"
