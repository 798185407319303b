"""The exported chat template against training's own tokens, for every family."""

import pytest
from jinja2 import TemplateError
from support import runs, small_tokenizers
from transformers import AddedToken
from xtuner.utils import IMAGE_TOKEN_INDEX, PROMPT_TEMPLATE

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.export.chat_template import (
    chat_template,
    disagreements,
    end_of_turn,
    without_bos,
)
from dpa_xtuner.families.base import known_families

IMAGE, TEXT = {"type": "image"}, "What {is} it?"
# name: system, turns as written in the data, turns as transformers' users write them
CONVERSATIONS = {
    "text": (None, [(TEXT, "Two cats.")], [TEXT]),
    "image": (None, [(f"<image>\n{TEXT}", "Two cats.")], [[IMAGE, {"type": "text", "text": TEXT}]]),
    "image behind": (
        None,
        [(f"{TEXT}\n<image>", "Two cats.")],
        [[{"type": "text", "text": f"{TEXT}\n"}, IMAGE]],
    ),
    "image alone": (None, [("<image>", "Two cats.")], [[IMAGE]]),
    "image as text": (None, [(f"<image>\n{TEXT}", "Two.")], [f"<image>\n{TEXT}"]),
    "two images": (
        None,
        [(f"<image>\n<image>\n{TEXT}", "Two cats.")],
        [[IMAGE, IMAGE, {"type": "text", "text": TEXT}]],
    ),
    "an image in each of three turns": (
        None,
        [(f"<image>\n{TEXT}", "A cat."), ("And?", "A dog."), ("<image>\nNow?", "It's 'one'.")],
        [
            [IMAGE, {"type": "text", "text": TEXT}],
            [{"type": "text", "text": "And?"}],
            [IMAGE, {"type": "text", "text": "Now?"}],
        ],
    ),
    "system": ("Be brief.", [(f"<image>\n{TEXT}", "Cats.")] * 2,
               [[IMAGE, {"type": "text", "text": TEXT}]] * 2),
}  # fmt: skip


def both(pieces, name):
    """A family's tokenizer as it was trained with, and as it is exported."""
    kind = runs.KINDS[name]
    made = []
    for _ in range(2):
        if kind.tokenizer.startswith("bytes"):
            adds_bos = kind.tokenizer == "bytes+bos"
            made.append(small_tokenizers.byte_level(*kind.specials, adds_bos=adds_bos))
        else:
            file = pieces(kind.tokenizer != "without")
            made.append(small_tokenizers.llama(file, kind.tokenizer, *kind.specials))
    trained, exported = made
    image = AddedToken("<image>", special=True, normalized=False)
    exported.add_tokens([image], special_tokens=True)
    return trained, exported


def messages_of(system, turns, answers):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in zip(turns, answers, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", runs.KINDS)
def test_tokens_are_those_of_training(pieces, name, conversation):
    trained, exported = both(pieces, name)
    template = known_families()[name].template
    system, turns, asked = CONVERSATIONS[conversation]
    images = tuple("x" for human, _ in turns for _ in range(human.count("<image>")))
    record = Record("", images, system, tuple(turns))
    encoded = RecordTokenizer(trained, "chat", 1, template, 4096)([record])
    exported.chat_template = chat_template(template, exported)
    without_bos(exported)
    messages = messages_of(system, asked, [answer for _, answer in turns])
    if system and not {"SYSTEM", "SYSTEM_INSTRUCTION"} & template.keys():
        assert encoded.problems[0].kind == "system turn"
        with pytest.raises(TemplateError, match="without a system prompt"):
            exported.apply_chat_template(messages, return_dict=False)
        return
    tokens = encoded.tokens.copy()
    tokens[tokens == IMAGE_TOKEN_INDEX] = exported.convert_tokens_to_ids("<image>")
    rendered = exported.apply_chat_template(messages, tokenize=False)
    assert exported(rendered).input_ids == tokens.tolist()
    assert exported.apply_chat_template(messages, return_dict=False) == tokens.tolist()
    # The prompt alone is all before the last answer.
    prompt = exported.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    supervised = encoded.supervised.tolist()
    assert tokens[: len(prompt)].tolist() == prompt
    assert supervised[len(prompt)] and not supervised[len(prompt) - 1]


@pytest.mark.parametrize("kind", ["legacy", "new", "without"])
def test_captions_are_an_image_and_a_text(pieces, kind):
    trained, exported = (small_tokenizers.llama(pieces(kind != "without"), kind) for _ in "12")
    exported.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    template = {"INSTRUCTION": "{input}", "SUFFIX": "\n", "SUFFIX_AS_EOS": True}
    record = Record("", ("x",), None, (("<image>", "A red balloon."),))
    tokens = RecordTokenizer(trained, "caption", 1, None, 4096)([record]).tokens
    tokens[tokens == IMAGE_TOKEN_INDEX] = exported.convert_tokens_to_ids("<image>")
    exported.chat_template = chat_template(template, exported)
    without_bos(exported)
    prompt = exported.apply_chat_template([{"role": "user", "content": [IMAGE]}], return_dict=False)
    assert tokens[: len(prompt)].tolist() == prompt
    assert len(prompt) == 1 + (exported.bos_token_id in prompt)


@pytest.mark.parametrize(
    ("name", "ends"),
    [("llama3", ["<|eot_id|>", "<eos>"]), ("gemma2", ["<end_of_turn>", "</s>"]),
     ("internlm2", ["<|im_end|>", "</s>"]), ("vicuna", ["</s>"]),
     ("qwen2", ["<|im_end|>", "<|endoftext|>"])],
)  # fmt: skip
def test_the_end_of_a_turn(pieces, name, ends):
    _, exported = both(pieces, name)
    ids = end_of_turn(known_families()[name].template, exported)
    assert set(exported.convert_ids_to_tokens(ids)) == set(ends)
    assert exported.convert_ids_to_tokens(ids)[0] == ends[0]


def test_a_template_that_one_text_cant_say_is_told(pieces):
    """XTuner's pieces, each tokenised alone: a space before each, which one text has not."""
    trained, exported = both(pieces, "vicuna")
    template = PROMPT_TEMPLATE["vicuna"]
    exported.chat_template = chat_template(template, exported)
    without_bos(exported)
    told = disagreements(template, "chat", exported, trained)
    assert "1 turn(s) with an image" in told
    trained, exported = both(pieces, "vicuna")
    family = known_families()["vicuna"].template
    exported.chat_template = chat_template(family, exported)
    without_bos(exported)
    assert disagreements(family, "chat", exported, trained) == []
