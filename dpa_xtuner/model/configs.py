"""What is known of a Hugging Face model before its weights are loaded."""

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
    """A model that is neither in a folder nor at the hub."""


def model_class(cfg: dict) -> type[Any]:
    """The class that a model config's ``type``, a ``...from_pretrained``, belongs to."""
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
        local_only: look in folders and the hub's cache, and not at the hub.

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
    """What a model's loader can't take, said as a mistake in the config.

    Args:
        side: the config's key that holds the loader, for the message.

    Raises:
        DPAError: an argument of the loader, or its value.
    """
    try:
        yield
    except DPAError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise DPAError(f"{side}: {error}. Check the keys beside its type in the config.") from error


def caps_attention(config: PretrainedConfig) -> bool:
    """Whether an LLM's attention scores are capped, as Gemma-2's are.

    Such an LLM needs the eager attention or FlashAttention-2: SDPA, which transformers 4.48 would
    choose, leaves the cap out.
    """
    return getattr(config, "attn_logit_softcapping", None) is not None


def caps_logits(config: PretrainedConfig) -> bool:
    """Whether an LLM's last logits are capped, as Gemma-2's are."""
    return getattr(config, "final_logit_softcapping", None) is not None


def architecture(config: PretrainedConfig) -> dict:
    """The sizes that tell architectures apart, for records and comparisons."""
    return {key: getattr(config, key) for key in _SHAPE_KEYS if hasattr(config, key)}
