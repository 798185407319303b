"""Each family's template against its published chat template, token by token."""

from datetime import date

import pytest
from support import published_templates as published
from support.small_tokenizers import byte_level
from xtuner.utils import PROMPT_TEMPLATE

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.errors import DPAError
from dpa_xtuner.families.base import known_families
from dpa_xtuner.families.template_check import check_template

IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
INST = ("[INST]", "[/INST]")
# family: its published template, its kind of tokenizer, its special tokens, what ends a turn
CASES = {
    "internlm2": (published.INTERNLM2, "without", IM, "<|im_end|>"),
    "internlm3": (published.INTERNLM2, "legacy", IM, "<|im_end|>"),
    "qwen2": (published.QWEN2, "bytes", ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), IM[1]),
    "qwen2_5": (published.QWEN2_5, "bytes", ("<|endoftext|>", "<|im_end|>", IM[0]), IM[1]),
    "qwen3": (published.QWEN3, "bytes", ("<|endoftext|>", IM[1], IM[0]), IM[1]),
    "qwen3_moe": (published.QWEN3, "bytes", ("<|endoftext|>", IM[1], IM[0]), IM[1]),
    "llama2": (published.LLAMA2, "new", (), "</s>"),
    "vicuna": (published.VICUNA, "legacy", (), "</s>"),
    "llama3": (published.LLAMA3, "bytes+bos", ("<|begin_of_text|>", "<eos>", *HEADERS), HEADERS[2]),
    "llama3_1": (published.LLAMA3_1, "bytes+bos", ("<|begin_of_text|>", *HEADERS), HEADERS[2]),
    "llama3_2": (published.LLAMA3_2, "bytes+bos", ("<|begin_of_text|>", *HEADERS), HEADERS[2]),
    "mistral": (published.MISTRAL, "legacy", INST, "</s>"),
    "ministral": (published.MINISTRAL, "bytes+bos", ("<s>", "</s>", *INST), "</s>"),
    "gemma3": (published.GEMMA3, "without", TURNS, "<end_of_turn>"),
    "gemma2": (published.GEMMA2, "without", TURNS, "<end_of_turn>"),
    "smollm2": (published.SMOLLM2, "bytes", IM, "<|im_end|>"),
    "smollm3": (published.SMOLLM3, "bytes", IM, "<|im_end|>"),
}
WITHOUT_SYSTEM = ("gemma2", "mistral", "ministral")
TURN = [("What is shown here?", "Two cats sleep.")]
CONVERSATIONS = {
    "one turn": (None, TURN),
    "three turns": (None, [*TURN, ("And the dog?", "It sleeps."), ("Why?", "Dusk {falls}.")]),
    "a system turn": ("Be brief.", TURN),
    "a system turn and two turns": ("Be brief.", TURN * 2),
}


def make(sentencepiece, name):
    template, kind, specials, _ = CASES[name]
    if kind.startswith("bytes"):
        tokenizer = byte_level(*specials, adds_bos=kind == "bytes+bos")
    else:
        tokenizer = sentencepiece(kind, *specials)
    if "<think>" in template:
        tokenizer.add_tokens(["<think>", "</think>"])  # tokens, but no special ones
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, template, system, turns):
    return RecordTokenizer(tokenizer, "chat", 1, template, 4096)(
        [Record("", (), system, tuple(turns))]
    )


def as_messages(system, turns):
    messages = [{"role": "system", "content": system}] if system else []
    for human, gpt in turns:
        messages += [{"role": "user", "content": human}, {"role": "assistant", "content": gpt}]
    return messages


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_published_template(sentencepiece, name, conversation, monkeypatch):
    tokenizer, template = make(sentencepiece, name), known_families()[name].template
    system, turns = CONVERSATIONS[conversation]
    encoded = encode(tokenizer, template, system, turns)
    if name in WITHOUT_SYSTEM and system:
        assert [problem.kind for problem in encoded.problems] == ["system turn"]
        return
    messages = as_messages(system, turns)
    how = dict(return_dict=False, enable_thinking=False)
    if "TODAY" in template:
        today = date.fromisoformat(template["TODAY"])
        then = type("Then", (), {"now": staticmethod(lambda: today)})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", then)
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(messages, **how)
    # Trained are the answers and what ends a turn; before the last of them stands the prompt.
    end = CASES[name][3]
    supervised, answers = encoded.tokens[encoded.supervised].tolist(), []
    for token in supervised:
        answers.append(token)
        if token == tokenizer.convert_tokens_to_ids(end):
            assert tokenizer.decode(answers).removesuffix(end).strip() == turns[0][1]
            turns, answers = turns[1:], []
    assert turns == [] and answers == []
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **how)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert not encoded.supervised[len(prompt) - 1] and encoded.supervised[len(prompt)]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] != "bytes"])
def test_there_is_one_bos_at_the_start(sentencepiece, name):
    tokenizer = make(sentencepiece, name)
    encoded = encode(tokenizer, known_families()[name].template, None, TURN * 2)
    tokens = encoded.tokens.tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == (2 if name == "llama2" else 1)


@pytest.mark.parametrize("kind", ["legacy", "new"])
@pytest.mark.parametrize("name", ["llama2", "vicuna", "internlm3"])
def test_both_kinds_of_llama_tokenizers(sentencepiece, name, kind):
    tokenizer = sentencepiece(kind, *CASES[name][2])
    tokenizer.chat_template = CASES[name][0]
    check_template(known_families()[name], tokenizer, name)
    encoded = encode(tokenizer, known_families()[name].template, "Be brief.", TURN * 3)
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(
        as_messages("Be brief.", TURN * 3), return_dict=False
    )


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3_1", "gemma2", "gemma3"])
def test_white_space_around_contents_goes_where_the_published_template_strips(sentencepiece, name):
    tokenizer = make(sentencepiece, name)
    turns = [("  Why?\n", "\nDusk. "), ("Why ", " It sleeps.")]
    encoded = encode(tokenizer, known_families()[name].template, None, turns)
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(
        as_messages(None, turns), return_dict=False
    )


@pytest.mark.parametrize("name", ["llama2", "vicuna", "qwen2_5"])
def test_an_image_stands_in_the_first_turn(sentencepiece, name):
    tokenizer, template = make(sentencepiece, name), known_families()[name].template
    record = Record("a", ("x.png",), None, (("What is it?\n<image>", "Cats."),))
    encoded = RecordTokenizer(tokenizer, "chat", 4, template, 4096)([record])
    (place,) = (encoded.tokens < 0).nonzero()[0]
    before = tokenizer.decode(encoded.tokens[:place])
    after = tokenizer.decode(encoded.tokens[place + 1 :])
    start = {"llama2": "[INST] ", "vicuna": "USER: ", "qwen2_5": "<|im_start|>user\n"}[name]
    assert before.endswith(start)
    assert after.lstrip(" ").startswith("\nWhat is it?")
    assert encoded.lengths.tolist() == [len(encoded.tokens) + 3]


def test_an_answer_with_reasoning_is_no_answer_after_an_empty_thinking_block(sentencepiece):
    tokenizer, template = make(sentencepiece, "qwen3"), known_families()["qwen3"].template
    turns = [*TURN, ("And the dog?", "<think>\nIt lies still.\n</think>\n\nIt sleeps.")]
    encoded = encode(tokenizer, template, None, turns)
    assert [problem.kind for problem in encoded.problems] == ["answer with reasoning"]
    plain = {key: value for key, value in template.items() if key != "NO_THINKING"}
    assert encode(tokenizer, plain, None, turns).problems == []


@pytest.mark.parametrize("name", CASES)
def test_the_right_family_passes_the_check(sentencepiece, name):
    check_template(known_families()[name], make(sentencepiece, name), name)


@pytest.mark.parametrize(
    ("used", "published_with", "right"),
    [
        ("qwen2", "qwen2_5", "qwen2_5"),
        ("llama3", "llama3_1", "llama3_1"),
        ("vicuna", "llama2", "llama2"),
        ("internlm2", "gemma2", "gemma2"),
    ],
)
def test_another_familys_template_is_refused(sentencepiece, used, published_with, right):
    tokenizer = make(sentencepiece, published_with)
    with pytest.raises(DPAError) as caught:
        check_template(known_families()[used], tokenizer, used)
    message = str(caught.value)
    assert f"family={right!r} has it" in message
    question = [{"role": "user", "content": "What is shown here?"}]
    rendered = tokenizer.apply_chat_template(question, tokenize=False)
    theirs, ours = message.split("the tokenizer's: ")[1].split("\n")[:2]
    assert repr(rendered.strip())[1:-1] in theirs  # both renderings are shown
    assert "What is shown here?" in ours and ours != theirs


def test_stock_templates_are_held_against_the_tokenizer(sentencepiece):
    check_template("internlm2_chat", make(sentencepiece, "internlm2"), "internlm2_chat")
    with pytest.raises(DPAError, match="'qwen_chat' is not the one"):
        check_template("qwen_chat", make(sentencepiece, "qwen2_5"), "qwen_chat")
    with pytest.raises(DPAError, match="They differ at token"):  # XTuner adds an EOS
        check_template(PROMPT_TEMPLATE["gemma"], make(sentencepiece, "gemma2"), "gemma")


def test_a_tokenizer_without_a_chat_template_passes(sentencepiece):
    tokenizer = sentencepiece("legacy")
    assert tokenizer.chat_template is None
    check_template("qwen_chat", tokenizer, "qwen_chat")
    tokenizer.chat_template = ""
    check_template("qwen_chat", tokenizer, "qwen_chat")


def test_a_template_that_no_family_has_names_none(sentencepiece):
    tokenizer = sentencepiece("legacy")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(DPAError) as caught:
        check_template(known_families()["vicuna"], tokenizer, "vicuna")
    assert "has it" not in str(caught.value)
    assert "tokenizer.chat_template=''" in str(caught.value)


def test_a_tokenizer_without_eos_fits_no_template_that_needs_one(sentencepiece):
    tokenizer = make(sentencepiece, "qwen2")
    tokenizer.eos_token = None
    with pytest.raises(DPAError, match="family='qwen2' has it"):
        check_template(known_families()["qwen2_5"], tokenizer, "qwen2_5")


def test_a_broken_chat_template_is_answered(sentencepiece):
    tokenizer = make(sentencepiece, "qwen2")
    tokenizer.chat_template = "{{ raise_exception('No chat today') }}"
    with pytest.raises(DPAError, match=r"can't render a question and its answer .No chat today."):
        check_template(known_families()["qwen2"], tokenizer, "qwen2")
