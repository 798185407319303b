"""Reading LLaVA-format files."""

import json
import tracemalloc

import pytest

from dpa_xtuner.data import Problem, Record, read_records
from dpa_xtuner.data.formats import json_text, opened, parse_record
from dpa_xtuner.errors import DPAError

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


def test_json_and_jsonl_give_the_same_records(write, caption, chat):
    data = [
        caption("a", 'Zwölf Boxkämpfer 🥊 " \\ ] }'),
        chat("b", "Hi", "Hello", "<image>", "Yes", image=["x.png"], system="Be kind."),
    ]
    expected = [
        Record("a", ("wide.png",), None, (("<image>\nDescribe.", 'Zwölf Boxkämpfer 🥊 " \\ ] }'),)),
        Record("b", ("x.png",), "Be kind.", (("Hi", "Hello"), ("<image>", "Yes")), 1),
    ]
    assert list(read_records(write(data))) == expected
    assert list(read_records(write(data, "data.jsonl"))) == expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_window_edges_do_not_matter(tmp_path, chat, monkeypatch, chunk, indent):
    record = chat("a", "Hi", 'a]b,c\\"é🥊') | {"extra": {"k": [1, {"l": "}"}]}}
    values = [1234567, -1.5e3, True, None, record, [], "", float("nan"), 98765]
    path = tmp_path / "data.json"
    path.write_text(f"  {json.dumps(values, indent=indent)}\n ")
    monkeypatch.setattr(json_text, "_CHUNK", chunk)
    found = list(read_records(path))
    assert found == [parse_record(value, i) for i, value in enumerate(values)]
    assert isinstance(found[4], Record)


def test_an_empty_array_has_no_record(tmp_path):
    (tmp_path / "data.json").write_text(" [ ] ")
    assert list(read_records(tmp_path / "data.json")) == []


def test_memory_is_bounded_by_the_longest_record(write, caption, monkeypatch):
    path = write([caption(str(i), "word " * 200) for i in range(4_000)])
    monkeypatch.setattr(json_text, "_CHUNK", 10_000)
    monkeypatch.setattr(opened, "_LONGEST_HEAD", 10_000)
    tracemalloc.start()
    try:
        assert sum(isinstance(record, Record) for record in read_records(path)) == 4_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000 < path.stat().st_size / 20


def test_a_record_without_id_gets_its_index(write, caption):
    data = [caption("a"), caption("b"), caption("c")]
    del data[1]["id"]
    data[2]["id"] = 17
    assert [record.id for record in read_records(write(data))] == ["a", "1", "17"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": None}, "unknown format"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "malformed message"),
        ({"conversations": [HUMAN, "Hello"]}, "malformed message"),
        ({"conversations": [GPT]}, "roles not alternating"),
        ({"conversations": [HUMAN]}, "roles not alternating"),
        ({"conversations": [HUMAN, GPT, GPT]}, "roles not alternating"),
        ({"conversations": [{"from": "system", "value": ""}]}, "roles not alternating"),
        ({"conversations": [HUMAN, {"from": "tool", "value": ""}]}, "unknown role"),
        ({"image": "x.png"}, "wrong number of <image>"),
        ({"image": 3}, "malformed image"),
        ({"image": ["x.png", ""]}, "malformed image"),
        (
            {"conversations": [{**HUMAN, "value": "<image> <image>"}, GPT], "image": "x"},
            "wrong num",
        ),
        (
            {"conversations": [HUMAN, {**GPT, "value": "<image>"}], "image": "x"},
            "misplaced <image>",
        ),
        ({"id": {}}, "malformed id"),
        ({"conversations": [HUMAN, {**GPT, "value": "\ud83d"}]}, "malformed text"),
    ],
)
def test_a_malformed_record_is_a_problem_and_the_next_is_read(write, chat, change, reason):
    good = chat("good", "Hi", "Hello")
    bad, after = read_records(write([{**good, "id": "bad", **change}, good]))
    assert isinstance(bad, Problem) and bad.reason.startswith(reason)
    assert bad.record_id == ("0" if "id" in change else "bad")
    assert after.id == "good"


def test_what_is_no_object_is_a_problem(write, caption):
    kinds = [item.kind for item in list(read_records(write([5, "x", [], caption("a")])))[:3]]
    assert kinds == ["not a record"] * 3


def test_a_broken_line_is_a_problem_of_its_own(write, caption):
    path = write([caption("a"), caption("b")], "data.jsonl")
    path.write_text(path.read_text().replace("\n", '\n{"id": \n\n', 1))
    first, broken, last = read_records(path)
    assert (first.id, last.id) == ("a", "b")
    assert broken.record_id == "line 2" and broken.kind == "not JSON"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"id;caption\n", "begins with 'id;caption'; expected a JSON array"),
        (b"id,caption\n", "is a table without a first row that names a column of pictures"),
        (b'{"id": 1\n,}', "line 1, column 9"),
        (b'{"id": 1\n}', "is one JSON object with the keys 'id'"),
        (b'[12345678, {"a" 2}]', "character 16, after 1 records: Expecting ':'"),
        (b'[{"a": 1} {"a": 2}]', "character 9, after 0 records: Expecting ',' or ']'"),
        (b"[12345678, ]", "character 11, after 1 records: Expecting value"),
        (b'[{"a": 1}', "character 9, after 0 records: Expecting ',' or ']'"),
        (b'[12345678]\n{"a": 1}', "text after the closing"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_what_is_no_json_names_file_and_position(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DPAError) as error:
        list(read_records(path))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DPAError, match=r"nowhere\.json does not exist"):
        list(read_records(tmp_path / "nowhere.json"))
