"""The base class of LLM families, and how they are found."""

from typing import Any, ClassVar, cast

from dpa_xtuner.errors import DPAError
from dpa_xtuner.registry import FAMILIES, find_named
from dpa_xtuner.versions import require_transformers

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a LLaMA-type decoder layer."""

CHATML = dict(
    SYSTEM="<|im_start|>system\n{system}<|im_end|>\n",
    INSTRUCTION="<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    SUFFIX="<|im_end|>",
    SUFFIX_AS_EOS=True,
    SEP="\n",
    STOP_WORDS=["<|im_end|>"],
    AS_ONE_TEXT=True,
)
"""ChatML, the template that several families share."""


class Family:
    """One family of LLMs, described by class attributes.

    Attributes:
        llm: the config type of its loader, a ``...from_pretrained``.
        model_types: values of ``model_type`` in the configurations that the loader reads.
        template: its chat template, with the keys of :mod:`dpa_xtuner.data.templates`.
        tokenizer: the config type of its tokenizer's loader.
        lora_targets: the linear layers that LoRA adapts; by default all but the head.
        loading: further arguments of ``llm``.
        since: the first version of transformers that the family is used with.
    """

    llm: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    template: ClassVar[dict[str, Any]]
    tokenizer: ClassVar[str] = "transformers.AutoTokenizer.from_pretrained"
    lora_targets: ClassVar[tuple[str, ...]] = LLAMA_LAYERS
    loading: ClassVar[dict[str, Any]] = {}
    since: ClassVar[str] = "4.48"


def find_family(name: str) -> type[Family]:
    """Find a family by its name.

    Raises:
        DPAError: it is unknown, lacks a required attribute, or needs a newer transformers.
    """
    found, _ = find_named(FAMILIES, name)
    family = cast("type[Family]", found)
    if missing := [key for key in ("llm", "model_types", "template") if not hasattr(family, key)]:
        raise DPAError(f"family={name!r} has no {', '.join(missing)}; see {Family.__module__}.")
    require_transformers(family.since, f"family={name!r}")
    return family


def known_families() -> dict[str, type[Family]]:
    """List the registered families by name, in alphabetical order."""
    FAMILIES.import_from_location()
    return dict(sorted(FAMILIES.module_dict.items()))


def check_model_type(family: type[Family], model: str, found: str) -> None:
    """Refuse a model that the family's loader is not made for.

    transformers would only warn, and load the weights whose names match.

    Args:
        family: the family in the config.
        model: a folder or hub name, for the message.
        found: the ``model_type`` of its configuration, as the family's loader reads it.

    Raises:
        DPAError: the family does not load this type; the message names the families that do.
    """
    if found in family.model_types:
        return
    known = known_families()
    ours = next((name for name, other in known.items() if other is family), family.__name__)
    others = [name for name, other in known.items() if found in other.model_types]
    advice = f"Set family to one of: {', '.join(others)}" if others else "No family loads it"
    raise DPAError(
        f"{model} is a model of type {found!r}, but family {ours!r} loads "
        f"{', '.join(family.model_types)}. {advice}."
    )
