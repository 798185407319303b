"""Pictures made of OpenMoji drawings, with ornate captions and plain questions.

All captions share one flowery style that no chat model would choose by itself. The words that
matter (which thing, its kind and colour, how many, where) can only be read off the picture. In this
situation a language prior conflict shows. The questions plainly ask for kind, colour and number,
some of them as multiple choice or with yes or no. They don't ask where a thing is: the demo is too
short to learn that.
"""

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

# Possible answers by kind of question; their number gives the chance level.
ANSWERS: dict[str, tuple[str, ...]] = {
    "kind": tuple(sorted(KINDS)),
    "colour": COLOURS,
    "count": COUNTS,
}

# The kinds of held-out questions in turn, each about as often as in training.
ASKED = ("kind", "colour", "kind", "count", "kind", "colour", "kind", "colour")

CAPTIONS = "captions.json"
QUESTIONS = "questions.json"
HELD_OUT_CAPTIONS = "heldout_captions.json"
HELD_OUT_QUESTIONS = "heldout_questions.json"
RECIPE_FILE = "recipe.json"

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
    """The recipe of the data; the same recipe gives the same files.

    Attributes:
        captions: training pictures with a caption.
        questions: training pictures with questions.
        held_out: pictures of held-out drawings, for captions and again for questions.
        turns: questions about one training picture.
        other_forms: fraction of the training pictures with a single question, as multiple choice
            or with yes or no.
        text_only: training conversations without a picture.
        seed: seed of every choice.
        version: raised when the code that makes the data or the benchmarks changes.
    """

    captions: int = 500
    questions: int = 1200
    held_out: int = 120
    turns: int = 4
    other_forms: float = 0.1
    text_only: int = 40
    seed: int = 0
    version: int = 13


@dataclass(frozen=True)
class Scene:
    """Drawings and their cells.

    ``cells[i]`` is the cell of ``drawings[i]``, or None for a single drawing that fills the
    picture.
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
        kind: what it asks for, a key of ``ANSWERS``.
        text: the question.
        answer: the answer.
        check: the same as a yes/no question, with {} for a possible answer.
    """

    kind: str
    text: str
    answer: str
    check: str

    def checked(self, answer: str) -> str:
        """Return the yes/no question that asks whether ``answer`` is right."""
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
        held_out: which side of the split the drawings come from.
        rng: source of every choice.
    """

    def __init__(self, held_out: bool, rng: random.Random) -> None:
        self.rng = rng
        self.by_kind: dict[str, list[Drawing]] = {}
        for drawing in catalogue():
            if drawing.held_out == held_out:
                self.by_kind.setdefault(drawing.kind, []).append(drawing)

    def drawing(self, kind: str) -> Drawing:
        """Pick a drawing of a kind, those with a colour twice as often."""
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
        """Pick a scene and a question of this kind that has this answer."""
        while True:
            scene = self.scene()
            asked = [q for q in questions(scene) if (q.kind, q.answer) == (kind, answer)]
            if asked:
                return scene, self.rng.choice(asked)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in the flowery style of all captions."""
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
        """Name a drawing in that style."""
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
    """List all possible questions about a scene.

    No question gives away the answer of another: else the model could learn without the picture.
    """
    first = scene.drawings[0]

    def asked_of(drawing: Drawing, where: str) -> list[Question]:
        """List the questions about one drawing."""
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
    """Word a question as VLMEvalKit's ``ImageMCQDataset`` does, without the space at its end."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    end = "Please select the correct answer from the options above."
    return "\n".join([f"Question: {text}", "Options:", *lines, end])


def as_yes_no(text: str) -> str:
    """Word a yes/no question as VLMEvalKit's ``NaturalBenchDataset`` does."""
    return f"{text} Please answer Yes or No."


def in_other_form(question: Question, rng: random.Random) -> Question:
    """Ask the same as multiple choice, or as a yes/no question.

    The answer of a choice is the option's text, which VLMEvalKit accepts like its letter: so small
    a model does not learn here to find the letter before the answer.
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
        # Level 1: the files are small anyway, and compressing them takes most of the time.
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
    # A second generator, so that pictures don't depend on the fraction of other forms.
    forms = random.Random(f"{recipe.seed}-forms")
    sampler = Sampler(False, rng)
    records = []
    for number in range(recipe.questions):
        scene = sampler.scene()
        asked = questions(scene)
        asked = rng.sample(asked, min(recipe.turns, len(asked)))
        if forms.random() < recipe.other_forms:
            # A single turn, since it is long, and a batch is padded to its longest conversation.
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
    """Make one question for each picture; kinds and, within a kind, answers take turns.

    All answers of a kind are equally frequent, so that no habit of answering beats chance.
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
    """Tell whether ``root`` holds the data of exactly this recipe."""
    path = root / RECIPE_FILE
    return path.is_file() and json.loads(path.read_text()) == asdict(recipe)


def write_scenes(root: Path, recipe: Recipe) -> bool:
    """Write pictures and records, completely or not at all.

    Args:
        root: folder to create; replaced if it holds another recipe.
        recipe: the recipe.

    Returns:
        True if the data was made, False if it existed already.
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
    (temporary / RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
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
