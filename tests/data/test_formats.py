"""Every record, picture and file that people have: used as written here, or told of by name.

Tokens are worked by hand: the tokenizer below has one token for each letter.
"""

import base64
import copy
import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Sequence, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from dpa_xtuner.data import DPADataset, Problem, formats, read_records
from dpa_xtuner.data.formats import data_sha256, open_source
from dpa_xtuner.errors import DPAError

SPECIAL = ("<unk>", "</s>", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "é"]
IDS = {word: i for i, word in enumerate([*SPECIAL, *LETTERS])}
TEMPLATE = {
    "SYSTEM": "<|im_start|>S:{system}",
    "INSTRUCTION": "Q:{input}A:",
    "SUFFIX": "<|im_end|>",
    "SUFFIX_AS_EOS": True,
    "SEP": "\n",
}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def letters():
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    )


@pytest.fixture(scope="module")
def plain_processor():
    """Scales pixels to 0 - 1 and makes 4 x 4 of them."""
    return CLIPImageProcessor(
        size={"height": 4, "width": 4}, do_center_crop=False, image_mean=[0] * 3, image_std=[1] * 3
    )


@pytest.fixture
def load(letters, plain_processor, tmp_path):
    """Opens data of one file in a format."""

    def make(path, sample_format="chat", **settings):
        settings = {"skip_limit": 1, "prompt_template": TEMPLATE, "image_tokens": 1, **settings}
        return DPADataset(path, tmp_path, letters, plain_processor, sample_format, **settings)

    return make


def by_hand(text):
    """Tokens and labels of a text; [I] is a picture, [E] and [B] a turn's end and start, and what
    stands in ⟨⟩ is supervised."""
    named = {"[I]": -200, "[E]": IDS["<|im_end|>"], "[B]": IDS["<|im_start|>"]}
    tokens, labels, supervised = [], [], False
    while text:
        if text[0] in "⟨⟩":
            supervised, text = text[0] == "⟨", text[1:]
            continue
        piece = text[:3] if text[:3] in named else text[0]
        token = named.get(piece, IDS.get(piece, 0))
        tokens.append(token)
        labels.append(token if supervised else -100)
        text = text[len(piece) :]
    return tokens, labels


def assert_used(dataset, index, expected):
    sample = dataset.text(index)
    assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == by_hand(expected)


def colours(dataset, index):
    """The colour of each picture of a sample, 0 to 255; all are of one colour."""
    sample = dataset[index]
    assert not isinstance(sample, Problem), sample
    return [tuple(int(x) for x in (p[:, 2, 2] * 255).round()) for p in sample["pixel_values"]]


def llava(*texts, roles=("human", "gpt"), **more):
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **more}


def said(*texts, **more):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **more}


def turns_with(question, answer=()):
    """A question and an answer with more keys."""
    user, assistant = said("Hi", "Yes")["messages"]
    return {"messages": [{**user, **question}, {**assistant, **dict(answer)}]}


def block(kind, value=None):
    return {"type": kind} if value is None else {"type": kind, kind: value}


ONE = "Q:[I]\nWhat?A:⟨Red[E]⟩\n"
TALK = "Q:HiA:⟨Yes[E]⟩\n"
IMAGE = {"image": "red.png"}
PNG = base64.b64encode(b"x").decode()

# name: (record, its tokens), or (record, "!" and the kind of its problem)
RECORDS = {
    # LLaVA
    "llava": (llava("<image>\nWhat?", "Red", **IMAGE), ONE),
    "mark at the end": (llava("What?\n<image>", "Red", **IMAGE), ONE),
    "mark of XTuner": (llava("<ImageHere>What?", "Red", **IMAGE), ONE),
    "user, assistant": (llava("Hi", "Yes", roles=("user", "assistant")), TALK),
    "bot": (llava("Hi", "Yes", roles=("human", "bot")), TALK),
    "images": (llava("<image>\nWhat?", "Red", images=["red.png"]), ONE),
    "both keys": (llava("<image>\nWhat?", "Red", images=["red.png"], **IMAGE), ONE),
    "two pictures": (
        llava("A <image> B <image>", "No", image=["red.png", "blue.png"]),
        "Q:A [I] B [I]A:⟨No[E]⟩\n",
    ),
    "role and content": (
        {
            "conversations": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
            ]
        },
        TALK,
    ),
    "two turns": (llava("Hi", "Yes", "So", "No"), "Q:HiA:⟨Yes[E]⟩\nQ:SoA:⟨No[E]⟩\n"),
    "empty image": (llava("Hi", "Yes", image=""), TALK),
    "null image": (llava("Hi", "Yes", image=None), TALK),
    "no images": (llava("Hi", "Yes", images=[]), TALK),
    "null id": (llava("Hi", "Yes", id=None), TALK),
    "float id": (llava("Hi", "Yes", id=1.5), TALK),
    "web picture": (llava("<image>\nWhat?", "Red", image="https://x/y.png"), "!picture on the web"),
    "file picture": (llava("<image>\nWhat?", "Red", image="file://red%2Epng"), ONE),
    "images unmarked": (llava("What?", "Red", images=["red.png"]), "!wrong number of <image>"),
    "mark without image": (llava("<image>What?", "Red"), "!wrong number of <image>"),
    "different keys": (
        llava("<image>", "Red", images=["blue.png"], **IMAGE),
        "!two lists of pictures",
    ),
    "mark in the answer": (llava("What?", "<image>", **IMAGE), "!misplaced <image>"),
    "number as image": (llava("<image>", "Red", image=3), "!malformed image"),
    # system prompts
    "system turn": (
        {
            "conversations": [
                {"from": "system", "value": "Be"},
                *llava("Hi", "Yes")["conversations"],
            ]
        },
        "[B]S:Be" + TALK,
    ),
    "empty system turn": (
        {"conversations": [{"from": "system", "value": ""}, *llava("Hi", "Yes")["conversations"]]},
        TALK,
    ),
    "system key": (llava("Hi", "Yes", system="Be"), "[B]S:Be" + TALK),
    "system_prompt key": (llava("Hi", "Yes", system_prompt="Be"), "[B]S:Be" + TALK),
    "blank system key": (llava("Hi", "Yes", system=" "), TALK),
    "two systems": (llava("Hi", "Yes", system="Be", system_prompt="Do"), "!several system prompts"),
    "system of a wrong kind": (llava("Hi", "Yes", system=["Be"]), "!malformed system"),
    # other media and marks
    "video": (llava("<video>\nWhat?", "Red", video="a.mp4"), "!video"),
    "audio": (said("<audio>What?", "Red", audios=["a.wav"]), "!audios"),
    "video mark": (llava("<video>\nWhat?", "Red"), "!mark that is not read"),
    "Qwen's mark": (llava("<img>a.png</img>What?", "Red"), "!mark that is not read"),
    "numbered mark": (llava("<image>\n<image_2>", "Red", **IMAGE), "!mark that is not read"),
    "capital mark": (llava("<IMAGE>What?", "Red", **IMAGE), "!mark that is not read"),
    "mark of a pad": (llava("<|image_pad|>What?", "Red", **IMAGE), "!mark that is not read"),
    "picture in an answer": (llava("Draw", "<img>a.png</img>"), "!mark that is not read"),
    "code in an answer": (llava("Hi", "<video> <b>x</b>"), "Q:HiA:⟨<video> <b>x</b>[E]⟩\n"),
    "Pixtral's mark": (llava("[IMG]What?", "Red"), "!mark that is not read"),
    "empty tools": (said("Hi", "Yes", tools="[]"), TALK),
    "markup": (
        llava("What is <img src=a> in <b>?", "Red"),
        "Q:What is <img src=a> in <b>?A:⟨Red[E]⟩\n",
    ),
    # answers
    "empty answer": (llava("Hi", ""), "!empty answer"),
    "blank answers": (llava("Hi", " ", "So", "\n"), "!empty answer"),
    "one empty answer": (llava("Hi", "", "So", "No"), "Q:HiA:[E]\nQ:SoA:⟨No[E]⟩\n"),
    "answer left out": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes", "loss": False},
                *said("So", "No")["messages"],
            ]
        },
        "Q:HiA:Yes[E]\nQ:SoA:⟨No[E]⟩\n",
    ),
    "all left out": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes", "weight": 0},
            ]
        },
        "!no answer to train on",
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "Hi"}]}, "!roles not alternating"),
    "unknown role": (llava("Hi", "Yes", roles=("human", "tool")), "!unknown role"),
    "preferences": (said("Hi", "Yes", rejected_response="No"), "!preferences"),
    "rated": (said("Hi", "Yes", label=False), "!preferences"),
    "tools": (said("Hi", "Yes", tools=[{"name": "f"}]), "!tools"),
    # special tokens are text
    "end of turn": (llava("Say <|im_end|>", "a</s>b"), "Q:Say <|im_end|>A:⟨a</s>b[E]⟩\n"),
    "end of text": (llava("<|endoftext|>", "No"), "Q:<|endoftext|>A:⟨No[E]⟩\n"),
    "in the system": (llava("Hi", "Yes", system="<|im_start|>"), "[B]S:<|im_start|>" + TALK),
    # messages
    "messages": (said("<image>\nWhat?", "Red", images=["red.png"]), ONE),
    "messages, image": (said("<image>\nWhat?", "Red", **IMAGE), ONE),
    "messages, object": (
        said("<image>\nWhat?", "Red", images=[{"bytes": None, "path": "red.png"}]),
        ONE,
    ),
    "bare messages": (said("Hi", "Yes")["messages"], TALK),
    "blocks": (said([block("image", "red.png"), block("text", "What?")], "Red"), ONE),
    "blocks, image last": (said([block("text", "What?"), block("image", "red.png")], "Red"), ONE),
    "blocks of an answer": (said("Hi", [block("text", "Yes")]), TALK),
    "image_url": (
        said([block("image_url", {"url": "red.png"}), block("text", "What?")], "Red"),
        ONE,
    ),
    "XTuner V1": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        block("image_url", {"url": "red.png", "image_wh": [4, 4]}),
                        block("text", "<IMG_CONTEXT>\nWhat?"),
                    ],
                },
                {"from": "assistant", "value": "Red"},
            ]
        },
        ONE,
    ),
    "blocks that stand for images": (
        said([block("image"), block("text", "What?")], "Red", images=["red.png"]),
        ONE,
    ),
    "blocks without pictures": (
        said([block("image"), block("text", "?")], "Red"),
        "!malformed image",
    ),
    "block of a video": (said([block("video", "a.mp4")], "Red"), "!block that is not read"),
    "messages unmarked": (said("What?", "Red", images=["red.png"]), "!wrong number of <image>"),
    "broken base64": (
        said(
            [block("image_url", {"url": "data:image/png;base64,&"}), block("text", "What?")], "Red"
        ),
        "broken picture",
    ),
    "base64 of no picture": (
        said(
            [block("image_url", {"url": f"data:image/png;base64,{PNG}"}), block("text", "What?")],
            "Red",
        ),
        "broken picture",
    ),
    # pairs, texts, captions
    "pair": ({"query": "<image>\nWhat?", "response": "Red", "images": ["red.png"]}, ONE),
    "pair unmarked": ({"query": "What?", "response": "Red", "images": ["red.png"]}, ONE),
    "pair of texts": ({"query": "Hi", "response": "Yes", "system": "Be"}, "[B]S:Be" + TALK),
    "pair with history": (
        {"query": "So", "response": "No", "history": [["Hi", "Yes"]]},
        "Q:HiA:⟨Yes[E]⟩\nQ:SoA:⟨No[E]⟩\n",
    ),
    "texts": ({"images": ["red.png"], "texts": [{"user": "What?", "assistant": "Red"}]}, ONE),
    "caption": ({"image": "red.png", "caption": "Red"}, "Q:[I]A:⟨Red[E]⟩\n"),
    "question with text": (
        {"image": "red.png", "text": "What?", "question_id": 3},
        "!unknown format",
    ),
    "answers without turns": (
        {"image": "red.png", "question": "What?", "answer": "Red"},
        "!unknown format",
    ),
    # what would be lost without a word
    "picture of a message": (
        {
            "messages": [
                {"role": "user", "content": "What?", "images": ["red.png"]},
                {"role": "assistant", "content": "Red"},
            ]
        },
        "!picture that is not read",
    ),
    "picture of a turn": (turns_with({"image": "red.png"}), "!picture that is not read"),
    "video of a turn": (turns_with({"video": "a.mp4"}), "!other medium in a message"),
    "picture under another key": (
        llava("What?", "Red", image_path="red.png"),
        "!picture that is not read",
    ),
    "picture's address": (
        said("What?", "Red", image_url="https://x/y?z=1"),
        "!picture that is not read",
    ),
    "picture of any name": (
        {"query": "What?", "response": "Red", "figure": ["d/1.JPG"]},
        "!picture that is not read",
    ),
    "numbered pictures": (
        llava("<image>\nWhat?", "Red", **IMAGE, image_2="blue.png"),
        "!picture that is not read",
    ),
    "picture's source": (llava("<image>\nWhat?", "Red", **IMAGE, file_name="y.jpg"), ONE),
    "reasoning": (turns_with({}, {"reasoning_content": "Hm"}), "!reasoning"),
    "no reasoning": (turns_with({"name": "x"}, {"reasoning_content": None}), TALK),
    "call of a tool": (turns_with({}, {"tool_calls": [{"id": 1}]}), "!tools"),
    "train": (turns_with({}, {"train": False}), "!no answer to train on"),
    "loss of 1": (turns_with({}, {"loss": True, "weight": 1.0}), TALK),
    "half a weight": (turns_with({}, {"weight": 0.5}), "!malformed weight"),
    "loss as text": (turns_with({}, {"loss": "false"}), "!malformed loss"),
    "two conversations": ({**llava("Hi", "Yes"), **said("Hi", "Yes")}, "!two conversations"),
    "empty one beside it": ({**said("Hi", "Yes"), "conversations": None}, TALK),
    "boxes in an answer": (
        said("<image>Find", "<bbox>", images=["red.png"], objects={"bbox": [[1, 2]]}),
        "!mark that is not read",
    ),
    "Gemma's mark": (llava("<start_of_image>What?", "Red"), "!mark that is not read"),
    "Gemma's token": (llava("<image_soft_token>What?", "Red"), "!mark that is not read"),
    "Idefics' mark": (llava("<fake_token_around_image>?", "Red"), "!mark that is not read"),
    "VILA's mark": (llava("<vila/video>What?", "Red"), "!mark that is not read"),
    "Kimi's mark": (llava("<|media_pad|>What?", "Red"), "!mark that is not read"),
    "LLaVA's first mark": (llava("<im_patch>What?", "Red"), "!mark that is not read"),
    "MiniGPT's mark": (llava("<Img><ImageHere></Img>?", "Red", **IMAGE), "!mark that is not read"),
    "MiniCPM's pictures": (
        said("<image_00>What?", "Red", image={"<image_00>": "red.png"}),
        "!malformed image",
    ),
    "blocks in another order": (
        said(
            [{"type": "image", "index": 1}, {"type": "image", "index": 0}, block("text", "?")],
            "Red",
            images=["red.png", "blue.png"],
        ),
        "!pictures out of order",
    ),
    "numbered blocks": (
        said(
            [{"type": "image", "index": 0}, {"type": "text", "text": "What?", "index": None}],
            "Red",
            [{"type": "image", "index": 1}, block("text", "So?")],
            "No",
            images=["red.png", "blue.png"],
        ),
        ONE + "Q:[I]\nSo?A:⟨No[E]⟩\n",
    ),
    "Anthropic's block": (
        said([{"type": "image", "source": {"type": "base64"}}, block("text", "?")], "Red"),
        "!malformed image",
    ),
    "history of no list": ({"query": "Hi", "response": "Yes", "history": 3}, "!malformed turn"),
    "caption without a picture": ({"image": "", "caption": "Red"}, "!caption without an image"),
    "list of captions": ({"image": "red.png", "caption": ["Red"]}, "!malformed caption"),
    "bucket": (llava("<image>", "Red", image="oss:s3://b/y.png"), "!picture on the web"),
    "system in the middle": (
        {"messages": [*said("Hi", "Yes")["messages"], {"role": "system", "content": "Be"}]},
        "!roles not alternating",
    ),
    "answer first": (llava("Yes", "Hi", roles=("gpt", "human")), "!roles not alternating"),
    "two questions": (llava("Hi", "So", roles=("human", "human")), "!roles not alternating"),
    "number as content": (said(3, "Yes"), "!malformed message"),
    "no conversation": ({"conversations": []}, "!no conversations"),
    "text as conversation": ({"conversations": "Hi"}, "!no conversations"),
    "packed records": ([llava("Hi", "Yes"), llava("Hi", "Yes")], "!not a record"),
    # found in other projects' files
    "InternVL's answers under 'text'": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "text": "Yes"}]},
        "!malformed message",
    ),
    "answer of null": (
        turns_with({}, {"content": None}),
        "!empty answer",
    ),
    "text blocks under 'value'": (
        said([{"type": "text", "value": "Hi"}], "Yes"),
        "!malformed block",
    ),
    "a block of two": (
        said([{"type": "text", "text": "What?", "image": "red.png"}], "Red"),
        "!malformed block",
    ),
    "blocks as a JSON text": (
        said('[{"type": "text", "text": "Hi"}]', "Yes"),
        "!malformed message",
    ),
    "Ferret's mark of a place": (
        llava("<image>\nWhat is <bbox_location0>?", "Red", box_x1y1x2y2=[[[1, 2, 3, 4]]], **IMAGE),
        "!mark that is not read",
    ),
    "mark of a part of a picture": (
        llava("<image>\nWhat is <region>?", "Red", **IMAGE),
        "!mark that is not read",
    ),
    "such a word in a text": (llava("<mask>", "Yes"), "Q:<mask>A:⟨Yes[E]⟩\n"),
    "Data-Juicer's mark": (
        {"images": ["red.png"], "text": "<__dj__image> Red"},
        "!mark that is not read",
    ),
    "mark of a pad in a caption": (
        {"image": "red.png", "caption": "<|image_pad|>Red"},
        "!mark that is not read",
    ),
    "two pictures of a caption": (
        {"image": "red.png", "image_2": "blue.png", "caption": "Other"},
        "!picture that is not read",
    ),
    "text with an answer": (
        {"image": "red.png", "text": "What?", "gpt4_answer": "Red"},
        "!unknown format",
    ),
    "question to train on": (turns_with({"train": True}), "!question to train on"),
    "question left out": (turns_with({"train": False}, {"train": True}), TALK),
    "instruction beside a query": (
        {"instruction": "Be brief", "query": "Hi", "response": "Yes"},
        "!text that is not read",
    ),
    "rejected conversation": (llava("Hi", "Yes", conversations_rejected=[]), "!preferences"),
    "OpenAI's two questions": (
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "user", "content": [block("image_url", {"url": "red.png"})]},
                {"role": "assistant", "content": "Red"},
            ]
        },
        "!roles not alternating",
    ),
    "system of null": (
        {"messages": [{"role": "system", "content": None}, *said("Hi", "Yes")["messages"]]},
        TALK,
    ),
    "system_message key": (llava("Hi", "Yes", system_message="Be"), "[B]S:Be" + TALK),
    "history beside messages": (said("Hi", "Yes", history=[["a", "b"]]), "!two conversations"),
    "two keys of a caption": (
        {"image": "red.png", "images": ["blue.png"], "caption": "Red"},
        "!two lists of pictures",
    ),
    "a picture as text": (
        llava(f"data:image/png;base64,{'A' * 99} What?", "Red"),
        "!mark that is not read",
    ),
    "pandas' nan": (llava("Hi", "Yes", image=float("nan")), "!malformed image"),
    # no records
    "a number": (5, "!not a record"),
    "an empty list": ([], "!not a record"),
    "half a letter": (llava("Hi", "\ud83d"), "!malformed text"),
}


def test_each_record_is_used_as_expected_or_told_of_by_name(load, tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "red.png")
    Image.new("RGB", (4, 4), BLUE).save(tmp_path / "blue.png")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record, _ in RECORDS.values()))
    dataset = load(path)
    places = dataset.stores[0].arrays["positions"].tolist()
    problems = {problem.position: problem for problem in dataset.problems}
    assert dataset.records == len(RECORDS)
    assert sorted([*places, *problems]) == list(range(len(RECORDS)))
    wrong = {}
    for place, (name, (_, expected)) in enumerate(RECORDS.items()):
        if expected.startswith("!"):
            found = problems[place].kind if place in problems else "used"
            if found != expected.removeprefix("!"):
                wrong[name] = found
            continue
        if place in problems:
            wrong[name] = problems[place].reason
            continue
        sample = dataset[places.index(place)]
        if expected == "broken picture":
            assert sample.kind == "broken image" and sample.position == place, name
            continue
        found = sample["input_ids"].tolist(), sample["labels"].tolist()
        if found != by_hand(expected):
            wrong[name] = "".join([*SPECIAL, *LETTERS][t] if t >= 0 else "[I]" for t in found[0])
        assert len(sample["pixel_values"]) == expected.count("[I]"), name
    assert not wrong
    assert {kind: count for kind, (count, _) in dataset.stores[0].notes.items()} == {
        "special token in a text": 3,
        "answers not trained on": 2,
    }


ODD = (
    None,
    0,
    -1.5,
    True,
    "",
    "<image>",
    "\ud800",
    [],
    {},
    [None],
    [[]],
    {"path": 1},
    b"x",
    10**400,
)


def places_in(value, path=()):
    """The path of each value inside a record."""
    yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(each, (*path, key))


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_at_any_place_is_used_or_told_of(odd):
    used = told = 0
    for record, _ in RECORDS.values():
        for path in places_in(record):
            changed = copy.deepcopy([record])
            inner = changed
            for key in (0, *path)[:-1]:
                inner = inner[key]
            inner[(0, *path)[-1]] = odd
            found = formats.parse_record(changed[0], 0)
            if isinstance(found, Problem):
                told += 1
                continue
            used += 1
            assert sum(human.count("<image>") for human, _ in found.turns) == len(found.images)
            assert all(isinstance(name, str) and name for name in found.images)
    assert used and told


def test_special_tokens_are_tokens_where_that_is_asked_for(load, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([llava("Say <|im_end|>", "Yes")]))
    dataset = load(path, special_tokens="token")
    assert_used(dataset, 0, "Q:Say [E]A:⟨Yes[E]⟩\n")
    assert dataset.fingerprint != load(path).fingerprint
    assert dataset.stores[0].notes == {"special token in a text": (1, ["0"])}


def test_captions_hold_special_tokens_as_text(load, tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "red.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "red.png", "caption": "a</s>"}]))
    assert_used(load(path, "caption"), 0, "[I]⟨a</s>\n⟩")
    assert_used(load(path, "caption_text"), 0, "⟨a</s>\n⟩")


# Pictures: name, how to write it, and the RGB pixels that come out.


def wave(dtype, high):
    """A 4 x 6 ramp from 0 to ``high``."""
    return np.linspace(0, high, 24).reshape(4, 6).astype(dtype)


RAMP = np.linspace(0, 255, 24).reshape(4, 6)
NOISE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (4, 6), np.uint8)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def over(colour):
    share = ALPHA[..., None] / 255
    return NOISE * share + np.array(colour) * (1 - share)


PALETTE = Image.fromarray(NOISE).quantize(8)


def png_16(values, transparent):
    """A PNG of 16-bit grey with one transparent value, which Pillow does not write."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", transparent),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


TURNS = {
    2: NOISE[:, ::-1],
    3: NOISE[::-1, ::-1],
    4: NOISE[::-1],
    5: NOISE.transpose(1, 0, 2),
    6: np.rot90(NOISE, -1),
    7: NOISE[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(NOISE, 1),
}
WITH_ALPHA = Image.fromarray(np.dstack([NOISE, ALPHA]))
GREY_ALPHA = Image.merge("LA", [Image.fromarray(NOISE[..., 0]), Image.fromarray(ALPHA)])
PICTURES = {
    "RGB": ("a.png", Image.fromarray(NOISE), {}, NOISE),
    "grey": ("a.png", Image.fromarray(NOISE[..., 0]), {}, np.dstack([NOISE[..., :1]] * 3)),
    "16-bit PNG": ("a.png", Image.fromarray(wave(np.uint16, 65535)), {}, RAMP),
    "16-bit PNG, dark": ("a.png", Image.fromarray(wave(np.uint16, 32767)), {}, RAMP / 2),
    "16-bit TIFF": ("a.tif", Image.fromarray(wave(np.uint16, 65535)), {}, RAMP),
    "16-bit TIFF from white to black": (
        "a.tif",
        Image.fromarray(wave(np.uint16, 65535)),
        {"tiffinfo": {262: 0}},
        255 - RAMP,
    ),
    "16-bit PNG with a transparent value": (
        "a.png",
        png_16(wave(np.uint16, 65535), 0),
        {},
        np.where(RAMP == 0, 255, RAMP),
    ),
    "16-bit PGM": ("a.pgm", Image.fromarray(wave(np.uint16, 65535)), {}, RAMP),
    "32-bit integers": ("a.tif", Image.fromarray(wave(np.int32, 1_000_000)), {}, RAMP),
    "floats to 1": ("a.tif", Image.fromarray(wave(np.float32, 1)), {}, RAMP),
    "large floats": ("a.tif", Image.fromarray(wave(np.float32, 9e9) - 5e9), {}, RAMP),
    "equal floats": ("a.tif", Image.fromarray(np.full((4, 6), 7, np.float32)), {}, RAMP * 0 + 7),
    "not finite": ("a.tif", Image.fromarray(wave(np.float32, np.nan)), {}, "broken image"),
    "a program": ("a.eps", Image.new("RGB", (4, 6)), {}, "EPS is a program"),
    "alpha": ("a.png", WITH_ALPHA, {}, over((255, 255, 255))),
    "grey with alpha": (
        "a.png",
        GREY_ALPHA,
        {},
        NOISE[..., :1] * (ALPHA[..., None] / 255) + 255 * (1 - ALPHA[..., None] / 255),
    ),
    "alpha in WebP": ("a.webp", WITH_ALPHA, {"lossless": True, "exact": True}, over((255,) * 3)),
    "transparent colour": (
        "a.png",
        Image.fromarray(NOISE),
        {"transparency": tuple(map(int, NOISE[1, 2]))},
        np.where((NOISE[1, 2] == NOISE).all(-1)[..., None], 255, NOISE),
    ),
    "transparent palette": (
        "a.png",
        PALETTE,
        {"transparency": 3},
        np.where((np.asarray(PALETTE) == 3)[..., None], 255, np.asarray(PALETTE.convert("RGB"))),
    ),
    "palette": ("a.png", PALETTE, {}, np.asarray(PALETTE.convert("RGB"))),
    "CMYK": ("a.tif", Image.fromarray(NOISE).convert("CMYK"), {}, NOISE),
    "black and white": (
        "a.png",
        Image.fromarray(NOISE[..., 0] > 99),
        {},
        255 * (NOISE[..., :1] > 99),
    ),
    "frames": (
        "a.gif",
        Image.new("RGB", (6, 4), RED),
        {"save_all": True, "append_images": [Image.new("RGB", (6, 4), BLUE)]},
        np.full((4, 6, 3), RED),
    ),
    **{
        f"turned {i}": ("a.png", Image.fromarray(NOISE), {"exif": turned(i)}, pixels)
        for i, pixels in TURNS.items()
    },
    "turned TIFF": ("a.tif", Image.fromarray(NOISE), {"exif": turned(6)}, TURNS[6]),
}


def written(folder, name, picture, options):
    if isinstance(picture, bytes):
        (folder / name).write_bytes(picture)
    else:
        picture.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_comes_out_as_it_looks(name, tmp_path, monkeypatch):
    from dpa_xtuner import pages
    from dpa_xtuner.data.images import ImageProblem, load_image, read_size

    file, picture, options, expected = PICTURES[name]
    path = written(tmp_path, file, picture, options)
    if isinstance(expected, str):
        with pytest.raises(ImageProblem, match=expected):
            load_image(path, True)
        assert pages.embedded(str(path)) == ""
        return
    expected = np.broadcast_to(
        np.asarray(expected if np.ndim(expected) == 3 else np.asarray(expected)[..., None]),
        (*np.shape(expected)[:2], 3),
    )
    found = load_image(path, True)
    assert found.mode == "RGB" and read_size(path) == found.size
    np.testing.assert_allclose(np.asarray(found).astype(float), expected, atol=1)


def test_the_colour_behind_a_picture_is_a_setting(load, tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": "None"}]))
    assert colours(load(path, "caption"), 0) == [(255, 255, 255)]
    assert colours(load(path, "caption", background="#00ff00"), 0) == [GREEN]


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (2, 3), (3, 4), (4, 3)])
@pytest.mark.parametrize("square", [True, False])
def test_the_channels_of_a_tiny_picture_are_not_guessed(size, square, tmp_path, plain_processor):
    from dpa_xtuner.data.images import load_pixels

    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    (pixels,) = load_pixels(tmp_path / "a.png", plain_processor, square)
    assert pixels.shape == (3, 4, 4)
    assert pixels[:, 2, 2].tolist() == pytest.approx([1, 0, 0]) or size != (1, 1)
    if not square:
        assert pixels.amin((1, 2)).tolist() == pytest.approx([1, 0, 0])


# Files: each is written by a function, and holds these samples, or is refused with a message.


def picture_bytes(colour):
    content = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, "PNG")
    return content.getvalue()


def text_file(name, *records, lines=True):
    def write(folder):
        for colour, file in ((RED, "red.png"), (BLUE, "blue.png")):
            Image.new("RGB", (4, 4), colour).save(folder / file)
        content = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
        content = content.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        return folder / name

    return write


def table_file(name, content):
    def write(folder):
        text_file("unused")(folder)
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return write


def rows(**columns):
    """Parquet with row groups of two, and a picture as Hugging Face keeps it."""

    def write(folder):
        pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=2)
        return folder / "a.parquet"

    return write


def picture(colour, path=None):
    return {"bytes": None if colour is None else picture_bytes(colour), "path": path}


CAULDRON = dict(
    images=[[picture(RED)], [picture(BLUE), picture(GREEN)], []],
    texts=[
        [{"user": "What?", "assistant": "Red", "source": "x"}],
        [{"user": "Both?", "assistant": "Yes", "source": "x"}],
        [{"user": "Hi", "assistant": "Yes", "source": "x"}],
    ],
)
TWO = "Q:[I]\n[I]\nBoth?A:⟨Yes[E]⟩\n"


def saved_to_disk(folder):
    features = Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "conversations": [{"from": Value("string"), "value": Value("string")}],
        }
    )
    data = Dataset.from_dict(
        {
            "id": ["a", "b"],
            "image": [picture(RED), None],
            "conversations": [
                llava("<image>\nWhat?", "Red")["conversations"],
                llava("Hi", "Yes")["conversations"],
            ],
        },
        features=features,
    )
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(folder / "saved")
    return folder / "saved"


def hub_folder(folder):
    data = folder / "hub" / "data"
    data.mkdir(parents=True)
    features = Features(
        {
            "images": Sequence(ImageFeature()),
            "texts": Sequence({"user": Value("string"), "assistant": Value("string")}),
        }
    )
    for i, colour in enumerate((RED, BLUE)):
        part = Dataset.from_dict(
            {"images": [[picture(colour)]], "texts": [{"user": ["What?"], "assistant": ["Red"]}]},
            features=features,
        )
        part.to_parquet(data / f"train-0000{i}-of-00002.parquet")
        part.to_parquet(data / f"validation-0000{i}-of-00002.parquet")
    return folder / "hub"


def tar_file(*members, name="a.tar"):
    def write(folder):
        with tarfile.open(folder / name, "w") as tar:
            for file, content in members:
                info = tarfile.TarInfo(file)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return folder / name

    return write


def zipped(write):
    def zip_it(folder):
        path = write(folder)
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        return path.with_suffix(".tar.gz")

    return zip_it


def next_list(strategy, **more):
    def write(folder):
        (folder / "lists").mkdir()
        text_file("a.json", *(llava("Hi", str(i)) for i in range(10)), lines=False)(folder)
        entry = {"json_path": "a.json", "sampling_strategy": strategy, **more}
        lines = [f"    {key}: {value}" for key, value in entry.items()]
        (folder / "list.yaml").write_text("datasets:\n  -" + "\n".join(lines)[3:] + "\n")
        return folder / "list.yaml"

    return write


def meta_list(times, **more):
    def write(folder):
        (folder / "pictures").mkdir()
        Image.new("RGB", (4, 4), GREEN).save(folder / "pictures" / "a.png")
        record = llava("<image>\nWhat?", "Red", image="a.png")
        (folder / "a.jsonl").write_text("\n".join([json.dumps(record)] * 4))
        entry = {
            "root": "pictures",
            "annotation": "a.jsonl",
            "repeat_time": times,
            "length": 4,
            **more,
        }
        (folder / "meta.json").write_text(json.dumps({"x": entry}, indent=2))
        return folder / "meta.json"

    return write


def numbers(*found):
    return [(f"Q:HiA:⟨{i}[E]⟩\n", []) for i in found]


CAPTION = [("Q:[I]A:⟨Red[E]⟩\n", [RED])]
FILES = {
    "JSON": (
        text_file("a.json", llava("<image>\nWhat?", "Red", **IMAGE), lines=False),
        "JSON array",
        [(ONE, [RED])],
    ),
    "JSON lines": (
        text_file("a.json", llava("Hi", "Yes"), said("Hi", "Yes")),
        "JSON lines",
        [(TALK, []), (TALK, [])],
    ),
    "lists of messages": (
        text_file("a.jsonl", said("Hi", "Yes")["messages"]),
        "JSON lines",
        [(TALK, [])],
    ),
    "gzip": (text_file("a.json.gz", llava("Hi", "Yes")), "JSON lines", [(TALK, [])]),
    "base64": (
        text_file(
            "a.jsonl",
            said(
                [
                    block(
                        "image_url",
                        {
                            "url": "data:image/png;base64,"
                            + base64.b64encode(picture_bytes(GREEN)).decode()
                        },
                    ),
                    block("text", "What?"),
                ],
                "Red",
            ),
        ),
        "JSON lines",
        [(ONE, [GREEN])],
    ),
    "CSV": (
        table_file("a.csv", 'file_name,text\nred.png,Red\nblue.png,"a, ""b"""\n'),
        "CSV",
        [*CAPTION, ('Q:[I]A:⟨a, "b"[E]⟩\n', [BLUE])],
    ),
    "TSV": (table_file("a.tsv", "image\tcaption\tx\nred.png\tRed\t1\n"), "TSV", CAPTION),
    "captions in lines": (
        text_file("a.jsonl", {"file_name": "red.png", "text": "Red"}),
        "JSON lines",
        CAPTION,
    ),
    "The Cauldron": (rows(**CAULDRON), "Parquet", [(ONE, [RED]), (TWO, [BLUE, GREEN]), (TALK, [])]),
    "bytes alone": (
        rows(
            image=[picture_bytes(RED), None],
            conversations=[
                llava("<image>\nWhat?", "Red")["conversations"],
                llava("Hi", "Yes")["conversations"],
            ],
        ),
        "Parquet",
        [(ONE, [RED]), (TALK, [])],
    ),
    "paths in Parquet": (rows(image=["red.png"], caption=["Red"]), "Parquet", CAPTION),
    "paths beside no bytes": (
        rows(image=[picture(None, "red.png")], caption=["Red"]),
        "Parquet",
        CAPTION,
    ),
    "messages in Parquet": (
        rows(
            images=[[picture(RED)]],
            messages=[
                said(
                    [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
                    [{"type": "text", "text": "Red"}],
                )["messages"]
            ],
        ),
        "Parquet",
        [(ONE, [RED])],
    ),
    "save_to_disk": (saved_to_disk, "Arrow", [(ONE, [RED]), (TALK, [])]),
    "hub folder": (hub_folder, "Parquet", [(ONE, [RED]), (ONE, [BLUE])]),
    "tar of captions": (
        tar_file(
            ("0.png", picture_bytes(RED)),
            ("0.txt", b"Red"),
            ("0.json", b'{"width": 4}'),
            ("d/1.png", picture_bytes(BLUE)),
            ("d/1.txt", b"No"),
        ),
        "WebDataset tar",
        [*CAPTION, ("Q:[I]A:⟨No[E]⟩\n", [BLUE])],
    ),
    "tar of conversations": (
        tar_file(
            ("0.json", json.dumps(llava("<image>\nWhat?", "Red", image="0.jpg")).encode()),
            ("0.png", picture_bytes(GREEN)),
        ),
        "WebDataset tar",
        [(ONE, [GREEN])],
    ),
    "list, all": (next_list("all"), "LLaVA-NeXT list", numbers(*range(10))),
    "list, first": (next_list("first:2"), "LLaVA-NeXT list", numbers(0, 1)),
    "list, end": (next_list("end:15%"), "LLaVA-NeXT list", numbers(8, 9)),
    "meta": (meta_list(1), "InternVL meta", [(ONE, [GREEN])] * 4),
    "meta, half": (meta_list(0.5), "InternVL meta", [(ONE, [GREEN])] * 2),
    "meta, twice": (meta_list(2), "InternVL meta", [(ONE, [GREEN])] * 8),
}


def other(name, *content):
    def write(folder):
        path = folder / name
        path.write_bytes(b"".join(content))
        return path

    return write


def linked_folder(folder):
    rows(**CAULDRON)(folder)
    (folder / "all").mkdir()
    (folder / "all" / "part").symlink_to(hub_folder(folder))
    (folder / "all" / "above").symlink_to(folder / "all")
    return folder / "all"


def mapped(folder):
    """Two saved data sets, one with the cached result of a map."""
    for name in ("a", "b"):
        data = Dataset.from_dict({"conversations": [llava("Hi", "Yes")["conversations"]]})
        data.save_to_disk(folder / "saved" / name)
    load_from_disk(folder / "saved" / "a").map(lambda row: row)
    assert list((folder / "saved" / "a").glob("cache-*.arrow"))
    return folder / "saved"


FILES |= {
    "BOM": (
        other("a.json", b"\xef\xbb\xbf", json.dumps([llava("Hi", "Yes")]).encode()),
        "JSON array",
        [(TALK, [])],
    ),
    "CRLF": (
        other("a.jsonl", *[json.dumps(llava("Hi", "Yes")).encode() + b"\r\n\r\n"] * 2),
        "JSON lines",
        [(TALK, [])] * 2,
    ),
    "two gzips in one": (
        other("a.gz", *[gzip.compress(json.dumps(llava("Hi", "Yes")).encode() + b"\n")] * 2),
        "JSON lines",
        [(TALK, [])] * 2,
    ),
    "dictionary columns": (
        rows(
            image=pa.array(["red.png"]).dictionary_encode(),
            caption=pa.array(["Red"], pa.large_string()),
        ),
        "Parquet",
        CAPTION,
    ),
    "an empty list of videos": (
        rows(image=[picture(RED)], videos=pa.array([[]], pa.list_(pa.binary())), caption=["Red"]),
        "Parquet",
        CAPTION,
    ),
    "linked folders": (linked_folder, "Parquet", [(ONE, [RED]), (ONE, [BLUE])]),
    "results of a map": (mapped, "Arrow", [(TALK, [])] * 2),
    "tar with odd names": (
        tar_file(
            ("README", b"x"),
            ("./a.b/\u00fc 0.PNG", picture_bytes(RED)),
            ("./a.b/\u00fc 0.meta.json", b"[]"),
            ("./a.b/._0.png", b"x"),
            ("./a.b/\u00fc 0.TXT", b"Red"),
        ),
        "WebDataset tar",
        CAPTION,
    ),
    "tar of many pictures": (
        tar_file(
            *[(f"0.{i}.png", picture_bytes(c)) for i, c in ((10, GREEN), (9, BLUE), (1, RED))],
            ("0.json", json.dumps(llava("A<image><image><image>", "Yes")).encode()),
        ),
        "WebDataset tar",
        [("Q:A[I][I][I]A:⟨Yes[E]⟩\n", [RED, BLUE, GREEN])],
    ),
    "tar that orders its pictures": (
        tar_file(
            *[(f"0.{i}.png", picture_bytes(c)) for i, c in ((1, RED), (2, BLUE))],
            (
                "0.json",
                json.dumps(
                    llava("A<image><image>", "Yes", image=["x/0.2.png", "0.1.png"])
                ).encode(),
            ),
        ),
        "WebDataset tar",
        [("Q:A[I][I]A:⟨Yes[E]⟩\n", [BLUE, RED])],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_and_read(name, load, tmp_path):
    write, kind, expected = FILES[name]
    path = write(tmp_path)
    for file, colour in (("red.png", RED), ("blue.png", BLUE)):
        Image.new("RGB", (4, 4), colour).save(tmp_path / file)
    dataset = load(path)
    assert (dataset.stores[0].format, dataset.problems) == (kind, [])
    assert len(dataset) == dataset.records == len(expected)
    for i, (text, pictures) in enumerate(expected):
        assert_used(dataset, i, text)
        assert colours(dataset, i) == pictures
    again = load(path)
    assert again.stores[0].folder == dataset.stores[0].folder
    assert again.fingerprint == dataset.fingerprint
    tiled = load(path, max_tiles=2, tile_size=4)
    assert [len(tiled[i]["pixel_values"]) for i in range(len(tiled))] == [
        len(pictures) for _, pictures in expected
    ]


def folder_of(*names):
    def write(folder):
        (folder / "d").mkdir()
        for name in names:
            (folder / "d" / name).write_bytes(b"x")
        return folder / "d"

    return write


def damaged(path):
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    return path


def both_kinds(folder):
    hub_folder(folder)
    (folder / "hub" / "a.tar").write_bytes(b"x")
    return folder / "hub"


# Files of which each record is used ("ok") or a problem of this kind.
RECORDS_OF_FILES = {
    "tar without texts": (
        tar_file(
            ("0.png", picture_bytes(RED)),
            ("1.png", picture_bytes(RED)),
            ("1.cls", b"3"),
            ("2.png", picture_bytes(RED)),
            ("2.txt", b"Red"),
        ),
        ["no text", "no text", "ok"],
    ),
    "tar without pictures": (
        tar_file(("0.txt", b"Red"), ("1.png", picture_bytes(RED)), ("1.txt", b"Red")),
        ["caption without an image", "ok"],
    ),
    "tar with masks": (
        tar_file(*[(f"0.{kind}png", picture_bytes(RED)) for kind in ("", "seg.")], ("0.txt", b"x")),
        ["several pictures of a caption"],
    ),
    "tar with two captions": (
        tar_file(("0.png", picture_bytes(RED)), ("0.txt", b"x"), ("0.caption", b"y")),
        ["several texts"],
    ),
    "tar of videos": (tar_file(("0.mp4", b"x"), ("0.txt", b"Red")), ["video"]),
    "tar of broken texts": (
        tar_file(("0.json", b"{"), ("1.json", b"3"), ("2.txt", b"\xff")),
        ["broken json", "not a record", "broken txt"],
    ),
    "table with broken rows": (
        table_file(
            "a.csv", 'image,caption\nr.png\n,x\nr.png,"a" b\nr.png,x\nr.png,"open\nr.png,x\n'
        ),
        ["broken row", "caption without an image", "broken row", "ok", "broken row", "broken row"],
    ),
    "lines with a key twice": (
        other(
            "a.jsonl",
            json.dumps(llava("Hi", "Yes")).encode(),
            b'\n{"image": "a.png", "image": "b.png", "caption": "Red"}\n',
        ),
        ["ok", "not JSON"],
    ),
    "tables joined": (
        table_file("a.csv", "image, caption\nr.png,x\nimage, caption\nr.png,y\n"),
        ["ok", "broken row", "ok"],
    ),
    "table whose quote swallows a row": (
        table_file("a.tsv", 'image\tcaption\nr.png\t"x\nr.png\ty"\nr.png\tz\n'),
        ["broken row", "broken row", "ok"],
    ),
    "tar of questions": (
        tar_file(
            ("0.png", picture_bytes(RED)),
            ("0.txt", b"Red"),
            ("1.png", picture_bytes(RED)),
            ("1.txt", b"Red"),
            ("1.json", b'{"question": "What?"}'),
        ),
        ["ok", "unknown format"],
    ),
    "lines of broken JSON": (
        other(
            "a.jsonl",
            json.dumps(llava("Hi", "Yes")).encode(),
            b"\n{\n" + b"[" * 200_000 + b'\n{"id": ' + b"1" * 5000 + b"}\n",
        ),
        ["ok", "not JSON", "not JSON", "not JSON"],
    ),
    "pictures in a column of another name": (
        rows(jpg=[picture(RED), None], messages=[said("Hi", "Yes")["messages"]] * 2),
        ["picture that is not read", "ok"],
    ),
    "sounds beside pictures": (
        rows(
            image=[picture(RED)] * 2,
            audio=[picture(RED), None],
            messages=[said("<image>What?", "Red")["messages"]] * 2,
        ),
        ["audio", "ok"],
    ),
    "conversations as JSON texts": (
        rows(conversations=[json.dumps(llava("Hi", "Yes")["conversations"])]),
        ["no conversations"],
    ),
}


@pytest.mark.parametrize("name", RECORDS_OF_FILES)
def test_each_record_of_a_file_is_used_or_told_of(name, tmp_path):
    write, expected = RECORDS_OF_FILES[name]
    found = list(read_records(write(tmp_path)))
    assert [r.kind if isinstance(r, Problem) else "ok" for r in found] == expected
    assert [r.position for r in found] == list(range(len(expected)))


REFUSED = {
    "UTF-16": (other("a.json", json.dumps([5]).encode("utf-16")), "is text in UTF-16; save it as"),
    "gzip twice over": (
        other("a.gz", gzip.compress(gzip.compress(b"[]"))),
        "compressed twice over",
    ),
    "too deep an array": (other("a.json", b"[" * 200_000), "is broken at character 1"),
    "too long a number": (other("a.json", b"[" + b"1" * 5000 + b"]"), "is broken at character 1"),
    "a damaged Parquet file": (
        lambda folder: damaged(rows(**CAULDRON)(folder)),
        "is no whole Parquet file",
    ),
    "folder of two kinds": (both_kinds, r"several kinds \(.parquet, .tar\); name the files"),
    "YAML of another project": (
        next_list("all", sampling_ratio=0.5),
        "sampling_ratio of 'a.json' is not read; use sampling_strategy",
    ),
    "YAML that names itself": (next_list("all", json_path="list.yaml"), "names itself"),
    "meta that names itself": (
        other("meta.json", b'{"x": {"annotation": "meta.json"}}'),
        "names itself",
    ),
    "JSON array with a key twice": (
        other("a.json", b'[{"image": "a.png", "image": "b.png", "caption": "Red"}]'),
        "an object has the key 'image' twice",
    ),
    "InternVL's meta with a comma too many": (
        other("meta.json", b'{\n  "x": {\n    "annotation": "a.jsonl"\n  },\n}\n'),
        r"line 5 column 1 .* no comma before a closing bracket",
    ),
    "meta of pictures elsewhere": (
        meta_list(1, root="vc-reader:s3://bucket/pictures"),
        "vc-reader:s3://bucket/pictures, which is no folder of this machine",
    ),
    "a folder to test on, of two kinds": (
        folder_of("testmini-0-of-1.parquet", "test-0-of-1.parquet"),
        "only splits to measure on",
    ),
    "a pointer of Git LFS": (
        other("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "is a pointer to a file; fetch it by: git lfs pull",
    ),
    "pictures inside of messages": (
        rows(
            messages=pa.array(
                [[{"role": "user", "content": [{"type": "image", "image": picture(RED)}]}]]
            )
        ),
        "has pictures inside of 'messages'; put them into 'images'",
    ),
    "UTF-16 without a mark": (
        other("a.json", json.dumps([5]).encode("utf-16-le")),
        r"is not UTF-8 text \(it has zero bytes\)",
    ),
    "one list of messages, indented": (
        other("a.json", json.dumps(said("Hi", "Yes")["messages"], indent=1).encode()),
        "They are single messages: a record has a list of them",
    ),
    "zip": (other("a.zip", b"PK\x03\x04", b"x" * 99), "is a zip file; unpack it"),
    "compressed tar": (zipped(tar_file(("0.txt", b"Red"))), "is a compressed tar"),
    "half a gzip": (other("a.json.gz", gzip.compress(b"[" + b"1," * 9999)[:-20]), "no whole gzip"),
    "a picture": (other("a.png", picture_bytes(RED)), "is not UTF-8 text"),
    "half a Parquet file": (other("a.parquet", b"PAR1", b"x" * 99), "no whole Parquet file"),
    "half an Arrow file": (other("a.arrow", b"ARROW1", b"x" * 99), "no whole Arrow file"),
    "alpaca": (
        text_file("a.json", {"instruction": "x" * 999, "output": "y"}, lines=False),
        r"fit no format .*'query/response'.* has none of it, .* Keys: 'instruction', 'output'\. "
        r"Its first record: .{300}\.\.\. docs",
    ),
    "a typing error": (
        text_file("a.jsonl", {"conversation": [], "image": "x"}),
        "Nearest is 'LLaVA', which needs 'conversations': has none of it, lacks 'conversations'",
    ),
    "half a pair": (
        text_file("a.jsonl", {"query": "x", "answer": "y"}),
        "Nearest is 'query/response'.* has 'query', lacks 'response' \\(perhaps 'answer'\\)",
    ),
    "LLaVA's questions": (
        text_file("a.jsonl", {"image": "x.png", "text": "What?", "question_id": 1}),
        "Nearest is 'image and caption'.* has 'image' and 'text', but with 'question_id' it may be",
    ),
    "a conversation": (text_file("a.json", *said("Hi", "Yes")["messages"][:1]), "fit no format"),
    "COCO": (
        other("a.json", json.dumps({"images": [], "annotations": []}).encode()),
        "fit no format|is one JSON object",
    ),
    "COCO, indented": (
        other("a.json", json.dumps({"images": [], "annotations": []}, indent=1).encode()),
        "is one JSON object with the keys 'images', 'annotations'",
    ),
    "CSV without header": (other("a.csv", b"red.png,A red one\n"), "without a first row"),
    "CSV with a question": (other("a.csv", b"image,question,text\na,b,c\n"), "without a first row"),
    "YAML of an unknown strategy": (
        next_list("some:3"),
        "sampling_strategy 'some:3' .* is unknown",
    ),
    "YAML of a missing file": (
        next_list("all", json_path="no.json"),
        "names no.json, which does not",
    ),
    "meta of half a file twice": (meta_list(1.5), "repeat_time of 'x' is 1.5, expected a whole"),
    "meta of no number": (meta_list(float("nan")), "repeat_time of 'x' is nan, expected a whole"),
    "YAML of half a record": (next_list("first:2.5"), "sampling_strategy 'first:2.5' .* unknown"),
    "meta of another project": (meta_list(1, sample_ratio=2), "sample_ratio of 'x' is not read"),
    "plain text": (
        other("a.txt", b"Hello there\n"),
        "begins with .Hello there.; expected a JSON array",
    ),
    "an empty folder": (folder_of(), "holds no data set"),
    "a folder of JSON": (
        folder_of("a.json"),
        "it holds a.json. For JSON or a table, name the file",
    ),
    "a folder to test on": (folder_of("test-0-of-1.parquet"), "only splits to measure on"),
    "nothing": (lambda folder: folder / "none.json", "none.json does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_no_format_is_refused_with_a_reason(name, tmp_path):
    write, message = REFUSED[name]
    path = write(tmp_path)
    with pytest.raises(DPAError, match=message) as error:
        list(read_records(path))
    assert str(path) in str(error.value)


def test_a_mixture_names_files_of_different_formats(load, tmp_path):
    one = text_file("a.json", llava("Hi", "Yes"), lines=False)(tmp_path)
    other_file = rows(**CAULDRON)(tmp_path)
    dataset = load([one, other_file])
    assert [len(store) for store in dataset.stores] == [1, 3]
    assert [store.format for store in dataset.stores] == ["JSON array", "Parquet"]
    assert colours(dataset, 2) == [BLUE, GREEN]


def test_a_random_choice_is_the_same_every_time(load, tmp_path):
    path = next_list("random:40%")(tmp_path)
    found = [record.turns[0][1] for record in read_records(path)]
    assert len(found) == len(set(found)) == 4
    assert [record.turns[0][1] for record in read_records(path)] == found


def test_a_change_of_a_named_file_builds_the_store_anew(load, tmp_path):
    path = meta_list(1)(tmp_path)
    before = load(path)
    annotation = tmp_path / "a.jsonl"
    annotation.write_text(json.dumps(llava("Hi", "Yes")))
    after = load(path)
    assert (len(before), len(after)) == (4, 1)
    assert before.fingerprint != after.fingerprint


def test_a_list_may_name_files_of_any_format(load, tmp_path):
    table = rows(**CAULDRON)(tmp_path)
    hub_folder(tmp_path)
    entries = {"a": {"annotation": table.name}, "b": {"annotation": "hub", "root": "x"}}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    dataset = load(path)
    assert [colours(dataset, i) for i in range(5)] == [[RED], [BLUE, GREEN], [], [RED], [BLUE]]
    named = [file.name for file in open_source(path).files]
    assert named[:2] == ["meta.json", "a.parquet"] and len(named) == 4


def test_the_hash_of_data_follows_the_content(tmp_path):
    path = rows(**CAULDRON)(tmp_path)
    before = data_sha256(path)
    copied = tmp_path / "copies" / path.name
    copied.parent.mkdir()
    copied.write_bytes(path.read_bytes())
    assert data_sha256(copied) == before
    rows(**{**CAULDRON, "images": [[], [], []]})(tmp_path / "copies")
    formats._ends_sha256.cache_clear()
    assert data_sha256(copied) != before
    text = text_file("a.json", llava("Hi", "Yes"))(tmp_path)
    assert data_sha256(text) == hashlib.sha256(text.read_bytes()).hexdigest()
    assert data_sha256(hub_folder(tmp_path)) != data_sha256(saved_to_disk(tmp_path))


def test_a_changed_text_of_the_same_length_changes_the_fingerprint(load, tmp_path):
    """The hash of a large tar's ends would miss it."""

    def caption_of(text):
        path = tar_file(("0.png", picture_bytes(RED)), ("0.txt", text))(tmp_path)
        return load(path, "caption").fingerprint

    before = caption_of(b"Red")
    assert caption_of(b"Rat") != before
    assert caption_of(b"Red") == before


def test_problems_of_a_list_name_their_file(load, tmp_path):
    path = meta_list(1)(tmp_path)
    annotation = tmp_path / "a.jsonl"
    annotation.write_text(annotation.read_text() + "\n" + json.dumps(llava("Hi", "")) + "\nx\n")
    found = {problem.kind: problem for problem in load(path).problems}
    assert found["not JSON"].file == str(annotation) and found["not JSON"].number == 5


def test_pictures_in_large_row_groups_are_refused_by_name(load, tmp_path, monkeypatch):
    from dpa_xtuner.data import places

    dataset = load(rows(**CAULDRON)(tmp_path))
    places._last.asked = None
    monkeypatch.setattr(places, "_LARGEST_GROUP", 10)
    found = dataset[0]
    assert isinstance(found, Problem) and "write the file again with row groups" in found.reason
