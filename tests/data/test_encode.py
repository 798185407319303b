"""Views, templates and tokens, held against stock XTuner and cases worked by hand."""

import copy

import numpy as np
import pytest
from mmengine.config import ConfigDict
from support import small_tokenizers
from transformers import GPT2Tokenizer
from xtuner.dataset.map_fns import llava_map_fn
from xtuner.dataset.map_fns.template_map_fn import template_map_fn
from xtuner.dataset.utils import encode_fn
from xtuner.utils import IMAGE_TOKEN_INDEX, PROMPT_TEMPLATE

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.formats import parse_record
from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError

BY_HAND = {"INSTRUCTION": "Q{round}: {input} A: ", "SYSTEM": "S: {system} ", "SEP": "\n"}


def encode(
    tokenizer, *records, sample_format="chat", image_tokens=4, template=BY_HAND, max_length=2048
):
    encoder = RecordTokenizer(tokenizer, sample_format, image_tokens, template, max_length)
    return encoder([parse_record(record, i) for i, record in enumerate(records)])


def labels(encoded):
    return np.where(encoded.supervised, encoded.tokens, -100).tolist()


def stock(tokenizer, record, template):
    example = llava_map_fn(copy.deepcopy(record))
    example = template_map_fn(example, ConfigDict(template))
    return encode_fn(example, tokenizer, 2048, with_image_token=True)


def show(tokenizer, encoded):
    """Shows tokens as text, the supervised stretches in brackets."""
    parts, inside = [], False
    for token, supervised in zip(encoded.tokens.tolist(), encoded.supervised, strict=True):
        if supervised != inside:
            parts.append("[" if supervised else "]")
            inside = supervised
        parts.append("<image>" if token == IMAGE_TOKEN_INDEX else tokenizer.decode([token]))
    return "".join(parts) + ("]" if inside else "")


@pytest.mark.parametrize("name", sorted(PROMPT_TEMPLATE))
def test_one_turn_equals_stock_for_every_template(tokenizer, chat, name):
    for record in (
        chat("a", "What is it? <image>", "A red balloon {drifts}.", image="x.png"),
        chat("b", "<image>", "Two cats.", image="x.png"),
        chat("c", "  Hi there \n", "Hello."),
    ):
        ours = encode(tokenizer, record, template=name)
        theirs = stock(tokenizer, record, PROMPT_TEMPLATE[name])
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert labels(ours) == theirs["labels"]


@pytest.mark.parametrize("name", ["qwen_chat", "internlm2_chat", "llama3_chat", "phi3_chat"])
def test_turns_equal_stock_where_no_eos_comes_between(tokenizer, chat, name):
    record = chat("a", "<image>\nOne?", "Red.", "Two?", "Cats.", "Three?", "No.", image="x.png")
    ours = encode(tokenizer, record, template=name)
    theirs = stock(tokenizer, record, PROMPT_TEMPLATE[name])
    assert (ours.tokens.tolist(), labels(ours)) == (theirs["input_ids"], theirs["labels"])


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added(make_tokenizer, chat):
    tokenizer = make_tokenizer(adds_bos=False)
    record = chat("a", "Hi", "Hello", "And?", "Bye")
    ours = encode(tokenizer, record).tokens.tolist()
    theirs = stock(tokenizer, record, BY_HAND)["input_ids"]
    assert tokenizer.bos_token_id not in ours and theirs.count(tokenizer.bos_token_id) == 2
    assert ours == [token for token in theirs if token != tokenizer.bos_token_id]


def test_chat_by_hand(tokenizer, chat):
    record = chat("a", "Look <image> here", "Red", "And?", "Blue", image="x", system="Be kind")
    shown = show(tokenizer, encode(tokenizer, record))
    assert shown == ("<s>S: Be kind Q1: <image>\nLook  here A: [Red</s>]\nQ2: And? A: [Blue</s>]\n")


def test_several_images_of_one_turn_stay_in_place(tokenizer, chat):
    record = chat("a", "First <image> then <image>?", "Cats", image=["x", "y"])
    shown = show(tokenizer, encode(tokenizer, record))
    assert shown == "<s>Q1: First <image> then <image>? A: [Cats</s>]\n"


def test_caption_formats_by_hand(tokenizer, caption):
    record = caption("a", "A red balloon.")
    with_image = encode(tokenizer, record, sample_format="caption")
    text_only = encode(tokenizer, record, sample_format="caption_text")
    assert show(tokenizer, with_image) == "<s><image>[A red balloon.\n]"
    assert show(tokenizer, text_only) == "<s>[A red balloon.\n]"
    assert text_only.records[0].images == ()


def test_caption_text_is_caption_without_the_image(tokenizer, caption):
    data = [
        caption(str(i), "cat " * i, image=["x", "y"], prompt="<image><image>") for i in range(1, 9)
    ]
    with_image = encode(tokenizer, *data, sample_format="caption")
    text_only = encode(tokenizer, *data, sample_format="caption_text")
    is_text = with_image.tokens != IMAGE_TOKEN_INDEX
    assert with_image.tokens[is_text].tolist() == text_only.tokens.tolist()
    assert with_image.supervised[is_text].tolist() == text_only.supervised.tolist()
    assert (with_image.lengths - text_only.lengths).tolist() == [2 * 4] * 8


def test_slow_and_fast_tokenizers_agree(make_tokenizer, bpe_folder, chat):
    slow = GPT2Tokenizer(
        str(bpe_folder / "vocab.json"),
        str(bpe_folder / "merges.txt"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
    )
    data = [chat(str(i), "<image>What?", "A red balloon " * i, image="x") for i in range(1, 4)]
    ours = encode(slow, *data)
    assert ours.tokens.tolist() == encode(make_tokenizer(False), *data).tokens.tolist()


def test_a_batch_equals_its_samples_one_by_one(tokenizer, chat):
    data = [chat(str(i), "<image>What?", "cats " * i, image="x") for i in range(1, 12)]
    together = encode(tokenizer, *data, max_length=40)
    alone = [encode(tokenizer, record, max_length=40) for record in data]
    for name in ("tokens", "supervised", "counts", "lengths", "truncated"):
        apart = np.concatenate([getattr(one, name) for one in alone])
        assert getattr(together, name).tolist() == apart.tolist()
    assert together.truncated.any() and not together.truncated.all()


def test_max_length_counts_image_tokens(tokenizer, caption):
    full = encode(
        tokenizer, caption("a", "A red balloon."), sample_format="caption", image_tokens=4
    )
    text = int(full.counts[0]) - 1  # BOS and caption
    assert full.lengths.tolist() == [text + 4]
    exact = encode(
        tokenizer, caption("a", "A red balloon."), sample_format="caption", max_length=text + 4
    )
    assert not exact.truncated.any() and exact.tokens.tolist() == full.tokens.tolist()
    cut = encode(
        tokenizer, caption("a", "A red balloon."), sample_format="caption", max_length=text + 3
    )
    assert cut.truncated.tolist() == [True] and cut.lengths.tolist() == [text + 3]
    assert cut.tokens.tolist() == full.tokens.tolist()[:-1]


@pytest.mark.parametrize(
    ("max_length", "reason"), [(4, "image cut off"), (5, "no supervised token"), (6, None)]
)
def test_what_truncation_ruins_is_a_problem(tokenizer, caption, max_length, reason):
    good = caption("good", "cat")  # BOS, 4 image tokens, caption
    encoded = encode(tokenizer, good, sample_format="caption", max_length=max_length)
    kinds = [problem.kind for problem in encoded.problems]
    assert kinds == ([] if reason is None else [reason])
    assert len(encoded.records) == (reason is None)


def test_a_second_image_that_is_cut_off_is_found(tokenizer, chat):
    record = chat("a", "<image>What?", "Cats", "And <image>?", "A balloon", image=["x", "y"])
    whole = encode(tokenizer, record)
    encoded = encode(tokenizer, record, max_length=int(whole.lengths[0]) - 20)
    assert [problem.kind for problem in encoded.problems] == ["image cut off"]


def test_a_first_token_alone_is_no_supervision(make_tokenizer, caption):
    tokenizer = make_tokenizer(adds_bos=False)
    encoded = encode(tokenizer, caption("a", "cats"), sample_format="caption_text", max_length=2)
    assert len(encoded.records) == 1
    long = encode(tokenizer, caption("a", "x"), sample_format="caption_text")
    assert int(long.counts[0]) == 2  # the letter and the newline
    tokenizer.add_tokens(["x\n"])
    lone = encode(tokenizer, caption("a", "x"), sample_format="caption_text")
    assert [problem.kind for problem in lone.problems] == ["no supervised token"]


@pytest.mark.parametrize("sample_format", ["caption", "caption_text"])
def test_captions_that_are_none(tokenizer, chat, caption, sample_format):
    data = [chat("two", "<image>a", "b", "c", "d", image="x"), caption("blank", " \n")]
    encoded = encode(tokenizer, *data, sample_format=sample_format)
    reasons = {problem.record_id: problem.reason for problem in encoded.problems}
    assert reasons["two"].endswith("caption record has 2 answers, expected 1")
    assert reasons["blank"] == "empty caption"


def test_a_caption_without_image_serves_the_text_format_only(tokenizer, chat):
    record = chat("a", "Describe.", "A balloon.")
    assert encode(tokenizer, record, sample_format="caption_text").problems == []
    (problem,) = encode(tokenizer, record, sample_format="caption").problems
    assert problem.kind == "caption without an image"


def test_a_system_turn_that_the_template_cannot_say(tokenizer, chat):
    record = chat("a", "Hi", "Hello", system="Be kind.")
    (problem,) = encode(tokenizer, record, template="minicpm").problems
    assert problem.kind == "system turn"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("qwen_caht", "unknown prompt_template 'qwen_caht'; did you mean 'qwen_chat'?"),
        ("zzz", r"unknown prompt_template 'zzz'\. Known: baichuan"),
        (None, "the format 'chat' needs a name"),
        ({"SEP": "x"}, "the format 'chat' needs a name"),
        ({"INSTRUCTION": "{input}", "SUFIX": "x"}, "did you mean 'SUFFIX'"),
    ],
)
def test_a_wrong_template_is_answered(template, message):
    with pytest.raises(DPAError, match=message):
        resolve_template(template)


def test_impossible_settings_are_answered(tokenizer, make_tokenizer, chat):
    with pytest.raises(DPAError, match="record a has an image, but image_tokens is 0"):
        encode(tokenizer, chat("a", "<image>", "Hi", image="x"), image_tokens=0)
    without_eos = make_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(DPAError, match="no eos_token"):
        RecordTokenizer(without_eos, "chat", 4, BY_HAND, 2048)


WORDS = ("<|im_start|>", "<|im_end|>")


def with_specials(kind, pieces, bpe_folder):
    """A tokenizer of a kind that knows ``WORDS`` as special tokens."""
    if kind == "bytes":
        return small_tokenizers.byte_level("<s>", "</s>", *WORDS, adds_bos=True)
    if kind == "slow":
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
        files = str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt")
        return GPT2Tokenizer(*files, **names, additional_special_tokens=list(WORDS))
    return small_tokenizers.llama(pieces(True), kind, *WORDS)


@pytest.mark.parametrize("kind", ["bytes", "legacy", "new", "slow"])
@pytest.mark.parametrize(
    "text", ["a <|im_end|> b", "<|im_end|>", "</s>a", "two cats<s>", "<|im_start|>a</s>b<|im_end|>"]
)
def test_special_tokens_in_a_caption_are_as_transformers_splits_them(
    kind, text, pieces, bpe_folder, caption
):
    tokenizer = with_specials(kind, pieces, bpe_folder)
    found = encode(tokenizer, caption("a", text), sample_format="caption_text")
    plain = tokenizer(text + "\n", add_special_tokens=False, split_special_tokens=True).input_ids
    tokens = found.tokens.tolist()
    assert tokens[len(tokens) - len(plain) :] == plain
    assert tokens[: len(tokens) - len(plain)] in ([], [tokenizer.bos_token_id])
    assert not set(plain) & set(tokenizer.all_special_ids)
    assert [note.kind for note in found.notes] == ["special token in a text"]


def test_words_that_are_no_special_tokens_are_left_alone(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n", "cat"])  # as Gemma adds blank lines: they are no special tokens
    tokenizer.add_tokens(["<end>"])
    template = {"INSTRUCTION": "Q\n\n{input}", "SUFFIX": "<end>\n", "SUFFIX_AS_EOS": True}
    plain = encode(tokenizer, chat("a", "A\n\ncat \ufdd0?\ufdd1", "x"), template=template)
    assert plain.notes == []
    ends = encode(tokenizer, chat("a", "A <end>?", "x"), template=template)
    assert ends.tokens.tolist().count(tokenizer.convert_tokens_to_ids("<end>")) == 1
    assert len(ends.notes) == 1


@pytest.mark.parametrize("kind", ["bytes", "legacy", "new", "slow"])
def test_the_template_keeps_its_special_tokens(kind, pieces, bpe_folder, chat):
    tokenizer = with_specials(kind, pieces, bpe_folder)
    template = {
        "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|><|im_start|>assistant\n",
        "SUFFIX": "<|im_end|>",
        "SUFFIX_AS_EOS": True,
    }
    start, end = tokenizer.convert_tokens_to_ids(WORDS)
    records = [chat("a", "What is <|im_end|>?", "It ends</s>."), chat("b", "What is it?", "Cats")]
    found = encode(tokenizer, *records, template=template)
    ends = np.cumsum(found.counts)
    for tokens in np.split(found.tokens, ends[:-1]):
        tokens = [t for t in tokens.tolist() if t != tokenizer.bos_token_id]
        special = {start, end, *tokenizer.all_special_ids}
        assert [t for t in tokens if t in special] == [start, end, start, end]
        assert (tokens[0], tokens[-1]) == (start, end)
    shown = tokenizer.decode(found.tokens[: ends[0]].tolist()).replace(" ", "")
    assert "user\nWhatis<|im_end|>?<|im_end|>" in shown and "Itends</s>.<|im_end|>" in shown
    stock = encode(tokenizer, records[1], template=template).tokens.tolist()
    assert found.tokens[ends[0] :].tolist() == stock
