"""Held-out OpenMoji questions as benchmarks: files in VLMEvalKit's format.

Training has seen none of their drawings. A pair asks one question about two pictures, a group two
questions about two, and the answers differ. So without looking, as in MMVP and NaturalBench, half
of the answers are right, but no pair and no group.
"""

import base64
import csv
import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dpa_xtuner.demo.scenes import ANSWERS, Question, Sampler, Scene, draw, questions
from dpa_xtuner.evaluation.benchmarks import Benchmark, DataFile, register_benchmark
from dpa_xtuner.files import whole_folder

COMPARED = tuple(ANSWERS)
# How often each answer is right. Colours, which the model sees best, are asked more often.
SHORT = {"kind": 1, "colour": 2}
COUNT = {"count": 6}

TableRow = dict[str, str | int]


def _row(scene: Scene, asked: Question, /, **columns: str) -> TableRow:
    """Make one line: VLMEvalKit's columns, with the picture as base64 of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(draw(scene)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    row: TableRow = {"image": picture, "question": asked.text, "answer": asked.answer}
    return row | {"category": asked.kind} | columns


def _contrast(sampler: Sampler, kind: str) -> tuple[tuple[Scene, Question], ...]:
    """Pick two scenes, and a question of this kind that they answer differently."""
    while True:
        one, other = sampler.scene(), sampler.scene()
        for first in questions(one):
            for second in questions(other):
                same = first.kind == second.kind == kind and first.text == second.text
                if same and first.answer != second.answer:
                    return (one, first), (other, second)


def choice(sampler: Sampler) -> list[TableRow]:
    """Make 60 questions with four options; the right one and its letter take turns."""
    rows = []
    for number in range(60):
        kind = COMPARED[number % 3]
        answers = ANSWERS[kind]
        scene, question = sampler.scene_with(kind, answers[number // 3 % len(answers)])
        options = sampler.rng.sample([x for x in answers if x != question.answer], 3)
        options.insert(number % 4, question.answer)
        letters = dict(zip("ABCD", options, strict=True))
        rows.append(_row(scene, question, **letters, answer="ABCD"[number % 4]))
    return rows


def pairs(sampler: Sampler) -> list[TableRow]:
    """Make 30 pairs of lines like MMVP's: one yes/no question, two pictures, options A and B."""
    rows = []
    for number in range(30):
        options = ("Yes", "No") if number % 2 else ("No", "Yes")
        scenes = _contrast(sampler, COMPARED[number % len(COMPARED)])
        text = scenes[0][1].checked(scenes[0][1].answer)
        pair = [
            _row(
                *asked, question=text, A=options[0], B=options[1], answer="AB"[options.index(right)]
            )
            for asked, right in zip(scenes, ("Yes", "No"), strict=True)
        ]
        rows += sampler.rng.sample(pair, 2)
    return rows


def groups(sampler: Sampler) -> list[TableRow]:
    """Make 15 groups of four lines like NaturalBench's, in its order.

    Question 0 of picture 0 (yes) and of picture 1 (no), question 1 of picture 0 (no) and of
    picture 1 (yes).
    """
    rows = []
    for number in range(15):
        scenes = _contrast(sampler, COMPARED[number % len(COMPARED)])
        for _, asked in scenes:
            text = asked.checked(asked.answer)
            for scene, shown in scenes:
                right = "Yes" if shown is asked else "No"
                rows.append(_row(scene, shown, question=text, answer=right, type="yes_no"))
    return rows


def _short(times: dict[str, int], sampler: Sampler) -> list[TableRow]:
    """Make questions like those of training, with answers of a word or two."""
    kinds = [kind for kind, count in times.items() for _ in range(count)]
    asked = [sampler.scene_with(kind, answer) for kind in kinds for answer in ANSWERS[kind]]
    sampler.rng.shuffle(asked)
    return [_row(scene, question) for scene, question in asked]


FILES: dict[str, Callable[[Sampler], list[TableRow]]] = {
    "OpenMojiChoice": choice,
    "OpenMojiPairs": pairs,
    "OpenMojiGroups": groups,
    "OpenMojiShort": partial(_short, SHORT),
    "OpenMojiCount": partial(_short, COUNT),
}


def _short_chance(times: dict[str, int]) -> float:
    rows = sum(count * len(ANSWERS[kind]) for kind, count in times.items())
    return 100 * sum(times.values()) / rows


# Scores, 0 - 100, of choosing at random: one of four options, both of a pair, all of a group, one
# of ``ANSWERS``.
CHANCE = {
    "openmoji-choice": 100 / 4,
    "openmoji-pairs": 100 / 2**2,
    "openmoji-groups": 100 / 2**4,
    "openmoji-short": _short_chance(SHORT),
    "openmoji-count": _short_chance(COUNT),
}


def _register(name: str, kind: str, **how: Any) -> None:
    file = DataFile(f"OpenMoji{name.capitalize()}")
    module = "dpa_xtuner.demo.vlmeval_datasets"
    how |= {"module": module, "chance": CHANCE[f"openmoji-{name}"]}
    register_benchmark(Benchmark(f"openmoji-{name}", f"OpenMoji {name}", kind, (file,), **how))


_register("choice", "general", judge="exact matching")
_register("pairs", "vision-centric", group=2, judge="exact matching")
_register("groups", "vision-centric", group=4, metric="G_Acc")
_register("short", "general", scale=1)
_register("count", "vision-centric", scale=1)


def write_benchmarks(folder: Path, seed: int) -> bool:
    """Write the files, all or none.

    Args:
        folder: folder to create, in the folder of the demo's data.
        seed: seed of every choice.

    Returns:
        True if the files were made, False if the folder existed already.
    """
    if folder.is_dir():
        return False
    with whole_folder(folder) as unfinished:
        for name, make in FILES.items():
            rows = make(Sampler(True, random.Random(f"{seed}-{name}")))
            with open(unfinished / f"{name}.tsv", "w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(
                    file, ["index", *rows[0]], delimiter="\t", lineterminator="\n"
                )
                table.writeheader()
                table.writerows({"index": i} | row for i, row in enumerate(rows, 1))
    return True
