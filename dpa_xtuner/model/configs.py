"""Reads the configuration of a Hugging Face model, before its weights are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.utils import get_object_from_string
from transformers import AutoConfig, PretrainedConfig

from dpa_xtuner.errors import DPAError

_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "image_size",
    "patch_size",
)


class NotFound(DPAError):
    """A model that is neither in a folder nor on the hub."""


def model_class(cfg: dict) -> type[Any]:
    """Return the class of a model config's ``type``, which names its ``from_pretrained``.

    Raises:
        DPAError: it does not.
    """
    build = cfg["type"]
    if isinstance(build, str):
        build = get_object_from_string(build)
    owner = getattr(build, "__self__", None)
    if owner is None:
        raise DPAError(f"type={cfg['type']!r} is not the from_pretrained of an importable class.")
    return owner


def read_config(setting: str, cfg: dict, local_only: bool = False) -> PretrainedConfig:
    """Read the published configuration of an LLM or encoder.

    Args:
        setting: the config key that names the model, for the message.
        cfg: its ``type``, ``pretrained_model_name_or_path`` and keyword arguments.
        local_only: look only in folders and the hub's cache.

    Raises:
        NotFound: neither a folder nor a hub has it.
    """
    name = cfg["pretrained_model_name_or_path"]
    reader = getattr(model_class(cfg), "config_class", None) or AutoConfig
    try:
        return reader.from_pretrained(
            name,
            trust_remote_code=cfg.get("trust_remote_code", False),
            local_files_only=local_only,
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFound(
            f"{setting}={name!r} is neither a folder with a config.json nor a model that the hub "
            f"gives here ({reason}). Give a local folder with --cfg-options {setting}=FOLDER, or "
            f"connect to the hub."
        ) from None


@contextmanager
def options_refused(side: str) -> Iterator[None]:
    """Report errors of a model's loader as mistakes in the config.

    Args:
        side: the config's key that holds the loader, for the message.

    Raises:
        DPAError: the loader does not take an argument or its value.
    """
    try:
        yield
    except DPAError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise DPAError(f"{side}: {error}. Check its other keys in the config.") from error


def caps_attention(config: PretrainedConfig) -> bool:
    """Tell whether an LLM caps its attention scores, as Gemma-2 does.

    Such an LLM needs eager attention or FlashAttention-2: SDPA, the default of transformers 4.48,
    ignores the cap.
    """
    return getattr(config, "attn_logit_softcapping", None) is not None


def caps_logits(config: PretrainedConfig) -> bool:
    """Whether an LLM's last logits are capped, as Gemma-2's are."""
    return getattr(config, "final_logit_softcapping", None) is not None


def architecture(config: PretrainedConfig) -> dict:
    """Return the sizes that tell architectures apart."""
    return {key: getattr(config, key) for key in _SHAPE_KEYS if hasattr(config, key)}
