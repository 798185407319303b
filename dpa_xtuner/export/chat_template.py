"""Translates a training template into the Jinja template of a processor.

The template writes the BOS, and the exported tokenizer adds none. So transformers' two steps
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

# As in training (dpa_xtuner.data.templates), the only image of a turn goes to its front.
_JINJA = """\
{%- set ns = namespace(system=DEFAULT, round=0) -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for block in message['content'] -%}
{%- set turn.text = turn.text ~ ('<image>\\n' if block['type'] == 'image' else block['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' and turn.text.count('<image>') == 1 -%}
{%- set turn.text = ('<image>\\n' ~ turn.text.replace('<image>', '').strip()).strip() -%}
{%- endif -%}
STRIP
{%- if message['role'] == 'system' -%}
{%- set ns.system = turn.text or DEFAULT -%}
{%- elif message['role'] == 'user' -%}
{%- set ns.round = ns.round + 1 -%}
{%- if ns.round == 1 and ns.system is not none -%}
{%- set turn.text = FIRST -%}
{%- else -%}
{%- set turn.text = INSTRUCTION -%}
{%- endif -%}
THINKING
BOS
{%- for chunk in turn.text.split('<image>') -%}
{{- IMAGE ~ chunk -}}
{%- endfor -%}
{%- else -%}
{{- ANSWER -}}
{%- endif -%}
{%- endfor -%}
"""
_NO_SYSTEM = "raise_exception('This model was trained without a system prompt')"


def chat_template(template: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Build the Jinja template that gives the tokens of training.

    Messages are those of transformers: ``content`` is text, or a list of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``. An image before a text becomes ``<image>``, newline, text,
    as in LLaVA's data.

    Args:
        template: the training template, see :mod:`dpa_xtuner.data.templates`.
        tokenizer: the LLM's tokenizer, with ``<image>`` as an additional special token.
    """
    values = {"input": "turn.text", "system": "ns.system", "round": "ns.round"}
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
    answer = f"{template.get('PREFIX', '')!r} ~ turn.text ~ {end + template.get('SEP', '')!r}"
    default = template.get("DEFAULT_SYSTEM")
    if default is not None and template.get("STRIP"):
        default = default.strip()
    fields = {
        "DEFAULT": "none" if default is None else repr(default),
        "STRIP": "{%- set turn.text = turn.text.strip() -%}" if template.get("STRIP") else "",
        "FIRST": first,
        "INSTRUCTION": instruction,
        "THINKING": _no_thinking(template),
        "BOS": _first_bos(tokenizer),
        "IMAGE": _image(tokenizer),
        "ANSWER": answer,
    }
    lines = []
    for line in _JINJA.splitlines():
        for name, value in fields.items():
            if name in line:
                line = line.replace(name, value)
                break  # the inserted text may contain such a name
        lines.append(line)
    return "\n".join(line for line in lines if line)


def _expression(text: str, values: Mapping[str, str]) -> str:
    """Translate ``"a {input}"`` to the Jinja expression ``'a ' ~ turn.text``."""
    pieces = []
    for literal, field, *_ in Formatter().parse(text):
        pieces += [repr(literal)] if literal else []
        pieces += [] if field is None else [values[field]]
    return " ~ ".join(pieces)


def _no_thinking(template: Mapping[str, Any]) -> str:
    """Build the Jinja line that ends the last prompt; at most its answer follows that message."""
    if "NO_THINKING" not in template:
        return ""
    text = f"turn.text ~ {template['NO_THINKING']!r}"
    return f"{{%- if loop.revindex <= 2 -%}}{{%- set turn.text = {text} -%}}{{%- endif -%}}"


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _first_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not _adds_bos(tokenizer):
        return ""
    bos = tokenizer.bos_token
    return (
        f"{{%- if ns.round == 1 and not turn.text.startswith({bos!r}) -%}}"
        f"{{%- set turn.text = {bos!r} ~ turn.text -%}}{{%- endif -%}}"
    )


def without_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer add no BOS, now and after it is saved and loaded."""
    tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = False
    if _adds_bos(tokenizer) and tokenizer.is_fast:  # its class does not know add_bos_token
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


def _image(tokenizer: PreTrainedTokenizerBase) -> str:
    """Build the Jinja expression of what precedes a chunk of text: nothing, or an image.

    Training tokenises the text after an image on its own. Some LLaMA tokenizers put a space before
    such a text, but none after a special token.
    """

    def ids(text: str) -> list[int]:
        """Tokenise a text without special tokens."""
        return tokenizer(text, add_special_tokens=False).input_ids

    alone = ids(DEFAULT_IMAGE_TOKEN) + ids("\na")
    needs_space = ids("<image>\na") != alone and ids("<image> \na") == alone
    space = " ~ (' ' if chunk and not chunk.startswith(' ') else '')" if needs_space else ""
    return f"('' if loop.first else '<image>'{space})"


_TURNS = (("What is shown here?", "Two cats on a bench."), ("And the dog?", "It sleeps."))


def _examples(sample_format: SampleFormat) -> dict[str, Record]:
    """Make a caption, or conversations of one and two turns, with and without an image."""
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
    """List the kinds of prompts whose tokens differ from those of training.

    There should be none. But training tokenises some of XTuner's templates piece by piece, which
    one text can't always reproduce. And a slow tokenizer may give other tokens than the fast one
    that transformers loads.

    Args:
        template: the training template.
        sample_format: ``chat``, or ``caption``, which compares what precedes the caption.
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
    """List the ids of tokens that end an answer: the template's first, the tokenizer's EOS last."""
    words = [template.get("SUFFIX") or "", *template.get("STOP_WORDS", ())]
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[word.strip()] for word in words if word.strip() in vocabulary]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))
