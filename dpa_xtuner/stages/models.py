"""What the family and the kind of encoder say of a config's models, where it does not itself."""

import copy

import torch
from mmengine.config import Config
from mmengine.utils import get_object_from_string
from transformers import PretrainedConfig
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.families import check_model_type, check_template
from dpa_xtuner.families.base import Family
from dpa_xtuner.model.configs import image_tokens, read_config
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.projectors import build_projector
from dpa_xtuner.stages.settings import Settings, refuse_training_quantised
from dpa_xtuner.stages.table import Stage


def complete(cfg: Config, settings: Settings) -> Config:
    """Fill in how the models, the tokenizer and the image processor are loaded, and from where.

    Args:
        cfg: a DPA config; not changed. What it says of them itself is kept.
        settings: read from it.

    Raises:
        DPAError: an encoder's image processor can't be known, or the LLM has two places.
    """
    cfg = copy.deepcopy(cfg)
    llm, encoder = settings.llm_name_or_path, settings.visual_encoder_name_or_path
    family, kind = settings.llm_family, build_encoder(settings.encoder)
    place = {"pretrained_model_name_or_path": llm}
    for path, given in (("model.llm", cfg.model.llm), ("tokenizer", cfg.get("tokenizer", {}))):
        if (other := {**place, **given}["pretrained_model_name_or_path"]) != llm:
            raise DPAError(
                f"{path}.pretrained_model_name_or_path={other!r} is not read: set llm_name_or_path."
            )
    loader = {"type": family.llm} if family else {}
    tokenizer = {"type": family.tokenizer if family else Family.tokenizer}
    cfg.model.llm = {**loader, **cfg.model.llm, **place}
    cfg.tokenizer = {**tokenizer, **cfg.get("tokenizer", {}), **place}
    cfg.model.visual_encoder = {**kind.loader(encoder), **cfg.model.get("visual_encoder", {})}
    cfg.image_processor = {**kind.processor(encoder), **cfg.get("image_processor", {})}
    return cfg


def llm_config(cfg: Config) -> PretrainedConfig:
    """The LLM's published configuration.

    Args:
        cfg: from :func:`complete`.

    Raises:
        DPAError: neither a folder nor the hub has it.
    """
    return read_config("llm_name_or_path", cfg.model.llm)


def encoder_config(settings: Settings) -> PretrainedConfig:
    """The visual encoder's published configuration.

    Raises:
        DPAError: neither a folder nor the hub has it, or it is another kind's.
    """
    return build_encoder(settings.encoder).config(settings.visual_encoder_name_or_path)


def tiles(settings: Settings) -> dict[str, int]:
    """How many tokens an image or tile takes, how large it is, and how many there may be."""
    published = encoder_config(settings)
    return {
        "image_tokens": image_tokens(settings.encoder, settings.projector, published),
        "tile_size": build_encoder(settings.encoder).image_size(published),
        "max_tiles": settings.max_tiles,
    }


def lora_targets(cfg: Config, settings: Settings) -> list[str] | None:
    """The family's, where its loader is used; None for every linear layer but the head."""
    family = settings.llm_family
    if family is None or cfg.model.llm.type != family.llm:
        return None
    return list(family.lora_targets)


def check_models(cfg: Config, settings: Settings, stages: list[Stage]) -> None:
    """Refuse models that don't fit what the config says of them.

    Args:
        cfg: from :func:`complete`.
        settings: read from it.
        stages: those that are to be run.

    Raises:
        DPAError: a model is missing, is of another family or kind, has another chat template,
            does not fit the projector, or is quantised and would have to be changed.
    """
    llm, family = llm_config(cfg), settings.llm_family
    if getattr(llm, "quantization_config", None):  # a checkpoint that is published quantised
        refuse_training_quantised(settings, f"The config.json of {settings.llm_name_or_path}")
    if family is not None and cfg.model.llm.type == family.llm:
        check_model_type(family, settings.llm_name_or_path)
    name = settings.family
    if settings.prompt_template is not None:
        is_name = isinstance(settings.prompt_template, str)
        name = settings.prompt_template if is_name else "prompt_template"
    check_template(settings.template, _loaded("tokenizer", "llm_name_or_path", cfg), name)
    if any("projector" in stage.builds for stage in stages):
        encoder = encoder_config(settings)
        _loaded("image_processor", "visual_encoder_name_or_path", cfg)
        kind = build_encoder(settings.encoder)
        kind.check_layer(encoder, cfg.model.get("visual_select_layer"))
        hidden_size = kind.hidden_size(encoder)
        with torch.device("meta"):
            build_projector(settings.projector, hidden_size, llm.hidden_size)
        tiles(settings)


def _loaded(part: str, setting: str, cfg: Config):
    """A tokenizer or image processor; a message that names its settings where it can't be had."""
    how = cfg[part].to_dict()
    if isinstance(how["type"], str) and get_object_from_string(how["type"]) is None:
        raise DPAError(f"{part}.type={how['type']!r} can't be imported: mend it, or leave it out.")
    try:
        return BUILDER.build(how)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise DPAError(
            f"The {part} of {setting}={cfg[setting]!r} can't be loaded ({reason}). Give a local "
            f"folder that has it with --cfg-options {setting}=FOLDER, or connect to the hub."
        ) from None
