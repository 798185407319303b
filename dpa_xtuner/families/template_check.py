"""Compares a family's chat template with the one that a tokenizer was published with."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import zip_longest
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError
from dpa_xtuner.families.base import Family, known_families

_DATE = re.compile(r"strftime_now\((['\"])(.*?)\1\)")  # a chat template's date of today
_TURNS = (("What is shown here?", "Two cats on a bench."), ("And the dog?", "It sleeps."))


def check_template(
    family: type[Family] | str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Compare a chat template with that of the tokenizer, token by token.

    A tokenizer without a chat template passes. The comparison uses conversations of one and two
    turns, with a system prompt if both templates support one, and each prompt without its last
    answer. Thinking is off, and today is the template's ``TODAY``, if it has one.

    Args:
        family: a family, or a template for ``resolve_template``.
        tokenizer: the LLM's tokenizer.
        name: the config's name for the family or template, for the message.

    Raises:
        DPAError: they differ; the message shows both renderings, and a family whose template is
            the tokenizer's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    template = family.template if isinstance(family, type) else resolve_template(family)
    found = _difference(template, tokenizer)
    if found is None:
        return
    published, ours, index = found
    fitting = [name for name, family in known_families().items() if _fits(family, tokenizer)]
    advice = f"family={fitting[0]!r} has it. " if fitting else ""
    raise DPAError(
        f"The chat template of {name!r} is not the one that the tokenizer of "
        f"{tokenizer.name_or_path!r} was published with. They differ at token {index}:\n"
        f"  the tokenizer's: {published!r}\n"
        f"  {name!r}: {ours!r}\n"
        f"{advice}Set family or prompt_template to what the model was trained with; to train "
        f"with another template on purpose, set tokenizer.chat_template=''."
    )


def _difference(
    template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str, int] | None:
    """Find the first difference: the published rendering, ours, and the index of the token."""
    for published, ours in _renderings(template, tokenizer):
        if published != ours:
            pairs = enumerate(zip_longest(published, ours))
            index = next(i for i, (theirs, other) in pairs if theirs != other)
            return tokenizer.decode(published), tokenizer.decode(ours), index
    return None


def _renderings(
    template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Render conversations by the tokenizer's template and by ours, with and without answer."""
    theirs = tokenizer.get_chat_template()
    if today := template.get("TODAY"):
        day = date.fromisoformat(today)
        theirs = _DATE.sub(lambda found: repr(day.strftime(found[2])), theirs)
    fixed: dict[str, Any] = dict(chat_template=theirs, enable_thinking=False, return_dict=False)
    says_system = template.get("SYSTEM") or template.get("SYSTEM_INSTRUCTION")
    for turns in (_TURNS[:1], _TURNS):
        for system in (None, "Be brief.") if says_system else (None,):
            messages = [{"role": "system", "content": system}] if system else []
            for question, answer in turns:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            try:
                whole = tokenizer.apply_chat_template(messages, **fixed)
                prompt = tokenizer.apply_chat_template(
                    messages[:-1], add_generation_prompt=True, **fixed
                )
            except TemplateError as error:
                if system is None:
                    raise DPAError(
                        f"The chat template of the tokenizer of {tokenizer.name_or_path!r} can't "
                        f"render a question and its answer ({error}). Mend it, or set "
                        f"tokenizer.chat_template='' to rely on prompt_template alone."
                    ) from None
                continue  # it supports no system prompt, though XTuner's templates always do
            encode = RecordTokenizer(tokenizer, "chat", 1, template, 2**20)
            encoded = encode([Record("", (), system, turns)])
            tokens, supervised = encoded.tokens.tolist(), encoded.supervised
            last_answer = np.flatnonzero(supervised[1:] & ~supervised[:-1])[-1] + 1
            yield whole, tokens
            yield prompt, tokens[:last_answer]


def _fits(family: type[Family], tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _difference(family.template, tokenizer) is None
    except DPAError:  # such as a tokenizer without the EOS that the template ends with
        return False
