"""What the family and the kind of encoder say of a config's models, where it does not itself."""

import copy
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.utils import get_object_from_string
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from xtuner.registry import BUILDER

from dpa_xtuner.declared import mistyped, parameters, taken
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.families import check_model_type, check_template
from dpa_xtuner.families.base import Family
from dpa_xtuner.model.configs import image_tokens, read_config
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.projectors import build_projector
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.settings import Settings, refuse_training_quantised
from dpa_xtuner.stages.table import Stage

# What takes the keywords of a from_pretrained that it hands on.
_LOADING = ("from_pretrained", "_from_pretrained", "from_dict", "get_image_processor_dict")


def complete(cfg: Config, settings: Settings, precision: Precision) -> Config:
    """Fill in how the models, the tokenizer and the image processor are loaded, and from where.

    Args:
        cfg: a DPA config; not changed. What it says of them itself is kept.
        settings: read from it.
        precision: what the models' weights are loaded in.

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
    dtype = {"torch_dtype": str(precision.dtype)}
    cfg.model.precision = precision.name
    cfg.model.llm = {**loader, **cfg.model.llm, **place, **dtype}
    cfg.tokenizer = {**tokenizer, **cfg.get("tokenizer", {}), **place}
    cfg.model.visual_encoder = {
        **kind.loader(encoder), **cfg.model.get("visual_encoder", {}), **dtype
    }  # fmt: skip
    if cfg.model.llm.get("quantization_config", {}).get("load_in_4bit"):
        cfg.model.llm.quantization_config.setdefault("bnb_4bit_compute_dtype", str(precision.dtype))
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
    check_loader("model.llm", cfg.model.llm.to_dict(), llm)
    if getattr(llm, "quantization_config", None):  # a checkpoint that is published quantised
        refuse_training_quantised(settings, f"The config.json of {settings.llm_name_or_path}")
    if family is not None and cfg.model.llm.type == family.llm:
        check_model_type(family, settings.llm_name_or_path)
    name = settings.family
    if settings.prompt_template is not None:
        is_name = isinstance(settings.prompt_template, str)
        name = settings.prompt_template if is_name else "prompt_template"
    check_template(settings.template, _loaded("tokenizer", "llm_name_or_path", cfg), name)
    if any(stage.sees_pictures for stage in stages):
        encoder = encoder_config(settings)
        check_loader("model.visual_encoder", cfg.model.visual_encoder.to_dict(), encoder)
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
    loader = _loader(part, how)
    try:
        built = BUILDER.build(dict(how))
        unknown = _unknown(how, loader, type(built))
        # It may know more than its code says: what the file in its folder says of it.
        plain = BUILDER.build({key: how[key] for key in how.keys() - unknown})
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise DPAError(
            f"The {part} of {setting}={cfg[setting]!r} can't be loaded ({reason}). Give a local "
            f"folder that has it with --cfg-options {setting}=FOLDER, or connect to the hub."
        ) from None
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise DPAError(f"{part}: {error}. Check its keys in the config.") from None
    known = _known(loader, type(built)) | {name for name in dir(plain) if name[0] != "_"}
    _refuse_keywords(part, how, {key for key in unknown if not hasattr(plain, key)}, known)
    declared = parameters(type(built))[0]
    for key, value in how.items():
        if key in declared and (expected := mistyped(declared[key], value)):
            raise DPAError(f"{part}.{key}: expected {expected} (got {value!r}).")
    return built


def check_loader(side: str, how: dict, config: PretrainedConfig) -> None:
    """Hold an LLM's or encoder's keywords against what loads it, before its weights are read.

    Args:
        side: the config's key that holds them.
        how: the loader's type and keywords.
        config: the model's published configuration, whose keys transformers takes as keywords too.

    Raises:
        DPAError: keywords that nothing takes, or values that can't be used.
    """
    loader = _loader(side, how)
    unknown = {key for key in _unknown(how, loader, PreTrainedModel) if not hasattr(config, key)}
    known = _known(loader, PreTrainedModel) | set(config.to_dict())
    _refuse_keywords(side, how, unknown, known)
    quantised = how.get("quantization_config")
    if isinstance(quantised, dict) and "type" in quantised:
        known = taken(_loader(f"{side}.quantization_config", quantised))
        unknown = quantised.keys() - known - {"type"}
        _refuse_keywords(f"{side}.quantization_config", quantised, unknown, known)
    dtype = how.get("torch_dtype", "auto")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise DPAError(f"{side}.torch_dtype={how['torch_dtype']!r} is not a type of torch's.")
    attention = how.get("attn_implementation")
    known = ["eager", *ALL_ATTENTION_FUNCTIONS]
    if attention is not None and attention not in known:
        raise DPAError(
            f"{side}.attn_implementation={attention!r}: expected one of {', '.join(known)}"
            f"{nearest(str(attention), known)}."
        )


def _loader(part: str, how: dict) -> Callable:
    found = how["type"]
    if isinstance(found, str) and (found := get_object_from_string(found)) is None:
        raise DPAError(f"{part}.type={how['type']!r} can't be imported: mend it, or leave it out.")
    return found


def _known(loader: Callable, kind: type) -> set[str]:
    """The keywords of a ``from_pretrained`` and of what it makes."""
    calls = [loader, kind, *(getattr(kind, name) for name in _LOADING if hasattr(kind, name))]
    return set().union(*map(taken, calls))


def _unknown(how: dict, loader: Callable, kind: type) -> set[str]:
    return how.keys() - {"type", "trust_remote_code"} - _known(loader, kind)


def _refuse_keywords(part: str, how: dict, unknown: set[str], known: set[str]) -> None:
    lines = [f"  {part}.{key}: not an argument{nearest(key, known)}" for key in sorted(unknown)]
    trust = how.get("trust_remote_code", False)
    if not isinstance(trust, bool):  # any text would count as yes
        lines.append(f"  {part}.trust_remote_code: expected True or False (got {trust!r})")
    if lines:
        raise DPAError(f"The loader of {part} does not take:\n" + "\n".join(lines))
