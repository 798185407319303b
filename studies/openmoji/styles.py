"""Captions of the demo's scenes in three styles: plain, ornate and French."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from dpa_xtuner.demo import scenes
from dpa_xtuner.demo.drawings import COLOURS, KINDS, Drawing
from dpa_xtuner.demo.scenes import CELLS, COUNTS, Recipe, Scene
from dpa_xtuner.files import write_text


@dataclass(frozen=True)
class Language:
    """What a sentence about a scene is made of.

    Attributes:
        single: sentence about one or several different drawings, with {what}.
        several: sentence about the same drawing in one or several cells: {what}, {times}, {where}.
        thing: names a drawing with its article, colour and kind.
        times: "once", "twice", ... in the order of ``COUNTS``.
        last: word before the last of a list.
        places: "at the top left", ... in the order of ``CELLS``.
    """

    single: str
    several: str
    thing: Callable[[Drawing], str]
    times: tuple[str, ...]
    last: str
    places: tuple[str, ...] = tuple(f"at the {cell}" for cell in CELLS)

    def sentence(self, scene: Scene) -> str:
        """Describe a scene: which drawings there are, how often and where."""
        first = scene.drawings[0]
        if scene.cells == (None,):
            return self.single.format(what=self.thing(first))
        where = [self.places[cell] for cell in scene.places]
        if len(set(scene.drawings)) == 1:
            times = self.times[len(where) - 1]
            return self.several.format(
                what=self.thing(first), times=times, where=self._listed(where)
            )
        pairs = sorted(zip(scene.places, map(self.thing, scene.drawings), strict=True))
        return self.single.format(
            what=self._listed([f"{thing} {self.places[cell]}" for cell, thing in pairs])
        )

    def _listed(self, items: Sequence[str]) -> str:
        *others, last = items
        return f"{', '.join(others)} {self.last} {last}" if others else last


def english_thing(drawing: Drawing, called: str = "called") -> str:
    """Name a drawing: "a blue animal called dolphin"."""
    words = f"{drawing.colour} {drawing.kind}" if drawing.colour else drawing.kind
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {called} {drawing.name}"


# Noun with its article, in the order of KINDS; the article tells its gender.
_NOUNS = (
    "un animal", "une plante", "un aliment", "une boisson", "un visage", "une main",
    "une personne", "un véhicule", "un bâtiment", "un vêtement", "un instrument", "un ballon",
    "un outil", "une horloge", "un cœur", "une lune", "un nuage", "un livre", "une flèche",
    "un bouton", "une forme", "un signe du zodiaque", "un appareil",
)  # fmt: skip
# Masculine and feminine, in the order of COLOURS.
_ADJECTIVES = (
    ("rouge", "rouge"), ("orange", "orange"), ("jaune", "jaune"), ("vert", "verte"),
    ("bleu", "bleue"), ("violet", "violette"), ("rose", "rose"), ("marron", "marron"),
    ("gris", "grise"), ("noir", "noire"),
)  # fmt: skip


@cache
def french_names() -> dict[int, str]:
    """Return Unicode's French name of each code point, as the package ``emoji`` has it."""
    import emoji

    emoji.config.load_language("fr")
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = [ord(char) for char in text if char != "\ufe0f"]
        if len(points) == 1:
            found[points[0]] = entry["fr"].strip(":").replace("_", " ")
    return found


def french_thing(drawing: Drawing) -> str:
    """Name a drawing: "une plante verte appelée cactus"."""
    noun = _NOUNS[list(KINDS).index(drawing.kind)]
    feminine = noun.startswith("une ")
    colour = f" {_ADJECTIVES[COLOURS.index(drawing.colour)][feminine]}" if drawing.colour else ""
    name = french_names()[int(drawing.code.split("-")[0], 16)]
    return f"{noun}{colour} appelé{'e' if feminine else ''} {name}"


ENGLISH = Language(
    "The picture shows {what}.", "The picture shows {what} {times}: {where}.", english_thing,
    ("once", "twice", *(f"{count} times" for count in COUNTS[2:])), "and",
)  # fmt: skip
# Shorter than the demo's, with the thing near the picture (studies/README.md says why).
ORNATE = Language(
    "Behold {what}, O gentle reader!", "Behold {what} {times}, O gentle reader: {where}!",
    partial(english_thing, called="that mortals name"),
    ("in lonely majesty", "in glory doubled", *(f"in glory {n}-fold" for n in COUNTS[2:])),
    "and lo,",
)  # fmt: skip
FRENCH = Language(
    "L’image montre {what}.", "L’image montre {times} {what} : {where}.", french_thing,
    tuple(f"{n} fois" for n in ("une", "deux", "trois", "quatre", "cinq", "six", "sept",
                                "huit", "neuf")),
    "et",
    ("en haut à gauche", "en haut", "en haut à droite", "à gauche", "au centre", "à droite",
     "en bas à gauche", "en bas", "en bas à droite"),
)  # fmt: skip

STYLES = {"plain": ENGLISH.sentence, "ornate": ORNATE.sentence, "french": FRENCH.sentence}
"""Styles by name: from a scene to a caption."""


def write_data(folder: Path, recipe: Recipe) -> None:
    """Write the demo's pictures and questions, and ``STYLE.json`` with captions of each style.

    Args:
        folder: to create; pictures and questions that it holds are kept.
        recipe: sizes and seed.

    Raises:
        SystemExit: the demo draws its scenes in another way than this function replays.
    """
    scenes.write_scenes(folder, recipe)
    records = json.loads((folder / scenes.CAPTIONS).read_text(encoding="utf-8"))
    rng = random.Random(f"{recipe.seed}-caption")
    sampler = scenes.Sampler(False, rng)
    drawn = []
    for record in records:
        drawn.append(sampler.scene())
        if scenes.caption(drawn[-1], rng) != record["conversations"][1]["value"]:
            raise SystemExit(f"{folder}, {record['id']}: scenes.py draws other scenes than here")
    for style, caption in STYLES.items():
        talks = [
            record | {"conversations": [
                record["conversations"][0], {"from": "gpt", "value": caption(scene)}]}
            for record, scene in zip(records, drawn, strict=True)
        ]  # fmt: skip
        write_text(folder / f"{style}.json", json.dumps(talks, ensure_ascii=False, indent=0) + "\n")
