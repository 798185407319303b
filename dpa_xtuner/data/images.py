"""Load an image file into the tensors that the visual encoder takes."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from xtuner.dataset.utils import expand2square

from dpa_xtuner.data.tiles import Tiling

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
        return image.size


def load_image(
    path: str | Path, pad_to_square: bool, size: tuple[int, int] | None = None
) -> Image.Image:
    """Open and decode an image.

    Args:
        path: the image file.
        pad_to_square: whether it is to be padded; then it must not be huge as a square, else it
            must not be too thin to be scaled.
        size: (width, height) that it had when it was measured; None where it was not.

    Returns:
        The whole image, decoded, in RGB, not padded.

    Raises:
        ImageProblem: the file is missing, is no image that can be decoded, is out of shape, or has
            another size than it had.
    """
    with _opened(path) as image:
        if size is not None and image.size != size:
            raise ImageProblem(f"changed image: {path} {image.size}, was {size}")
        longest, shortest = max(image.size), min(image.size)
        if longest**2 > _MOST_PIXELS if pad_to_square else longest > _THINNEST * shortest:
            raise ImageProblem(f"image out of shape: {path} {image.size}")
        return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ImageProblem(f"missing image: {path}") from None
    except _BROKEN as error:
        raise ImageProblem(f"broken image: {path} ({type(error).__name__}: {error})") from error


def load_pixels(path: str | Path, image_processor: Any, pad_to_square: bool) -> torch.Tensor:
    """Load an image and prepare it as stock ``LLaVADataset`` does.

    Args:
        path: the image file.
        image_processor: a Hugging Face image processor.
        pad_to_square: whether to pad it to a square in the processor's mean colour first.

    Returns:
        Pixel values of shape (3, H, W), float32.

    Raises:
        ImageProblem: the file is missing or broken, or the processor can't take it.
    """
    image = load_image(path, pad_to_square)
    if pad_to_square:
        image = expand2square(image, _mean_colour(image_processor))
    try:
        pixels = image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    except ValueError as error:  # an image of 1 x N pixels, whose colour axis cannot be told
        raise ImageProblem(f"unusable image: {path} {image.size} ({error})") from error
    return pixels.float()


def load_tiles(
    path: str | Path,
    image_processor: Any,
    pad_to_square: bool,
    tiling: Tiling,
    size: tuple[int, int],
) -> list[torch.Tensor]:
    """Load an image, cut it into tiles and prepare these.

    The processor only normalises them: where it would scale or crop (as DINOv2's does, which cuts
    off a margin), the tiles would no longer join.

    Args:
        path: the image file.
        image_processor: a Hugging Face image processor.
        pad_to_square: whether the thumbnail, or an image of a single tile, is padded to a square in
            the processor's mean colour. Else it is stretched, as in InternVL.
        tiling: how it is cut.
        size: (width, height) that the image had when its tokens were counted.

    Returns:
        ``tiling.count(size)`` tensors of shape (3, tile_size, tile_size), float32, the thumbnail
        last.

    Raises:
        ImageProblem: the file is missing or broken, or the image has another size now.
    """
    image = load_image(path, pad_to_square, size)
    tiles = tiling.cut(image, _mean_colour(image_processor) if pad_to_square else None)
    steps = [name for name in ("do_resize", "do_center_crop") if hasattr(image_processor, name)]
    left_out = dict.fromkeys(steps, False)
    pixels = image_processor.preprocess(tiles, return_tensors="pt", **left_out)["pixel_values"]
    return list(pixels.float())


def _mean_colour(image_processor: Any) -> tuple[int, ...]:
    return tuple(int(x * 255) for x in image_processor.image_mean)
