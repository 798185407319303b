"""Scores by hand, by VLMEvalKit alone and by ours, on small files of each benchmark's format."""

import base64
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import vlmeval.dataset as known
from datasets import Dataset
from mmengine.config import Config
from opencompass.models.base import BaseModel
from opencompass.partitioners import NumWorkerPartitioner
from opencompass.registry import ICL_EVALUATORS
from opencompass.summarizers import DefaultSummarizer
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask
from PIL import Image
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import dump, get_intermediate_file_path, load
from vlmeval.smp.status_report import flatten_summary_metrics

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import BENCHMARKS, NO_ANSWER
from dpa_xtuner.evaluation.dataset import EvaluationDataset

pytestmark = pytest.mark.slow


def picture(colour: tuple[int, int, int] = (200, 30, 30), kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Case:
    """A small data set, answers to it, and what they are worth, reckoned by hand."""

    benchmark: str
    dataset: str
    rows: list[dict]
    said: dict[int, str]
    correct: dict[int, bool | float]
    score: float
    metrics: dict[str, float] = field(default_factory=dict)


def mmbench() -> Case:
    """Three questions; each in as many rotations as it has options."""
    rows, options = [], ["cat", "dog", "cow"]
    for question in (5, 17, 40):
        for turn in range(3):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": question + 1_000_000 * turn,
                    "question": f"What is it? ({question})",
                    "hint": "Look." if question == 17 else None,
                    **dict(zip("ABC", turned, strict=True)),
                    "D": None,
                    "answer": "ABC"[turned.index("dog")],
                    "category": "object_localization" if question == 5 else "identity_reasoning",
                    # a rotation refers to its question's picture
                    "image": str(question) if turn else picture(),
                    "source": "made",
                    "l2-category": "logic_reasoning" if question == 5 else "attribute_reasoning",
                    "comment": None,
                    "split": "dev",
                }
            )
    said = {row["index"]: row["answer"] for row in rows}
    said[1_000_005] = "A. dog"  # the option "dog" is A there
    said[2_000_017] = "B"  # it is C there: one wrong rotation, and the question is lost
    said[40] = "It is a dog."  # by the option's text
    correct = {index: index != 2_000_017 for index in said}
    shares = {"split=dev|LR": 100, "split=dev|AR": 50, "split=dev|identity_reasoning": 50}
    return Case("mmbench", "MMBench_DEV_EN", rows, said, correct, 200 / 3, shares)


def ai2d() -> Case:
    rows = [
        {
            "index": i,
            "question": f"Which part is {i}?" + " Really?" * i,
            "answer": "ABCD"[i % 4],
            **dict(zip("ABCD", ("root", "stem", "leaf", "petal"), strict=True)),
            "image": picture(),
            "image_path": f"{i}.png",
            "category": "partsOfA",
            "split": "test",
        }
        for i in range(5)
    ]
    said = {0: "A", 1: "The answer is B.", 2: "it is the leaf", 3: "A", 4: "I can't say"}
    return Case("ai2d", "AI2D_TEST", rows, said, {i: i < 3 for i in said}, 60.0)


def docvqa() -> Case:
    rows = [
        {
            "index": i,
            "image": picture(kind="JPEG"),
            "question": f"What is written in line {i}?",
            "answer": str(answers),
            "split": "val",
        }
        for i, answers in enumerate(
            (["March 3", "3rd of March"], ["tea"], ["university"], ["1996"], ["0.28"])
        )
    ]
    # The second answer of a list; upper case; 2 of 10 letters wrong; nothing in common; a number.
    said = {0: "3rd of march", 1: "TEA", 2: "universeti", 3: "cow", 4: "0.29"}
    correct = {0: 1.0, 1: 1.0, 2: 0.8, 3: 0.0, 4: 0.75}
    return Case("docvqa", "DocVQA_VAL", rows, said, correct, 71.0)


def ocrbench() -> Case:
    categories = (
        "Regular Text Recognition",
        "Regular Text Recognition",
        "Digit String Recognition",
        "Scene Text-centric VQA",
        "Key Information Extraction",
        "Doc-oriented VQA",
        "Handwritten Mathematical Expression Recognition",
        "Handwritten Mathematical Expression Recognition",
    )
    golds = ("CENTRE", "bar", "1934", "stop", "$5.00", "tea", "x ^ { 2 } = 4", r"\frac { 1 } { a }")
    rows = [
        {
            "dataset": "made",
            "question": "what is written in the image?",
            "image": picture(),
            "answer": str([gold, "another"]),
            "category": category,
            "index": i,
        }
        for i, (category, gold) in enumerate(zip(categories, golds, strict=True))
    ]
    said = {0: "It says Centre.", 1: "bus", 2: "1934", 3: "STOP!", 4: "5.00", 5: "another"}
    said |= {6: "$x^{2}=4$", 7: r"\FRAC{1}{a}"}  # formulas are compared with their case
    correct = {i: i in (0, 2, 3, 5, 6) for i in said}
    counts = {"Text Recognition": 2, "Final Score": 5, "Doc-oriented VQA": 1}
    return Case("ocrbench", "OCRBench", rows, said, correct, 62.5, counts)


def cvbench_2d() -> Case:
    """Sources of four and of two questions: each counts half."""
    rows = []
    for i, source in enumerate(["ADE20K"] * 4 + ["COCO"] * 2):
        text = f"How many trees are in the image? ({i})"
        options = {"A": "1", "B": "2", "C": "0"}
        listed = " ".join(f"({letter}) {value}" for letter, value in options.items())
        rows.append(
            {
                "index": i,
                "image": picture(),
                "question": text,
                **options,
                "answer": "B",
                "source": source,
                "split": "2D",
                "task": "Count",
                "prompt": f"{text} Select from the following choices.\n{listed}",
            }
        )
    said = {0: "(B)", 1: "B", 2: "A", 3: "(C) 0", 4: "(B) 2", 5: "B"}
    shares = {"split=2D|ADE20K": 50, "split=2D|COCO": 100}
    correct = {i: i not in (2, 3) for i in said}
    return Case("cvbench", "CV-Bench-2D", rows, said, correct, 75.0, shares)


def cvbench_3d() -> Case:
    made = cvbench_2d()
    rows = [row | {"split": "3D", "source": "Omni3D", "task": "Depth"} for row in made.rows]
    return Case("cvbench", "CV-Bench-3D", rows, made.said, made.correct, 400 / 6)


def mmvp() -> Case:
    rows = []
    for pair in range(3):
        for place in range(2):
            rows.append(
                {
                    "index": 2 * pair + place + 1,
                    "image": picture((0, 0, 80 * place)),
                    "question": f"Is the door open or shut? ({pair})",
                    "A": "Open",
                    "B": "Shut",
                    "answer": "AB"[place],
                }
            )
    said = {1: "A", 2: "B", 3: "A", 4: "A", 5: "shut", 6: "Open"}
    metrics = {"Average": 50, "Overall": 100 / 3}
    return Case("mmvp", "MMVP", rows, said, {i: i < 4 for i in said}, 100 / 3, metrics)


def naturalbench() -> Case:
    """The whole number of groups, since VLMEvalKit takes no other; the first two are answered."""
    rows = []
    for i in range(7600):
        group, place = divmod(i, 4)
        kind = "yes_no" if group % 2 == 0 else "multiple_choice"
        text = "Is it red?" if kind == "yes_no" else "What is it?\nOption: A:red; B:blue;"
        answers = ("Yes", "No") if kind == "yes_no" else ("A", "B")
        rows.append(
            {
                "index": i,
                "image": picture((place % 2 * 200, 0, 0)) if i < 8 else str(place % 2),
                "question": text,
                "answer": answers[place in (1, 2)],
                "type": kind,
            }
        )
    said = dict.fromkeys(range(7600), "I don't know what to say")
    # A group that is right; one with the second question right, and one picture.
    said |= {0: "Yes", 1: "No, it is not.", 2: "no", 3: "YES"}
    said |= {4: "A", 5: "A", 6: "The answer is B", 7: "A:red"}
    metrics = {"G_Acc": 1 / 19, "Q_Acc": 3 / 38, "I_Acc": 3 / 38, "Acc": 7 / 76}
    correct = {i: i < 8 and i != 5 for i in said}
    return Case("naturalbench", "NaturalBenchDataset", rows, said, correct, 1 / 19, metrics)


CASES = {
    case.dataset: case
    for case in (
        mmbench(),
        ai2d(),
        docvqa(),
        ocrbench(),
        cvbench_2d(),
        cvbench_3d(),
        mmvp(),
        naturalbench(),
    )
}
SMALL = {name: case for name, case in CASES.items() if len(case.rows) < 100}
NATURAL = "NaturalBenchDataset"
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def write(folder, case: Case, rows: list[dict] | None = None):
    """The data file, in the order of VLMEvalKit's files."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(case.rows if rows is None else rows)
    table.to_csv(folder / f"{case.dataset}.tsv", sep="\t", index=False)
    return folder


def options(case: Case, folder, limit=None) -> dict:
    config = BENCHMARKS[case.benchmark].config(case.dataset, folder, limit)
    return {
        k: config[k] for k in ("dataset_name", "data_root", "images", "limit", "group", "module")
    }


def read(case: Case, folder, limit=None, **reader) -> Dataset:
    reader = dict(input_columns=["prompt"], output_column="answer", **reader)
    return EvaluationDataset(reader_cfg=reader, **options(case, folder, limit)).test


def score(case: Case, folder, said: dict, limit=None, out=None) -> dict:
    test_set = read(case, folder, limit)
    benchmark = BENCHMARKS[case.benchmark]
    config = benchmark.config(case.dataset, folder, limit)["eval_cfg"]["evaluator"]
    evaluator = ICL_EVALUATORS.build(config)
    evaluator._out_dir = str(out or folder / "out")
    answers = [said[index] for index in test_set["index"]]
    return evaluator.evaluate(1, 1, test_set, predictions=answers, test_set=test_set)


def by_vlmevalkit(case: Case, folder, monkeypatch) -> dict:
    """VLMEvalKit alone, with a file of predictions as its own program writes it."""
    kinds = [kind for kind in known.DATASET_CLASSES if case.dataset in kind.supported_datasets()]
    monkeypatch.setenv("LMUData", str(folder))
    monkeypatch.setattr(kinds[0], "DATASET_MD5", {})
    dataset = kinds[0](dataset=case.dataset)
    frame = dataset.data.drop(columns="image")
    frame["prediction"] = [case.said[index] for index in frame["index"]]
    alone = folder / "alone"
    alone.mkdir()
    frame.to_excel(alone / f"model_{case.dataset}.xlsx", index=False)
    made = dataset.evaluate(
        str(alone / f"model_{case.dataset}.xlsx"), model="exact_matching", nproc=1
    )
    return flatten_summary_metrics(made)


@each
def test_score_by_hand_and_by_vlmevalkit(case, tmp_path, monkeypatch):
    write(tmp_path, case)
    result = score(case, tmp_path, case.said)
    assert result["score"] == pytest.approx(case.score)
    assert result["samples"] == len(case.rows)
    assert result["failed"] == []
    assert {d["index"]: d["correct"] for d in result["details"]} == pytest.approx(case.correct)
    assert result["metrics"] == pytest.approx(result["metrics"] | case.metrics)

    direct = by_vlmevalkit(case, tmp_path, monkeypatch)
    if case.dataset == "OCRBench":  # its norm is that of 1,000 questions
        direct["Final Score Norm"] *= 1000 / len(case.rows)
    scale = BENCHMARKS[case.benchmark].scale
    assert result["metrics"] == pytest.approx({k: v * scale for k, v in direct.items()})


def test_cvbench_is_the_mean_of_its_two_parts():
    scores = {"CV-Bench-2D": 75.0, "CV-Bench-3D": 60.0}
    assert BENCHMARKS["cvbench"].score(scores) == 67.5


@each
def test_no_answer_is_wrong(case, tmp_path):
    if case.dataset == NATURAL:
        case = Case(case.benchmark, case.dataset, case.rows[:16], {}, {}, 0)
    write(tmp_path, case)
    reason = "Yes: A. No, B (C) D the cat"  # a reason is not read as an answer
    result = score(case, tmp_path, {row["index"]: f"{NO_ANSWER}: {reason}" for row in case.rows})
    assert result["score"] == 0
    assert [bool(detail["correct"]) for detail in result["details"]] == [False] * len(case.rows)
    assert len(result["failed"]) == len(case.rows)
    assert {failure["reason"] for failure in result["failed"]} == {reason}


@pytest.mark.parametrize("name", ["DocVQA_VAL", "OCRBench"])
def test_answers_that_a_spreadsheet_would_change(name, tmp_path):
    """OpenCompass and VLMEvalKit hand answers over in one: "3" would be 3.0 beside the last row."""
    case = CASES[name]
    golds = ["3", "007", "12.50", "= 4", "None", "mailto:a", "0"]
    rows = [
        {**case.rows[0], "index": i, "question": f"What is it? ({i})", "answer": str([gold])}
        for i, gold in enumerate(golds)
    ]
    case = Case(case.benchmark, name, rows, {}, {}, 0)
    write(tmp_path, case)
    said = dict(enumerate(golds[:-1])) | {6: "no number"}
    result = score(case, tmp_path, said)
    assert result["score"] == pytest.approx(100 * 6 / 7)
    assert [bool(correct_of(result, i)) for i in range(7)] == [True] * 6 + [False]
    counts = dict(enumerate("345")) | {3: "", 4: "4", 5: "5", 6: "6"}  # all numbers but for one
    rows = [row | {"answer": str([counts[row["index"]] or "7"])} for row in rows]
    case = Case(case.benchmark, name, rows, {}, {}, 0)
    result = score(case, write(tmp_path / "numbers", case), counts)
    assert result["score"] == pytest.approx(100 * 6 / 7) and len(result["failed"]) == 1


def correct_of(result: dict, index: int) -> bool | float:
    (found,) = (d["correct"] for d in result["details"] if d["index"] == index)
    return found


def test_nothing_is_no_part_of_an_ocr_answer(tmp_path):
    """A gold answer may be empty, and the empty text is a part of any other."""
    case = CASES["OCRBench"]
    rows = [row | {"answer": "['', 'x']"} for row in case.rows[:2]]
    case = Case(case.benchmark, case.dataset, rows, {}, {}, 0)
    result = score(case, write(tmp_path, case), {0: NO_ANSWER, 1: "anything"})
    assert result["score"] == 50.0
    assert [correct_of(result, i) for i in (0, 1)] == [False, True]


@pytest.mark.parametrize("name", ["MMBench_DEV_EN", "MMVP", NATURAL])
def test_a_failed_member_costs_its_group(name, tmp_path):
    case = CASES[name]
    case = Case(case.benchmark, name, case.rows[:12], {}, {}, 0)
    right = {row["index"]: row["answer"] for row in case.rows}
    write(tmp_path, case)
    assert score(case, tmp_path, right)["score"] == 100
    last = case.rows[-1]["index"]
    result = score(case, tmp_path, right | {last: f"{NO_ANSWER}: cannot identify image file"})
    assert result["score"] == pytest.approx(200 / 3)
    assert result["failed"] == [{"index": last, "reason": "cannot identify image file"}]
    assert [d["index"] for d in result["details"] if not d["correct"]] == [last]
    lost = {d["group"] for d in result["details"] if not d["correct"]}
    assert len([d for d in result["details"] if d["group"] in lost]) == len(case.rows) / 3


@each_small
def test_answers_that_no_spreadsheet_holds(case, tmp_path):
    """Empty ones are wrong; characters that can't be written cost nothing but themselves."""
    write(tmp_path, case)
    indices = [row["index"] for row in case.rows]
    said = dict.fromkeys(indices, "\x00\x07 \ud800 " + "?" * 40_000)
    said |= {indices[0]: "", indices[1]: None, indices[2]: " \n"}
    said |= {indices[3]: "=1+1", indices[4]: "http://" + "?" * 3000}
    result = score(case, tmp_path, said)
    assert result["score"] == 0
    assert sorted(f["index"] for f in result["failed"]) == sorted(indices[:3])
    assert {failure["reason"] for failure in result["failed"]} == {"empty answer"}


@each_small
def test_scored_again_after_other_answers(case, tmp_path):
    """VLMEvalKit would answer from what it left behind."""
    write(tmp_path, case)
    score(case, tmp_path, dict.fromkeys(case.said, "?"))
    assert score(case, tmp_path, case.said)["score"] == pytest.approx(case.score)


def test_details_say_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("LMUData", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    case = CASES["MMVP"]
    result = score(case, write(tmp_path, case), case.said)
    detail = next(d for d in result["details"] if d["index"] == 3)
    assert detail["prediction"] == "A" and detail["answer"] == "A" and detail["correct"] is True
    assert "Is the door open or shut? (1)" in detail["question"] and "B. Shut" in detail["question"]
    assert Image.open(detail["image"]).getpixel((3, 3)) == (0, 0, 0)
    assert not (tmp_path / "home").exists()  # VLMEvalKit would make a folder for its data there


class Oracle(BaseModel):
    """Says what `said` has for a picture, by the number in its file's name."""

    def __init__(self, path, said, **_):
        super().__init__(path)
        self.said = said

    def parse_template(self, prompt_template, mode):
        return prompt_template

    def generate(self, inputs, max_out_len=None):
        images = [messages[0]["content"][0]["image_url"] for messages in inputs]
        return [self.said[Path(image).stem] for image in images]


def test_in_opencompass(tmp_path, monkeypatch):
    """Its tasks, over parts of the data set, give the same result, and its summary takes it."""
    case = CASES["MMBench_DEV_EN"]
    write(tmp_path / "data", case)
    monkeypatch.chdir(tmp_path)
    said = {str(index): text for index, text in case.said.items()}
    model = dict(type=Oracle, abbr="oracle", path="", said=said, batch_size=4, max_out_len=8)
    data = BENCHMARKS["mmbench"].config(case.dataset, tmp_path / "data") | {"abbr": "mmbench-1"}
    common = dict(work_dir=str(tmp_path / "work"))
    parts = NumWorkerPartitioner(str(tmp_path / "work/predictions"), 2, min_task_size=4).partition(
        [Config(dict(models=[model], datasets=[data]))], **common, out_dir=str(tmp_path)
    )
    assert len(parts) == 2
    for part in parts:
        OpenICLInferTask(part).run()
    task = dict(type="OpenICLEvalTask", dump_details=True)
    whole = dict(models=[model], datasets=[[data]], eval=dict(runner=dict(task=task)), **common)
    OpenICLEvalTask(Config(whole)).run()

    result = json.loads((tmp_path / "work/results/oracle/mmbench-1.json").read_text())
    direct = score(case, tmp_path / "data", case.said)
    assert result["score"] == pytest.approx(case.score)
    assert result["metrics"] == pytest.approx(direct["metrics"])
    assert result["details"] == direct["details"]
    summarizer = DefaultSummarizer(Config(whole | {"datasets": [data]}))
    _, parsed, metrics, _ = summarizer._pick_up_results()
    assert metrics["mmbench-1"][0] == "score"
    assert parsed["oracle"]["mmbench-1"]["score"] == pytest.approx(case.score)


# The data set


@each_small
def test_prompts_are_vlmevalkits(case, tmp_path, monkeypatch):
    """The same texts and the same pixels."""
    write(tmp_path, case)
    test_set = read(case, tmp_path)
    kind = next(k for k in known.DATASET_CLASSES if case.dataset in k.supported_datasets())
    monkeypatch.setenv("LMUData", str(tmp_path / "alone"))
    write(tmp_path / "alone", case)
    monkeypatch.setattr(kind, "DATASET_MD5", {})
    alone = kind(dataset=case.dataset)
    prompts = {row["index"]: alone.build_prompt(row) for _, row in alone.data.iterrows()}
    assert sorted(test_set["index"]) == sorted(prompts)
    for row in test_set:
        (message,) = row["prompt"]
        image, text = message["content"]
        theirs = prompts[row["index"]]
        assert message["role"] == "user"
        assert text["text"] == theirs[1]["value"]
        ours, reference = Image.open(image["image_url"]), Image.open(theirs[0]["value"])
        assert ours.convert("RGB").tobytes() == reference.convert("RGB").tobytes()


def test_longest_first_and_the_same_order_each_time(tmp_path):
    case = CASES["AI2D_TEST"]
    write(tmp_path, case)
    assert read(case, tmp_path)["index"] == [4, 3, 2, 1, 0]
    same = [row | {"question": "Which?"} for row in case.rows]
    write(tmp_path, case, same)
    assert read(case, tmp_path)["index"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["MMBench_DEV_EN", "MMVP", NATURAL, "OCRBench"])
def test_limit_keeps_groups_whole(name, tmp_path):
    case = CASES[name]
    write(tmp_path, case)
    rows = {"MMBench_DEV_EN": 3, "MMVP": 2, NATURAL: 4, "OCRBench": 1}[name]
    assert len(read(case, tmp_path, limit=2)) == 2 * rows
    right = {row["index"]: row["answer"] for row in case.rows}
    result = score(case, tmp_path, right, limit=2)
    assert (result["score"], result["samples"]) == (100, 2 * rows)


def test_limit_is_spread_over_the_file(tmp_path):
    case = CASES["OCRBench"]
    write(tmp_path, case)
    assert sorted(read(case, tmp_path, limit=4)["index"]) == [0, 2, 4, 6]
    assert len(read(case, tmp_path, limit=100)) == 8


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_leave_something(limit, tmp_path):
    case = CASES["MMVP"]
    write(tmp_path, case)
    with pytest.raises(DPAError, match=f"limit={limit}"):
        read(case, tmp_path, limit=limit)


def test_parts_make_the_whole(tmp_path):
    """OpenCompass asks for parts and puts the answers behind each other."""
    case = CASES["MMBench_DEV_EN"]
    write(tmp_path, case)
    whole = read(case, tmp_path)["index"]
    parts = [read(case, tmp_path, test_range=r) for r in ("[0:4]", "[4:8]", "[8:12]")]
    assert [index for part in parts for index in part["index"]] == whole


def test_no_row_is_lost_with_its_picture(tmp_path):
    """One picture is missing, with a row that refers to it; one is broken, one is no base64."""
    case = CASES["MMBench_DEV_EN"]
    rows = [dict(row) for row in case.rows]
    rows[0]["image"] = None
    rows[3]["image"] = base64.b64encode(b"\x89PNG and no more" * 10).decode()
    rows[6]["image"] = "é" * 99
    rows[8]["image"] = "12345"  # no such row
    test_set = read(case, write(tmp_path, case, rows))
    paths = {row["index"]: row["prompt"][0]["content"][0]["image_url"] for row in test_set}
    assert len(paths) == len(rows)
    assert [index for index, path in sorted(paths.items()) if path == ""] == [
        5, 1_000_005, 2_000_005, 2_000_040
    ]  # fmt: skip
    for index in (17, 1_000_017, 40, 1_000_040):
        with pytest.raises(OSError, match="cannot identify image file"):
            Image.open(paths[index])
    assert score(case, tmp_path, case.said)["score"] == pytest.approx(case.score)


@pytest.mark.parametrize(
    ("name", "column"),
    [(n, c) for n, made in SMALL.items() for c in ("question", "prompt", "answer")
     if c in made.rows[0]],
)  # fmt: skip
def test_a_row_without_question_or_answer_fails_alone(name, column, tmp_path):
    """It is wrong and listed, and the others are asked and scored as in the whole file."""
    case = CASES[name]
    lost = case.rows[3]["index"]
    rows = [row | ({column: None} if row["index"] == lost else {}) for row in case.rows]
    whole, cut = write(tmp_path / "whole", case), write(tmp_path / "cut", case, rows)
    prompts, others = (
        {row["index"]: row["prompt"][0]["content"][-1]["text"] for row in read(case, folder)}
        for folder in (whole, cut)
    )
    assert others == prompts | ({lost: ""} if column != "answer" else {})
    # To the empty text a model gives no answer; where the gold is missing it may say what it likes.
    none = {lost: f"{NO_ANSWER}: no question is given"}
    expected = score(case, whole, case.said | none)
    found = score(case, cut, case.said | (none if column != "answer" else {}))
    reason = "no right answer is given" if column == "answer" else "no question is given"
    assert found["failed"] == [{"index": lost, "reason": reason}]
    for key in ("score", "metrics", "samples"):
        assert found[key] == expected[key]
    correct = [{d["index"]: d["correct"] for d in made["details"]} for made in (found, expected)]
    assert correct[0] == correct[1] and not correct[0][lost]


@pytest.mark.parametrize("name", ["OCRBench", "DocVQA_VAL"])
def test_questions_that_look_like_numbers_are_text(name, tmp_path):
    case = CASES[name]
    rows = [row | {"question": 7} for row in case.rows]
    result = score(case, write(tmp_path, case, rows), case.said)
    assert result["score"] == pytest.approx(case.score)
    assert {d["question"].splitlines()[0] for d in result["details"]} == {"7"}


def test_texts_that_pandas_takes_for_nothing(tmp_path):
    """A question, or a right answer, may be "NA" or "None"."""
    case = CASES["OCRBench"]
    rows = [row | {"question": "None"} for row in case.rows]
    result = score(case, write(tmp_path, case, rows), case.said)
    assert result["score"] == pytest.approx(case.score) and result["failed"] == []
    own = Case("ai2d", "MyQuestions", [row | {"answer": "NA"} for row in rows[:2]], {}, {}, 0)
    assert list(read(own, write(tmp_path, own))["answer"]) == ["NA", "NA"]


def test_a_data_file_is_never_run(tmp_path):
    """VLMEvalKit alone would run what stands in the place of a list."""
    case = CASES["OCRBench"]
    code = f"[open({str(tmp_path / 'run')!r}, 'w').close()]"
    rows = [row | {"index": f"i{i}"} for i, row in enumerate(case.rows)]
    rows[0]["image"] = code + " " * 64 + "]"
    rows[1]["index"] = code
    rows[2]["image"] = str([picture(), "", picture((0, 0, 9))])
    test_set = read(case, write(tmp_path, case, rows))
    paths = {
        row["index"]: [block["image_url"] for block in row["prompt"][0]["content"][:-1]]
        for row in test_set
    }
    assert paths["i0"] == [""] and len(paths) == len(rows)
    assert [bool(path) for path in paths["i2"]] == [True, False, True]
    assert Image.open(paths["i2"][2]).getpixel((0, 0)) == (0, 0, 9)
    rows[4]["index"] = "../../outside"
    (row,) = (r for r in read(case, write(tmp_path, case, rows)) if "outside" in r["index"])
    assert Path(row["prompt"][0]["content"][0]["image_url"]).parent.name == case.dataset
    rows[3]["answer"] = code
    write(tmp_path, case, rows)
    with pytest.raises(ValueError, match="malformed"):
        score(case, tmp_path, {row["index"]: "tea" for row in rows})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("index\tquestion\n", "has no rows"),
        ("index\tquestion\n1\tWhat?\n\tWhy?\n", "row 2 of 2 has no index"),
        ("question\nWhat?\nWhy?\n", "row 1 of 2 has no index"),
        ("index\tquestion\n1\tWhat?\n1\tWhy?\n", "row 2 of 2 has the index of another row"),
        ("index\tquestion\tanswer\n1\tWhat?\t\n2\tWhy?\t \n", "has no right answers"),
    ],
)
def test_a_file_of_no_use_is_said_so(content, message, tmp_path):
    (tmp_path / "AI2D_TEST.tsv").write_text(content)
    with pytest.raises(DPAError, match=rf"AI2D_TEST\.tsv:? {message}"):
        read(CASES["AI2D_TEST"], tmp_path)


def test_a_file_that_was_cut_is_said_so(tmp_path):
    for name, rows, message in (
        ("MMVP", CASES["MMVP"].rows[:-1], "MMVP.tsv: 1 of 3 groups of rows are incomplete"),
        ("MMBench_DEV_EN", CASES["MMBench_DEV_EN"].rows[1:], "the first that of 5"),
    ):
        case = CASES[name]
        write(tmp_path, case, rows)
        with pytest.raises(DPAError, match=message):
            read(case, tmp_path)


def test_a_missing_file_is_not_fetched(tmp_path):
    with pytest.raises(DPAError, match=r"AI2D_TEST\.tsv is not there"):
        read(CASES["AI2D_TEST"], tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_of_another_md5_is_left_alone(tmp_path):
    """VLMEvalKit alone would fetch the right one and write over it."""
    case = CASES["AI2D_TEST"]
    write(tmp_path, case)
    before = (tmp_path / "AI2D_TEST.tsv").read_bytes()
    assert len(read(case, tmp_path)) == 5
    assert (tmp_path / "AI2D_TEST.tsv").read_bytes() == before


class Echo(ImageBaseDataset):
    """A class of a user's own, which VLMEvalKit knows how to build and to score."""

    DATASET_URL: ClassVar = {"MyEcho": ""}

    def __init__(self, dataset):
        super().__init__(dataset)
        self.suffix = "Say it again."

    def build_prompt(self, line):
        return [*super().build_prompt(line)[:-1], {"type": "text", "value": self.suffix}]

    def evaluate(self, eval_file, **judge):
        data = load(eval_file)
        data["eval_score"] = (data["prediction"] == data["answer"]).astype(float)
        dump(data, get_intermediate_file_path(eval_file, "_results"))
        return {"Overall": data["eval_score"].mean()}


def test_a_class_of_ones_own_builds_its_prompts_and_scores(tmp_path, monkeypatch):
    """Its file of answers has them as they were given; which are right is read from its record."""
    monkeypatch.setattr(known, "DATASET_CLASSES", [*known.DATASET_CLASSES, Echo])
    golds = ("0", "1", "2", "007", "4")
    rows = [row | {"answer": golds[i]} for i, row in enumerate(CASES["AI2D_TEST"].rows)]
    own = Case("ai2d", "MyEcho", rows, {}, {}, 0)
    said = {0: "0", 1: "None", 2: "2", 3: "007", 4: "4\x07"}
    result = score(own, write(tmp_path, own), said)
    assert {d["index"]: d["correct"] for d in result["details"]} == {
        0: True, 1: False, 2: True, 3: True, 4: False,
    }  # fmt: skip
    assert result["score"] == 60 and {d["question"] for d in result["details"]} == {"Say it again."}
    assert all(Path(d["image"]).is_file() for d in result["details"])


def test_multiple_choice_of_another_name(tmp_path):
    case = CASES["AI2D_TEST"]
    own = Case("ai2d", "MyQuestions", case.rows, case.said, case.correct, case.score)
    result = score(own, write(tmp_path, own), own.said)
    assert result["score"] == pytest.approx(60)
    assert {d["index"]: d["correct"] for d in result["details"]} == case.correct
