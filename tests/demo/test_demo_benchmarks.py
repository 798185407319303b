"""The demo's benchmarks: what is asked, and what VLMEvalKit makes of answers to it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dpa_xtuner.demo import benchmarks, drawings, scenes
from dpa_xtuner.evaluation.benchmarks import find_benchmarks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openmoji") / "benchmarks"
    assert benchmarks.write(path, seed=0)
    return path


def _table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.tsv", sep="\t")


@pytest.fixture(scope="module")
def known(folder: Path) -> Any:
    """VLMEvalKit's `build_dataset`, with our names and files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMUData", str(folder))
        from vlmeval.dataset import build_dataset

        import dpa_xtuner.demo.vlmeval_datasets  # noqa: F401

        built = {name: build_dataset(name) for name in benchmarks.FILES}
        yield built.__getitem__


def _score(dataset: Any, answers: list[str], folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True)
    path = str(folder / f"{dataset.dataset_name}.xlsx")
    frame = dataset.data.drop(columns="image")
    frame["prediction"] = answers
    frame.to_excel(path, index=False)
    scores = dataset.evaluate(path, model="exact_matching", nproc=1)
    return scores if isinstance(scores, dict) else scores.iloc[0].to_dict()


def test_same_seed_gives_the_same_files_once(folder: Path, tmp_path: Path) -> None:
    assert benchmarks.write(tmp_path / "again", seed=0)
    assert not benchmarks.write(tmp_path / "again", seed=1)
    assert benchmarks.write(tmp_path / "other", seed=1)
    for name in benchmarks.FILES:
        first, again, other = (
            (path / f"{name}.tsv").read_bytes()
            for path in (folder, tmp_path / "again", tmp_path / "other")
        )
        assert first == again != other


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("OpenMojiChoice", 60),
        ("OpenMojiPairs", 60),
        ("OpenMojiGroups", 60),
        ("OpenMojiShort", 43),
        ("OpenMojiCount", 54),
    ],
)
def test_files_hold_pictures(folder: Path, name: str, rows: int) -> None:
    table = _table(folder, name)
    assert list(table["index"]) == list(range(1, rows + 1))
    for picture in table["image"]:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (96, 96)


def test_no_drawing_was_seen_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[drawings.Drawing] = []
    draw = scenes.draw
    monkeypatch.setattr(
        benchmarks, "draw", lambda scene: drawn.extend(scene.drawings) or draw(scene)
    )
    benchmarks.write(tmp_path / "benchmarks", seed=0)
    trained = {drawing.name for drawing in drawings.catalogue() if not drawing.held_out}
    assert len(drawn) > 294
    assert not {drawing.name for drawing in drawn} & trained


def test_answers_are_spread_evenly(folder: Path) -> None:
    choice = _table(folder, "OpenMojiChoice")
    assert set(Counter(zip(choice["category"], choice["answer"], strict=True)).values()) == {5}
    for _, row in choice.iterrows():
        assert len({row[letter] for letter in "ABCD"}) == 4
    pairs = _table(folder, "OpenMojiPairs")
    assert Counter(pairs["answer"]) == {"A": 30, "B": 30}
    assert Counter(row[row["answer"]] for _, row in pairs.iterrows()) == {"Yes": 30, "No": 30}
    assert Counter(_table(folder, "OpenMojiGroups")["answer"]) == {"Yes": 30, "No": 30}
    assert set(Counter(_table(folder, "OpenMojiCount")["answer"]).values()) == {6}


def test_a_pair_differs_in_picture_and_answer_only(folder: Path) -> None:
    for _, pair in _table(folder, "OpenMojiPairs").groupby(lambda row: row // 2):
        assert pair[["question", "A", "B"]].drop_duplicates().shape[0] == 1
        assert pair["image"].nunique() == pair["answer"].nunique() == 2


def test_a_group_is_two_questions_of_two_pictures(folder: Path) -> None:
    for _, group in _table(folder, "OpenMojiGroups").groupby(lambda row: row // 4):
        questions, images = list(group["question"]), list(group["image"])
        assert questions[0] == questions[1] != questions[2] == questions[3]
        assert images[0] == images[2] != images[1] == images[3]
        assert list(group["answer"]) == ["Yes", "No", "No", "Yes"]


def _training_text(row: pd.Series, name: str) -> str:
    """The row's question in the wording of the training questions."""
    if name == "OpenMojiGroups":
        return scenes.as_yes_no(row["question"])
    if "A" not in row:
        return row["question"]
    return scenes.as_choice(row["question"], [row[x] for x in "ABCD" if x in row])


@pytest.mark.parametrize("name", benchmarks.FILES)
def test_prompts_are_worded_as_in_training(known: Any, name: str) -> None:
    dataset = known(name)
    for _, row in dataset.data.iterrows():
        picture, text = dataset.build_prompt(row)
        assert Path(picture["value"]).is_file()
        # Training takes the space off that VLMEvalKit puts at the end.
        assert text["value"].strip() == _training_text(row, name)


def test_choice_by_hand(known: Any, tmp_path: Path) -> None:
    dataset = known("OpenMojiChoice")
    answers = ["no idea"] * 60
    rows = list(dataset.data.iterrows())
    answers[0] = rows[0][1]["answer"]  # the letter
    answers[1] = rows[1][1][rows[1][1]["answer"]]  # the option's text
    answers[2] = "ABCD"[("ABCD".index(rows[2][1]["answer"]) + 1) % 4]
    scores = _score(dataset, answers, tmp_path / "a")
    assert scores["Overall"] == pytest.approx(2 / 60)
    assert [scores[kind] for kind in ("kind", "colour", "count")] == pytest.approx([0.05, 0.05, 0])


def test_pairs_by_hand(known: Any, tmp_path: Path) -> None:
    dataset = known("OpenMojiPairs")
    said = [row[row["answer"]] for _, row in dataset.data.iterrows()]
    # Both of pair 0, one of pair 1, none of pair 2.
    wrong = ["No" if answer == "Yes" else "Yes" for answer in said]
    answers = [*said[:3], *wrong[3:]]
    scores = _score(dataset, answers, tmp_path / "a")
    assert scores == pytest.approx({"Average": 3 / 60, "Overall": 1 / 30})


def test_groups_by_hand(known: Any, tmp_path: Path) -> None:
    # Group 0 right, in group 1 the first question, in group 2 the first picture; else "no".
    answers = ["yes.", "No", "no", "Yes, it is", "Yes", "No", "No", "No", "Yes", "Yes", "No", "No"]
    answers += ["No"] * 48
    scores = _score(known("OpenMojiGroups"), answers, tmp_path / "a")
    expected = {"Acc": (4 + 3 + 2 + 24) / 60, "Q_Acc": 3 / 30, "I_Acc": 4 / 30, "G_Acc": 1 / 15}
    assert scores == pytest.approx(expected)


def test_short_answers_by_hand(known: Any, tmp_path: Path) -> None:
    dataset = known("OpenMojiShort")
    right = dict(zip(dataset.data["category"], dataset.data["answer"], strict=True))
    answers = ["nothing"] * 43
    for kind, said in (("kind", "An {}."), ("colour", "{}ish")):
        row = list(dataset.data["answer"]).index(right[kind])
        answers[row] = said.format(right[kind].upper())
    scores = _score(dataset, answers, tmp_path / "a")
    expected = {"Overall": 100 / 43, "kind": 100 / 23, "colour": 0}
    assert scores == pytest.approx(expected)
    counts = known("OpenMojiCount")
    digits = [str(scenes.COUNTS.index(answer) + 1) for answer in counts.data["answer"]]
    assert _score(counts, digits, tmp_path / "b")["Overall"] == 100


@pytest.mark.parametrize(
    ("name", "said", "rows", "constant"),
    [
        ("choice", "ABCD", 1, {"Overall": 1 / 4}),
        ("pairs", ("Yes", "No"), 2, {"Overall": 0, "Average": 1 / 2}),
        ("groups", ("Yes", "No"), 4, {"G_Acc": 0, "Q_Acc": 0, "I_Acc": 0, "Acc": 1 / 2}),
    ],
)
def test_chance_is_the_mean_over_all_ways_to_answer(
    known: Any, tmp_path: Path, name: str, said: str, rows: int, constant: dict[str, float]
) -> None:
    dataset = known(f"OpenMoji{name.capitalize()}")
    total = 0.0
    for way in itertools.product(said, repeat=rows):
        scores = _score(dataset, [*way] * (60 // rows), tmp_path / "".join(way))
        total += scores[next(iter(constant))]
        if len(set(way)) == 1:
            assert {metric: scores[metric] for metric in constant} == constant
    assert 100 * total / len(said) ** rows == benchmarks.CHANCE[f"openmoji-{name}"]


@pytest.mark.parametrize("name", ["OpenMojiShort", "OpenMojiCount"])
def test_chance_of_short_answers(known: Any, tmp_path: Path, name: str) -> None:
    dataset = known(name)
    kinds = list(dataset.data["category"])
    longest = max(len(scenes.ANSWERS[kind]) for kind in kinds)
    runs = []
    for number in range(longest):
        answers = [dict(enumerate(scenes.ANSWERS[kind])).get(number, "nothing") for kind in kinds]
        runs.append(_score(dataset, answers, tmp_path / str(number)))
    # Within its kind, each constant answer is right as often as any.
    for kind in set(kinds):
        share = 100 / len(scenes.ANSWERS[kind])
        scores = [run[kind] for run in runs[: len(scenes.ANSWERS[kind])]]
        assert scores == pytest.approx([share] * len(scores))
    chance = sum(100 / len(scenes.ANSWERS[kind]) for kind in kinds) / len(kinds)
    assert benchmarks.CHANCE[name.replace("OpenMoji", "openmoji-").lower()] == pytest.approx(chance)


def _asked(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers of each training picture."""
    records = json.loads((root / scenes.QUESTIONS).read_text())
    return {
        record["id"]: [
            (human["value"].replace("<image>\n", ""), gpt["value"])
            for human, gpt in zip(
                record["conversations"][::2], record["conversations"][1::2], strict=True
            )
        ]
        for record in records
        if "image" in record
    }


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("demo")
    for name, share in (("plain", 0.0), ("mixed", scenes.Recipe().other_forms)):
        recipe = scenes.Recipe(captions=1, questions=600, held_out=24, other_forms=share)
        scenes.write(root / name, recipe)
    return root / "plain", root / "mixed"


def test_other_forms_are_the_lesser_share_of_the_training(trained_on: tuple[Path, Path]) -> None:
    plain, mixed = map(_asked, trained_on)
    assert plain.keys() == mixed.keys()
    conversations = [mixed[picture] for picture in mixed if plain[picture] != mixed[picture]]
    assert 0.05 < len(conversations) / len(mixed) < 0.15
    assert {len(turns) for turns in conversations} == {1}
    changed = [turns[0] for turns in conversations]
    choices = [turn for turn in changed if "\nC. " in turn[0]]
    checks = [turn for turn in changed if turn not in choices]
    assert 0.2 < len(choices) / len(changed) < 0.4
    assert all(f". {answer}\n" in text for text, answer in choices)
    shares = Counter(answer for _, answer in checks)
    assert set(shares) == {"Yes", "No"}
    assert 0.4 < shares["Yes"] / shares.total() < 0.6
    assert 0.2 < sum(text.startswith("Question: ") for text, _ in checks) / len(checks) < 0.4


def test_held_out_questions_are_of_the_kinds_asked_in_training(
    trained_on: tuple[Path, Path],
) -> None:
    def kind_of(text: str) -> str:
        words = {"kind": "kind", "Which": "colour", "many": "count"}
        return next(kind for word, kind in words.items() if word in text)

    plain, _ = trained_on
    kinds = Counter(kind_of(text) for turns in _asked(plain).values() for text, _ in turns)
    assert set(kinds) == set(scenes.ANSWERS)
    for kind, count in kinds.items():
        share = scenes.ASKED.count(kind) / len(scenes.ASKED)
        assert count / kinds.total() == pytest.approx(share, abs=0.1)


def test_held_out_questions_and_pictures_stay(trained_on: tuple[Path, Path]) -> None:
    plain, mixed = trained_on
    for path in plain.rglob("*"):
        if path.is_file() and path.name not in (scenes.QUESTIONS, scenes.RECIPE):
            assert path.read_bytes() == (mixed / path.relative_to(plain)).read_bytes()


def test_yes_no_questions_are_answered_from_the_scene() -> None:
    known = {drawing.name: drawing for drawing in drawings.catalogue()}
    scene = scenes.Scene((known["red apple"],) * 3, (0, 1, 2))
    checked = {asked.kind: asked.checked(asked.answer) for asked in scenes.questions(scene)}
    assert checked == {
        "kind": "Is the thing shown a food?",
        "colour": "Is the thing shown red?",
        "count": "Is the number of things three?",
    }


def test_registered_for_the_command_line(folder: Path) -> None:
    found = find_benchmarks(benchmarks.CHANCE)
    assert [dataset for one in found for dataset in one.datasets] == list(benchmarks.FILES)
    assert [missing for one in found for missing in one.missing(folder)] == []


@pytest.mark.parametrize("name", benchmarks.CHANCE)
def test_right_answers_score_100_through_opencompass(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Constant answers were scored by VLMEvalKit above; here the whole of our command's way."""
    from mmengine.config import Config
    from opencompass.registry import ICL_EVALUATORS, LOAD_DATASET

    benchmark = find_benchmarks([name])[0]
    shutil.copy(folder / f"{benchmark.datasets[0]}.tsv", tmp_path)
    config = Config(benchmark.config(benchmark.datasets[0], tmp_path))
    how = config.pop("eval_cfg")["evaluator"]
    config.pop("infer_cfg")
    test_set = LOAD_DATASET.build(config).test
    evaluator = ICL_EVALUATORS.build(how)
    evaluator._out_dir = str(tmp_path / "results")
    right = list(test_set["answer"])
    result = evaluator.score(right, test_set)
    assert result["score"] == 100
    assert all(sample["correct"] is True for sample in result["details"])
    result = evaluator.score([""] * len(right), test_set)
    assert result["score"] == 0
    assert len(result["failed"]) == len(right)


def test_nothing_here_needs_xtuner() -> None:
    code = (
        "import sys, dpa_xtuner.demo.benchmarks; assert 'vlmeval' not in sys.modules;"
        "import dpa_xtuner.demo.vlmeval_datasets; assert 'xtuner' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
