"""A training template as the Jinja template of a processor, and what ends a turn in it.

The template writes the BOS, and the exported tokenizer adds none, so that transformers' two steps
(``text = processor.apply_chat_template(messages)``, then ``processor(images=..., text=text)``)
and ``tokenizer.apply_chat_template(messages)`` give the same tokens.
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from xtuner.utils import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.templates import SampleFormat

# A turn's only image goes to its front, as dpa_xtuner.data.templates has it in training.
_JINJA = """\
{%- set ns = namespace(system=DEFAULT, round=0) -%}
{%- for message in messages -%}
{%- set said = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- else -%}
{%- for block in message['content'] -%}
{%- set said.text = said.text ~ ('<image>\\n' if block['type'] == 'image' else block['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' and said.text.count('<image>') == 1 -%}
{%- set said.text = ('<image>\\n' ~ said.text.replace('<image>', '').strip()).strip() -%}
{%- endif -%}
STRIP
{%- if message['role'] == 'system' -%}
{%- set ns.system = said.text or DEFAULT -%}
{%- elif message['role'] == 'user' -%}
{%- set ns.round = ns.round + 1 -%}
{%- if ns.round == 1 and ns.system is not none -%}
{%- set said.text = FIRST -%}
{%- else -%}
{%- set said.text = INSTRUCTION -%}
{%- endif -%}
BOS
{%- for chunk in said.text.split('<image>') -%}
{{- IMAGE ~ chunk -}}
{%- endfor -%}
{%- else -%}
{{- ANSWER -}}
{%- endif -%}
{%- endfor -%}
"""
_NO_SYSTEM = "raise_exception('This model was trained without a system prompt')"


def chat_template(template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template that gives the tokens of training.

    Messages are transformers': ``content`` is text, or a list of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``. An image in front of a text is ``<image>``, newline, text,
    as in LLaVA's data.

    Args:
        template: the training template, see :mod:`dpa_xtuner.data.templates`.
        tokenizer: the LLM's, as in training but for ``<image>``, a special token.
    """
    values = {"input": "said.text", "system": "ns.system", "round": "ns.round"}
    instruction = _expression(template["INSTRUCTION"], values)
    if "SYSTEM_INSTRUCTION" in template:
        first = _expression(template["SYSTEM_INSTRUCTION"], values)
    elif template.get("SYSTEM"):
        first = f"{_expression(template['SYSTEM'], values)} ~ {instruction}"
    else:
        first = _NO_SYSTEM
    end = template.get("SUFFIX") or ""
    if not template.get("SUFFIX_AS_EOS", False):
        end += tokenizer.eos_token
    answer = f"{template.get('PREFIX', '')!r} ~ said.text ~ {end + template.get('SEP', '')!r}"
    default = template.get("DEFAULT_SYSTEM")
    if default is not None and template.get("STRIP"):
        default = default.strip()
    fields = {
        "DEFAULT": "none" if default is None else repr(default),
        "STRIP": "{%- set said.text = said.text.strip() -%}" if template.get("STRIP") else "",
        "FIRST": first,
        "INSTRUCTION": instruction,
        "BOS": _first_bos(tokenizer),
        "IMAGE": _image(tokenizer),
        "ANSWER": answer,
    }
    lines = []
    for line in _JINJA.splitlines():
        for name, value in fields.items():
            if name in line:
                line = line.replace(name, value)
                break  # what was put in may hold such a word itself
        lines.append(line)
    return "\n".join(line for line in lines if line)


def _expression(text: str, values: Mapping[str, str]) -> str:
    """``"a {input}"`` as the Jinja expression ``'a ' ~ said.text``."""
    parts = []
    for literal, field, *_ in Formatter().parse(text):
        parts += [repr(literal)] if literal else []
        parts += [] if field is None else [values[field]]
    return " ~ ".join(parts)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _first_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not _adds_bos(tokenizer):
        return ""
    bos = tokenizer.bos_token
    return (
        f"{{%- if ns.round == 1 and not said.text.startswith({bos!r}) -%}}"
        f"{{%- set said.text = {bos!r} ~ said.text -%}}{{%- endif -%}}"
    )


def without_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer add no BOS, here and where it is loaded again."""
    tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = False
    if _adds_bos(tokenizer) and tokenizer.is_fast:  # no class of its own that knows the setting
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


def _image(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before a chunk of text: nothing, or an image.

    Training tokenises the text behind an image as one that stands alone. Some LLaMA tokenizers
    put a space before such a text, and none behind a special token.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    alone = ids(DEFAULT_IMAGE_TOKEN) + ids("\na")
    needs_space = ids("<image>\na") != alone and ids("<image> \na") == alone
    space = " ~ (' ' if chunk and not chunk.startswith(' ') else '')" if needs_space else ""
    return f"('' if loop.first else '<image>'{space})"


_TURNS = (("What is shown here?", "Two cats on a bench."), ("And the dog?", "It sleeps."))


def _examples(sample_format: SampleFormat) -> dict[str, Record]:
    """A caption, or conversations of one turn and of two, without an image and with one."""
    if sample_format == "caption":
        return {"an image": Record("", ("x",), None, ((DEFAULT_IMAGE_TOKEN, "A red balloon."),))}
    found = {}
    for turns in (_TURNS[:1], _TURNS):
        for images in (0, 1):
            human = f"{DEFAULT_IMAGE_TOKEN}\n" * images + turns[0][0]
            record = Record("", ("x",) * images, None, ((human, turns[0][1]), *turns[1:]))
            found[f"{len(turns)} turn(s) {'with' if images else 'without'} an image"] = record
    return found


def disagreements(
    template: Mapping[str, Any],
    sample_format: SampleFormat,
    exported: PreTrainedTokenizerBase,
    trained: PreTrainedTokenizerBase,
) -> list[str]:
    """Kinds of prompts whose tokens are not those of training; none is as it should be.

    A template of XTuner's whose pieces are tokenised one by one can't always be said as one text,
    and a slow tokenizer may give other tokens than the fast one that transformers loads.

    Args:
        template: the training template.
        sample_format: ``chat``, or ``caption``, where what stands before the caption is compared.
        exported: the tokenizer as transformers loads it, with its chat template.
        trained: the tokenizer of the training.
    """
    encode = RecordTokenizer(trained, sample_format, 1, template, 2**20)
    image_id = exported.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    wrong = []
    for name, record in _examples(sample_format).items():
        messages = []
        for question, answer in record.turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        encoded = encode([record])
        tokens = encoded.tokens
        tokens[tokens == IMAGE_TOKEN_INDEX] = image_id
        if sample_format == "caption":
            messages, tokens = messages[:1], tokens[~encoded.supervised]
        text = exported.apply_chat_template(messages, tokenize=False)
        if exported(text).input_ids != tokens.tolist():
            wrong.append(name)
    return wrong


def end_of_turn(template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer: the template's own first, the tokenizer's EOS last."""
    words = [template.get("SUFFIX") or "", *template.get("STOP_WORDS", ())]
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[word.strip()] for word in words if word.strip() in vocabulary]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))
