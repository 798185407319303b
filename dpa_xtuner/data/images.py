"""Load a picture into the tensors that the visual encoder takes."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpa_xtuner.data.places import open_bytes, short
from dpa_xtuner.data.tiles import Tiling
from dpa_xtuner.pictures import WHITE, as_rgb, padded, upright_size

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_MOST_PIXELS = 178_956_970  # Pillow's own limit, held against the padded square too
_THINNEST = 200  # longest by shortest side; the processor scales the shortest one up


class ImageProblem(Exception):
    """An image that is missing or broken; its text is "kind: details with the path"."""


def read_size(path: str | Path) -> tuple[int, int]:
    """Read an image's (width, height) in pixels from its header.

    Raises:
        ImageProblem: the file is missing or no image. What lies behind the header is not read.
    """
    with _opened(path) as image:
        return upright_size(image)


def load_image(
    path: str | Path,
    pad_to_square: bool,
    size: tuple[int, int] | None = None,
    background: str = WHITE,
) -> Image.Image:
    """Open and decode an image.

    Args:
        path: the image file, or another name of :mod:`dpa_xtuner.data.places`.
        pad_to_square: whether it is to be padded; then it must not be huge as a square, else it
            must not be too thin to be scaled.
        size: (width, height) that it had when it was measured; None where it was not.
        background: colour behind what is transparent.

    Returns:
        The whole image, decoded, upright, in RGB (:func:`dpa_xtuner.pictures.as_rgb`), not padded.

    Raises:
        ImageProblem: the file is missing, is no image that can be decoded, is out of shape, or has
            another size than it had.
    """
    with _opened(path) as image:
        found = upright_size(image)
        if size is not None and found != size:
            raise ImageProblem(f"changed image: {short(str(path))} {found}, was {size}")
        longest, shortest = max(found), min(found)
        if pad_to_square and longest**2 > _MOST_PIXELS:
            wrong = f"padded to a square, it has more than {_MOST_PIXELS} pixels"
        elif not pad_to_square and longest > _THINNEST * shortest:
            wrong = f"it is more than {_THINNEST} times as long as wide"
        else:
            return as_rgb(image, background)
        raise ImageProblem(f"image out of shape: {short(str(path))} {found}: {wrong}")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(open_bytes(str(path))) as image:
            yield image
    except FileNotFoundError:
        raise ImageProblem(f"missing image: {short(str(path))}") from None
    except _BROKEN as error:
        what = f"{type(error).__name__}: {error}"
        raise ImageProblem(f"broken image: {short(str(path))} ({what})") from error


def load_pixels(
    path: str | Path,
    image_processor: Any,
    pad_to_square: bool,
    background: str = WHITE,
    tiling: Tiling | None = None,
    size: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """Load an image and prepare it as stock ``LLaVADataset`` does, or cut into tiles.

    Of tiles, the processor only normalises them: where it would scale or crop (as DINOv2's does,
    which cuts off a margin), the tiles would no longer join.

    Args:
        path: as of :func:`load_image`.
        image_processor: a Hugging Face image processor.
        pad_to_square: whether to pad it to a square in the processor's mean colour first. Of a
            tiled image, whether the thumbnail, or an image of a single tile, is padded; else it is
            stretched, as in InternVL.
        background: colour behind what is transparent.
        tiling: how it is cut; None leaves it whole.
        size: as of :func:`load_image`; of a tiled image, the size that its tokens were counted for.

    Returns:
        (3, H, W) float32 of the whole image; or ``tiling.count(size)`` tensors of shape
        (3, tile_size, tile_size), the thumbnail last.

    Raises:
        ImageProblem: the file is missing or broken, or the image has another size now.
    """
    image = load_image(path, pad_to_square, size, background)
    colour = None
    if pad_to_square:  # the mean colour
        colour = tuple(int(x * 255) for x in image_processor.image_mean)
    left_out: dict[str, bool] = {}
    if tiling is not None:
        pictures = tiling.cut(image, colour)
        steps = [name for name in ("do_resize", "do_center_crop") if hasattr(image_processor, name)]
        left_out = dict.fromkeys(steps, False)
    else:
        pictures = [image if colour is None else padded(image, colour)]
    # Of an image that is 1 or 3 pixels high it can't be told on which side its channels are.
    pixels = image_processor.preprocess(
        pictures, return_tensors="pt", input_data_format="channels_last", **left_out
    )
    return list(pixels["pixel_values"].float())
