"""What a family of LLMs is, and how its chat template is held against a tokenizer's own."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, ClassVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpa_xtuner.data.encode import Encoder
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError
from dpa_xtuner.registry import FAMILIES, find_named

LLAMA_LAYERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Every linear layer of a LLaMA-type decoder layer."""


class Family:
    """Knowledge about one family, as class attributes.

    Attributes:
        llm: the config type of its loader, a ``...from_pretrained``.
        model_types: the ``model_type`` of the configurations that the loader reads.
        template: its chat template, with the keys of :mod:`dpa_xtuner.data.templates`.
        tokenizer: the config type of its tokenizer's loader.
        lora_targets: the linear layers that LoRA adapts: all but the head.
    """

    llm: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    template: ClassVar[dict[str, Any]]
    tokenizer: ClassVar[str] = "transformers.AutoTokenizer.from_pretrained"
    lora_targets: ClassVar[tuple[str, ...]] = LLAMA_LAYERS


def find_family(name: str) -> type[Family]:
    """The family of a name.

    Raises:
        DPAError: unknown, and the message has the nearest and the known ones; or one that does
            not say what a family must.
    """
    family, _ = find_named(FAMILIES, name)
    if missing := [key for key in ("llm", "model_types", "template") if not hasattr(family, key)]:
        raise DPAError(f"family={name!r} has no {', '.join(missing)}; see {Family.__module__}.")
    return family


def check_model_type(family: type[Family], model: str, found: str) -> None:
    """Refuse a model that another family's loader reads.

    transformers only warns of it, and loads what has the same name.

    Args:
        family: the config's.
        model: a folder or hub name, for the message.
        found: the ``model_type`` of its configuration, as the family's loader reads it.

    Raises:
        DPAError: the configuration is of a type that the family does not load; the message
            names the families that do.
    """
    if found in family.model_types:
        return
    others = [name for name, other in _families() if found in other.model_types]
    advice = f"Set family to one of: {', '.join(others)}" if others else "No family loads it"
    raise DPAError(
        f"{model} is a model of type {found!r}, and family {_name(family)!r} loads "
        f"{', '.join(family.model_types)}. {advice}."
    )


def check_template(
    family: type[Family] | str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Hold a chat template against the one that the tokenizer brings, token by token.

    A tokenizer without a chat template of its own passes. Compared are conversations of one
    and of two turns, with a system prompt where both can say one, and each prompt without its
    last answer.

    Args:
        family: a family, or a template as of ``resolve_template``.
        tokenizer: the LLM's.
        name: how the config calls the family or template, for the message.

    Raises:
        DPAError: they differ; the message shows both renderings, and the families whose
            template is the tokenizer's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    found = _difference(_template_of(family), tokenizer)
    if found is None:
        return
    published, ours, place = found
    fitting = [name for name, family in _families() if _fits(family, tokenizer)]
    advice = f"family={fitting[0]!r} has it. " if fitting else ""
    raise DPAError(
        f"The chat template of {name!r} is not the one that the tokenizer of "
        f"{tokenizer.name_or_path!r} was published with. They differ at token {place}:\n"
        f"  the tokenizer's: {published!r}\n"
        f"  {name!r}: {ours!r}\n"
        f"{advice}Set family or prompt_template to what the model was trained with; to train "
        f"with another template on purpose, set tokenizer.chat_template=''."
    )


_QUESTIONS = (("What is shown here?", "Two cats on a bench."), ("And the dog?", "It sleeps."))


def _difference(
    template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str, int] | None:
    """The first difference: the published rendering, ours, and the place of the token."""
    systems = [None, "Be brief."]
    if not (template.get("SYSTEM") or template.get("SYSTEM_INSTRUCTION")):
        systems = [None]
    for turns in (_QUESTIONS[:1], _QUESTIONS):
        for system in systems:
            messages = _messages(turns, system)
            try:
                published = [
                    tokenizer.apply_chat_template(messages),
                    tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True),
                ]
            except TemplateError as error:
                if system is None:
                    raise DPAError(
                        f"The chat template of the tokenizer of {tokenizer.name_or_path!r} can't "
                        f"say a question and its answer ({error}). Mend it, or set "
                        f"tokenizer.chat_template='' to go by prompt_template alone."
                    ) from None
                continue  # it has no system prompt; XTuner's templates have one for any family
            own = _ours(template, tokenizer, turns, system)
            for theirs, ours in zip(published, own, strict=True):
                if theirs != ours:
                    pairs = zip(theirs, ours, strict=False)
                    place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    return tokenizer.decode(theirs), tokenizer.decode(ours), place
    return None


def _fits(family: type[Family], tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _difference(family.template, tokenizer) is None
    except DPAError:  # such as a tokenizer without the EOS that the template ends with
        return False


def _messages(turns: tuple[tuple[str, str], ...], system: str | None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def _ours(
    template: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    turns: tuple[tuple[str, str], ...],
    system: str | None,
) -> tuple[list[int], list[int]]:
    """All tokens of a conversation, and those before its last answer."""
    encoded = Encoder(tokenizer, "chat", 1, template, 2**20)([Record("", (), system, turns)])
    tokens, supervised = encoded.tokens.tolist(), encoded.supervised.tolist()
    start = len(tokens)
    while not supervised[start - 1]:  # what follows the last answer
        start -= 1
    while supervised[start - 1]:
        start -= 1
    return tokens, tokens[:start]


def _template_of(family: type[Family] | str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(family, type):
        return family.template
    return resolve_template(family)


def _families() -> list[tuple[str, type[Family]]]:
    FAMILIES.import_from_location()
    return sorted(FAMILIES.module_dict.items())


def _name(family: type[Family]) -> str:
    return next((name for name, found in _families() if found is family), family.__name__)
