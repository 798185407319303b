"""Turn a record into pieces of text, each supervised or not, in one of three sample formats.

| sample format  | stage | pieces (supervised ones in brackets)                                    |
|----------------|-------|-------------------------------------------------------------------------|
| `caption_text` | proxy | [caption, newline]                                                      |
| `caption`      | align | image, [caption, newline]                                               |
| `chat`         | tune  | system and instruction, [answer and its end], separator; and so on      |

The format ``chat`` follows XTuner's ``llava_map_fn``, ``template_map_fn`` and ``encode_fn``. A
template has XTuner's keys and, where a family's published chat template asks for them, these:

| key                  | meaning                                                         |
|----------------------|-----------------------------------------------------------------|
| `DEFAULT_SYSTEM`     | the system prompt of a record that has none                     |
| `SYSTEM_INSTRUCTION` | SYSTEM and INSTRUCTION in one, where the first turn holds both  |
| `PREFIX`             | what stands before an answer and is supervised like it: a space |
| `STRIP`              | whether the white space around contents is removed              |
| `AS_ONE_TEXT`        | whether the pieces are tokenised as parts of one text           |
| `NO_THINKING`        | what stands before the last answer alone: an empty thinking     |
|                      | block. It is not supervised                                     |
| `TODAY`              | the date (``2024-07-26``) in SYSTEM, where the published chat   |
|                      | template writes that of the day on which it is used             |

A chat template's rendering is tokenised as one text. XTuner tokenises each piece of its templates
as if it stood alone, which differs for the tokenizers that put a space before a text (Llama-2,
Vicuna).
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

from xtuner.utils import DEFAULT_IMAGE_TOKEN, PROMPT_TEMPLATE

from dpa_xtuner.data.records import Malformed, Record
from dpa_xtuner.errors import DPAError, nearest

SampleFormat = Literal["caption_text", "caption", "chat"]
_TEMPLATE_KEYS = (
    "SYSTEM", "INSTRUCTION", "SUFFIX", "SUFFIX_AS_EOS", "SEP", "STOP_WORDS", "DEFAULT_SYSTEM",
    "SYSTEM_INSTRUCTION", "PREFIX", "STRIP", "AS_ONE_TEXT", "NO_THINKING", "TODAY",
)  # fmt: skip
_END_OF_THINKING = "</think>"


class Special(Enum):
    """What is a single token rather than text."""

    IMAGE = "image"
    EOS = "eos"


class Piece(NamedTuple):
    """A stretch that is tokenised on its own.

    Attributes:
        content: text, or a special token.
        supervised: whether its tokens are trained on.
    """

    content: str | Special
    supervised: bool


def resolve_template(template: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Find the prompt template of the format ``chat``.

    Args:
        template: a name in ``xtuner.utils.PROMPT_TEMPLATE``, or a mapping with "INSTRUCTION" and,
            as needed, XTuner's other keys and those of this module.

    Returns:
        The template as a plain dict.

    Raises:
        DPAError: the name or a key is unknown, or "INSTRUCTION" is missing.
    """
    if isinstance(template, str):
        if template not in PROMPT_TEMPLATE:
            raise DPAError(_unknown("prompt_template", template, PROMPT_TEMPLATE))
        return dict(PROMPT_TEMPLATE[template])
    if not isinstance(template, Mapping) or "{input}" not in template.get("INSTRUCTION", ""):
        raise DPAError(
            f"prompt_template is {template!r}; the format 'chat' needs a name from "
            "xtuner.utils.PROMPT_TEMPLATE or a dict with INSTRUCTION='... {input} ...'."
        )
    for key in template:
        if key not in _TEMPLATE_KEYS:
            raise DPAError(_unknown("prompt_template key", key, _TEMPLATE_KEYS))
    return dict(template)


def to_pieces(
    record: Record, sample_format: SampleFormat, template: Mapping[str, Any]
) -> list[Piece]:
    """Lay a record out in a sample format.

    Args:
        record: a well-formed record.
        sample_format: see above.
        template: from :func:`resolve_template`; read by "chat" only.

    Raises:
        Malformed: the record does not fit into this format.
    """
    if sample_format == "chat":
        return _chat(record, template)
    answers = len(record.turns)
    if answers > 1:
        raise Malformed(f"several answers: caption record has {answers} answers, expected 1")
    caption = record.turns[0][1]
    if not caption.strip():
        raise Malformed("empty caption")
    if record.silent:
        raise Malformed("no answer to train on: the record says so")
    if sample_format == "caption_text":
        return [Piece(caption + "\n", True)]
    if not record.images:
        raise Malformed("caption without an image")
    return [Piece(Special.IMAGE, False)] * len(record.images) + [Piece(caption + "\n", True)]


def silent_turns(record: Record) -> set[int]:
    """List the turns, from 0, whose answer is empty or that the record leaves untrained."""
    blank = {i for i, (_, gpt) in enumerate(record.turns) if not gpt or gpt.isspace()}
    return blank.union(record.silent) if record.silent else blank


def _chat(record: Record, template: Mapping[str, Any]) -> list[Piece]:
    system = record.system or template.get("DEFAULT_SYSTEM")
    if system and not (template.get("SYSTEM") or template.get("SYSTEM_INSTRUCTION")):
        raise Malformed("system turn: the prompt template has no SYSTEM")
    silent = silent_turns(record)
    if len(silent) == len(record.turns):
        raise Malformed(
            "no answer to train on: the record says so" if record.silent else "empty answer"
        )
    thinking = template["INSTRUCTION"] + template.get("NO_THINKING", "")
    if _END_OF_THINKING in thinking and any(_END_OF_THINKING in gpt for _, gpt in record.turns):
        raise Malformed(
            "answer with reasoning: the prompt template closes the thinking before answers"
        )
    strip = str.strip if template.get("STRIP") else str
    suffix, separator = template.get("SUFFIX") or "", template.get("SEP", "")
    pieces = []
    for number, (human, gpt) in enumerate(record.turns, 1):
        first = strip(system) if number == 1 and system is not None else None
        prompt = _prompt(strip(_image_first(human)), first, number, template)
        if number == len(record.turns):
            prompt += template.get("NO_THINKING", "")
        for i, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
            if i > 0:
                pieces.append(Piece(Special.IMAGE, False))
            pieces.append(Piece(chunk, False))
        trained = number - 1 not in silent
        pieces.append(Piece(template.get("PREFIX", "") + strip(gpt) + suffix, trained))
        if not template.get("SUFFIX_AS_EOS", False):
            pieces.append(Piece(Special.EOS, trained))
        pieces.append(Piece(separator, False))
    return [piece for piece in pieces if piece.content]


def _prompt(human: str, system: str | None, number: int, template: Mapping[str, Any]) -> str:
    """Render a turn's text up to its answer; ``system`` only if this turn holds it."""
    if system is not None and "SYSTEM_INSTRUCTION" in template:
        return template["SYSTEM_INSTRUCTION"].format(system=system, input=human, round=number)
    before = "" if system is None else template["SYSTEM"].format(system=system)
    return before + template["INSTRUCTION"].format(input=human, round=number)


def _image_first(human: str) -> str:
    """Move a turn's only image to its front, as stock XTuner and LLaVA do.

    Several images stay where they are written: the text around them may refer to their places.
    """
    if human.count(DEFAULT_IMAGE_TOKEN) != 1:
        return human
    text = human.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{text}".strip()


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    return (
        f"unknown {what} {name!r}{nearest(name, known) or '.'} Known: {', '.join(sorted(known))}."
    )
