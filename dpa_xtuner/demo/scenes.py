"""Pictures made of OpenMoji drawings, with ornate captions and plain questions.

The captions all share one flowery manner that a chat model would never choose by itself, while
the words that matter (which thing, of what kind and colour, how many, where) can be read off the
picture only. That is the situation in which a language prior conflict shows. The questions ask
for kind, colour and number plainly, some of them as multiple choice or to be answered by yes or no.
They do not ask where a thing is: so short a training teaches none of that.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dpa_xtuner.demo.drawings import ATTRIBUTION, COLOURS, KINDS, Drawing, catalogue, render

PICTURE_SIZE = 96
CELL_SIZE = 32
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# What can be answered, by kind of question; its size gives the chance level.
ANSWERS: dict[str, tuple[str, ...]] = {
    "kind": tuple(sorted(KINDS)),
    "colour": COLOURS,
    "count": COUNTS,
}

# Held-out questions take turns, each kind about as often as it is asked in training.
ASKED = ("kind", "colour", "kind", "count", "kind", "colour", "kind", "colour")

CAPTIONS = "captions.json"
QUESTIONS = "questions.json"
HELD_OUT_CAPTIONS = "heldout_captions.json"
HELD_OUT_QUESTIONS = "heldout_questions.json"
RECIPE = "recipe.json"

TEXT_ONLY = (
    ("Say hello.", "Hello!"),
    ("What is two plus two?", "Four."),
    ("Name a day of the week.", "Monday."),
    ("Is water wet? Answer yes or no.", "Yes."),
    ("What is the opposite of hot?", "Cold."),
    ("Name the capital of France.", "Paris."),
    ("How many legs has a spider?", "Eight."),
    ("Thank you!", "You are welcome!"),
)


@dataclass(frozen=True)
class Recipe:
    """What the data is made from; the same recipe gives the same files.

    Attributes:
        captions: Training pictures with a caption.
        questions: Training pictures with questions.
        held_out: Pictures of held-out drawings, for captions and again for questions.
        turns: Questions asked of one training picture.
        other_forms: Share of the training pictures of which one question is asked, as multiple
            choice or to be answered by yes or no.
        text_only: Training conversations without a picture.
        seed: Seed of every choice.
        version: Raised when the code that makes the data, or the benchmarks beside it, changes.
    """

    captions: int = 2000
    questions: int = 2000
    held_out: int = 180
    turns: int = 4
    other_forms: float = 0.1
    text_only: int = 40
    seed: int = 0
    version: int = 12


@dataclass(frozen=True)
class Scene:
    """Drawings and where they are.

    `cells[i]` is the cell of `drawings[i]`, or None for a single drawing as large as the picture.
    """

    drawings: tuple[Drawing, ...]
    cells: tuple[int | None, ...]

    @property
    def places(self) -> tuple[int, ...]:
        """The cells of small drawings; empty for a single large one."""
        return tuple(cell for cell in self.cells if cell is not None)


@dataclass(frozen=True)
class Question:
    """A question with its short answer.

    Attributes:
        kind: What it asks for, a key of `ANSWERS`.
        text: The question.
        answer: The answer.
        check: The same as a yes/no question, with {} where a possible answer goes.
    """

    kind: str
    text: str
    answer: str
    check: str

    def checked(self, answer: str) -> str:
        """Return the yes/no question whether `answer` is the answer."""
        return self.check.format(_article(answer) if self.kind == "kind" else answer)


def draw(scene: Scene) -> np.ndarray:
    """Return the scene's pixels, (96, 96, 3) uint8 on white."""
    if scene.cells == (None,):
        return render(scene.drawings[0].code, PICTURE_SIZE)
    pixels = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 255, np.uint8)
    for drawing, cell in zip(scene.drawings, scene.places, strict=True):
        row, column = divmod(cell, 3)
        top, left = row * CELL_SIZE, column * CELL_SIZE
        pixels[top : top + CELL_SIZE, left : left + CELL_SIZE] = render(drawing.code, CELL_SIZE)
    return pixels


class Sampler:
    """Draws scenes from one side of the split.

    Args:
        held_out: Which side of the split the drawings come from.
        rng: Source of every choice.
    """

    def __init__(self, held_out: bool, rng: random.Random) -> None:
        self.rng = rng
        self.by_kind: dict[str, list[Drawing]] = {}
        for drawing in catalogue():
            if drawing.held_out == held_out:
                self.by_kind.setdefault(drawing.kind, []).append(drawing)

    def drawing(self, kind: str) -> Drawing:
        """Pick a drawing of a kind, those with a colour to ask for twice as often."""
        drawings = self.by_kind[kind]
        weights = [2 if drawing.colour else 1 for drawing in drawings]
        return self.rng.choices(drawings, weights)[0]

    def scene(self) -> Scene:
        """Pick a scene: a large single, one or several small ones, seldom two or three kinds."""
        form = self.rng.choices(("single", "alone", "several", "mixed"), (6, 2, 2, 1))[0]
        kinds = self.rng.sample(sorted(self.by_kind), self.rng.randint(2, 3))
        if form == "single":
            return Scene((self.drawing(kinds[0]),), (None,))
        if form != "mixed":
            count = 1 if form == "alone" else self.rng.randint(2, len(COUNTS))
            cells = self.rng.sample(range(len(CELLS)), count)
            return Scene((self.drawing(kinds[0]),) * count, tuple(sorted(cells)))
        cells = self.rng.sample(range(len(CELLS)), len(kinds))
        return Scene(tuple(self.drawing(kind) for kind in kinds), tuple(cells))

    def scene_with(self, kind: str, answer: str) -> tuple[Scene, Question]:
        """Pick a scene of which a question of this kind has this answer, and the question."""
        while True:
            scene = self.scene()
            asked = [q for q in questions(scene) if (q.kind, q.answer) == (kind, answer)]
            if asked:
                return scene, self.rng.choice(asked)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in the flowery manner of all captions."""
    opening = rng.choice(
        (
            "Behold, gentle reader, upon a field of purest white,",
            "Lo, where the silent page lies white as winter,",
            "Hark, for here in the quiet whiteness of the sheet,",
        )
    )
    closing = rng.choice(
        (
            "a sight to gladden every weary heart.",
            "as though some kindly muse had set it there.",
            "and the eye, well contented, asks no more.",
        )
    )
    first = scene.drawings[0]

    def noble(drawing: Drawing) -> str:
        tinge = f"{drawing.colour} " if drawing.colour else ""
        return f"{_article(tinge + drawing.kind)} that mortals name the {drawing.name}"

    if scene.cells == (None,):
        body = f"there reigns in lonely majesty {noble(first)},"
    elif len(set(scene.drawings)) == 1:
        places = ", ".join(CELLS[cell] for cell in scene.places)
        count = COUNTS[len(scene.cells) - 1]
        body = f"there dwell to the number of {count}, at {places}, {noble(first)},"
    else:
        parts = [
            f"at the {CELLS[cell]} {noble(drawing)}"
            for drawing, cell in sorted(
                zip(scene.drawings, scene.places, strict=True), key=lambda pair: pair[1]
            )
        ]
        body = f"there abide {'; '.join(parts)};"
    return f"{opening} {body} {closing}"


def questions(scene: Scene) -> list[Question]:
    """List everything that can be asked of a scene.

    No question tells the answer of another, or a conversation could be learned without the picture.
    """
    first = scene.drawings[0]

    def asked_of(drawing: Drawing, where: str) -> list[Question]:
        check = f"Is the thing {where} {{}}?"
        kind = Question("kind", f"What kind of thing is {where}?", drawing.kind, check)
        if drawing.colour is None:
            return [kind]
        text = f"Which colour is the thing {where}?"
        return [kind, Question("colour", text, drawing.colour, check)]

    if len(set(scene.drawings)) > 1:
        return [
            question
            for drawing, cell in zip(scene.drawings, scene.places, strict=True)
            for question in asked_of(drawing, f"at the {CELLS[cell]}")
        ]
    found = asked_of(first, "shown")
    if scene.cells[0] is not None:
        count = COUNTS[len(scene.cells) - 1]
        check = "Is the number of things {}?"
        found.append(Question("count", "How many things are there?", count, check))
    return found


def as_choice(text: str, options: Sequence[str]) -> str:
    """Word a question as VLMEvalKit's `ImageMCQDataset` does, but for the space at its end."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    end = "Please select the correct answer from the options above."
    return "\n".join([f"Question: {text}", "Options:", *lines, end])


def as_yes_no(text: str) -> str:
    """Word a yes/no question as VLMEvalKit's `NaturalBenchDataset` does."""
    return f"{text} Please answer Yes or No."


def in_other_form(question: Question, rng: random.Random) -> Question:
    """Ask the same as multiple choice, or ask to be answered by yes or no.

    A choice is answered by the option's text, which VLMEvalKit takes as well as its letter: to
    find the letter that stands before the answer is more than so small a model learns here.
    """
    others = [answer for answer in ANSWERS[question.kind] if answer != question.answer]
    if rng.random() < 0.3:
        options = [question.answer, *rng.sample(others, 3)]
        rng.shuffle(options)
        return replace(question, text=as_choice(question.text, options))
    answer = rng.choice(("Yes", "No"))
    text = question.checked(question.answer if answer == "Yes" else rng.choice(others))
    if rng.random() < 0.7:
        return replace(question, text=as_yes_no(text), answer=answer)
    return replace(question, text=as_choice(text, rng.sample(("Yes", "No"), 2)), answer=answer)


def _turn(text: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def _conversation(asked: Sequence[Question]) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for number, question in enumerate(asked):
        turns += _turn(("<image>\n" if number == 0 else "") + question.text, question.answer)
    return turns


class _Folder:
    """Collects pictures in a folder and names them."""

    def __init__(self, root: Path, bar: tqdm) -> None:
        self.root = root
        self.bar = bar
        (root / "images").mkdir(parents=True)

    def save(self, name: str, scene: Scene) -> str:
        path = f"images/{name}.png"
        # Level 1: the files are small anyway, and writing them is most of the time.
        Image.fromarray(draw(scene)).save(self.root / path, compress_level=1)
        self.bar.update()
        return path

    def write(self, name: str, records: list[dict]) -> None:
        (self.root / name).write_text(json.dumps(records, indent=0) + "\n")


def _caption_records(
    folder: _Folder, name: str, count: int, held_out: bool, seed: int
) -> list[dict]:
    rng = random.Random(f"{seed}-{name}")
    sampler = Sampler(held_out, rng)
    records = []
    for number in range(count):
        scene = sampler.scene()
        picture = folder.save(f"{name}-{number:05d}", scene)
        records.append(
            {
                "id": f"{name}-{number:05d}",
                "image": picture,
                "conversations": _turn("<image>", caption(scene, rng)),
            }
        )
    return records


def _question_records(folder: _Folder, recipe: Recipe) -> list[dict]:
    rng = random.Random(f"{recipe.seed}-questions")
    # Of its own, so that pictures and facts are the same whatever the share of other forms.
    forms = random.Random(f"{recipe.seed}-forms")
    sampler = Sampler(False, rng)
    records = []
    for number in range(recipe.questions):
        scene = sampler.scene()
        asked = questions(scene)
        asked = rng.sample(asked, min(recipe.turns, len(asked)))
        if forms.random() < recipe.other_forms:
            # Alone, since it is long, and a batch is padded to its longest conversation.
            asked = [in_other_form(asked[0], forms)]
        picture = folder.save(f"question-{number:05d}", scene)
        records.append(
            {
                "id": f"question-{number:05d}",
                "image": picture,
                "conversations": _conversation(asked),
            }
        )
    for number in range(recipe.text_only):
        records.append({"id": f"text-{number:05d}", "conversations": _turn(*rng.choice(TEXT_ONLY))})
    rng.shuffle(records)
    return records


def _held_out_question_records(folder: _Folder, recipe: Recipe) -> list[dict]:
    """One question a picture; kinds and, within a kind, answers take turns.

    Every answer to a kind of question weighs the same, so that no habit of answering beats
    chance.
    """
    rng = random.Random(f"{recipe.seed}-heldout")
    sampler = Sampler(True, rng)
    records = []
    kinds = ASKED
    for number in range(recipe.held_out):
        kind = kinds[number % len(kinds)]
        answer = ANSWERS[kind][number // len(kinds) % len(ANSWERS[kind])]
        scene, question = sampler.scene_with(kind, answer)
        records.append(
            {
                "id": f"heldout-{number:05d}",
                "image": folder.save(f"heldout-{number:05d}", scene),
                "kind": kind,
                "choices": len(ANSWERS[kind]),
                "conversations": _conversation([question]),
            }
        )
    return records


def is_written(root: Path, recipe: Recipe) -> bool:
    """Tell whether `root` holds the data of exactly this recipe."""
    path = root / RECIPE
    return path.is_file() and json.loads(path.read_text()) == asdict(recipe)


def write(root: Path, recipe: Recipe) -> bool:
    """Write pictures and records, whole or not at all.

    Args:
        root: Folder to make; replaced if it holds another recipe.
        recipe: What to make.

    Returns:
        True if the data was made, False if it was there already.
    """
    if is_written(root, recipe):
        return False
    temporary = root.with_name(f"{root.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    total = recipe.captions + recipe.questions + 2 * recipe.held_out
    with tqdm(total=total, desc="pictures", unit="") as bar:
        folder = _Folder(temporary, bar)
        folder.write(
            CAPTIONS, _caption_records(folder, "caption", recipe.captions, False, recipe.seed)
        )
        folder.write(QUESTIONS, _question_records(folder, recipe))
        folder.write(
            HELD_OUT_CAPTIONS,
            _caption_records(folder, "heldout-caption", recipe.held_out, True, recipe.seed),
        )
        folder.write(HELD_OUT_QUESTIONS, _held_out_question_records(folder, recipe))
    (temporary / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    (temporary / RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    temporary.rename(root)
    return True


def digest(root: Path) -> str:
    """Return a SHA-256 over every file of the data, names included."""
    total = hashlib.sha256()
    for path in _files(root):
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())
