"""A picture as the model sees it: one function for training, check, evaluation and exported models.

| picture                                | becomes                                                 |
|----------------------------------------|---------------------------------------------------------|
| turned by its EXIF orientation         | upright                                                 |
| with transparency (also of a palette)  | composed on a background, white by default              |
| grey of 16 bits                        | scaled by its type's range, 0 to 65535                  |
| 32-bit integers, or floats             | scaled from its own smallest and largest value          |
| floats that are not finite             | refused                                                 |
| EPS, which is a program to run         | refused                                                 |
| black and white, grey, palette, CMYK   | RGB, as Pillow converts it                              |
| several frames                         | the first                                               |

Only Pillow and numpy are imported here.
"""

import functools

import numpy as np
from PIL import Image, ImageColor

WHITE = "white"
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # orientations that change width and height
_GREY_16 = 65535
_PHOTOMETRIC = 262  # the TIFF tag; 0 where the smallest value is white
_IN_16_BITS = ("PNG", "PPM")  # files whose grey of 16 bits Pillow may open as 32-bit integers


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of a picture that :func:`as_rgb` gives, from its header alone."""
    width, height = picture.size
    return (height, width) if _orientation(picture) in _LYING else (width, height)


def as_rgb(picture: Image.Image, background: str = WHITE) -> Image.Image:
    """Turn a picture upright and into RGB; see the table above.

    Args:
        picture: as ``PIL.Image.open`` gives it.
        background: colour behind what is transparent, by a name or as "#rrggbb".

    Returns:
        A picture of the mode RGB and of :func:`upright_size`.

    Raises:
        ValueError: it can't be shown in 8 bits, is a program, or the colour is unknown.
    """
    if picture.format == "EPS":  # Pillow would run it by Ghostscript
        raise ValueError("EPS is a program that draws: convert it to PNG")
    orientation = _orientation(picture)
    rgb = _colours(picture, background)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def padded(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return the picture in the middle of a square, as XTuner's ``expand2square`` puts it.

    If the margins can't be equal, the left or upper one is the smaller.
    """
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    left, upper = ((side - length) // 2 for length in picture.size)
    square.paste(picture, (left, upper))
    return square


@functools.cache
def colour_of(background: str) -> tuple[int, ...]:
    """Return the RGB values of a colour, 0 to 255.

    Raises:
        ValueError: there is no such colour.
    """
    try:
        return ImageColor.getcolor(background, "RGB")  # type: ignore[return-value]
    except ValueError:
        raise ValueError(
            f"{background!r} is no colour: give a name such as 'white', or '#rrggbb'"
        ) from None


def _orientation(picture: Image.Image) -> int:
    """Read the EXIF orientation, 1 for none; a PNG's counts if it stands before the pixels."""
    if picture.format == "TIFF":  # which Pillow turns itself
        return 1
    try:
        # Not PngImageFile's own, which decodes the picture to look behind it.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data raise almost anything; the picture may still be whole
        return 1


def _colours(picture: Image.Image, background: str) -> Image.Image:
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in _IN_16_BITS):
        return _grey_16(picture, background)
    if mode in ("I", "F"):
        return _stretched(np.asarray(picture))
    picture.load()  # a palette's transparency may stand behind the header
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (*colour_of(background), 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _grey_16(picture: Image.Image, background: str) -> Image.Image:
    values = np.asarray(picture)
    from_white = picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore
    grey = _grey(values, *((_GREY_16, 0) if from_white else (0, _GREY_16)))
    transparent = picture.info.get("transparency")
    if transparent is not None:
        grey.paste(colour_of(background), None, Image.fromarray(values == transparent))
    return grey


def _stretched(values: np.ndarray) -> Image.Image:
    """Grey values of any range; a picture of one value keeps it where that is one of 8 bits."""
    if not np.isfinite(values).all():
        raise ValueError("its values are not all finite")
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = (0, 255) if 0 <= low <= 255 else (low - 1, low + 1)
    return _grey(values, low, high)


def _grey(values: np.ndarray, low: float, high: float) -> Image.Image:
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
