"""Loads an image file into the tensor that the visual encoder takes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from xtuner.dataset.utils import expand2square

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_MOST_PIXELS = 178_956_970  # Pillow's own limit, held against the padded square too
_THINNEST = 200  # longest by shortest side; the processor scales the shortest one up


class ImageProblem(Exception):
    """An image that is missing or broken; its text is "kind: details with the path"."""


def load_image(path: str | Path, pad_to_square: bool) -> Image.Image:
    """Opens and decodes an image.

    Args:
        path: The image file.
        pad_to_square: Whether it is to be padded; then it must not be huge as a square, else it
            must not be too thin to be scaled.

    Returns:
        The whole image, decoded, in RGB, not padded.

    Raises:
        ImageProblem: The file is missing, is no image that can be decoded, or is out of shape.
    """
    try:
        with Image.open(path) as image:
            longest, shortest = max(image.size), min(image.size)
            if (pad_to_square and longest**2 > _MOST_PIXELS) or (
                not pad_to_square and longest > _THINNEST * shortest
            ):
                raise ImageProblem(f"image out of shape: {path} {image.size}")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ImageProblem(f"missing image: {path}") from None
    except _BROKEN as error:
        raise ImageProblem(f"broken image: {path} ({type(error).__name__}: {error})") from error


def load_pixels(path: str | Path, image_processor: Any, pad_to_square: bool) -> torch.Tensor:
    """Loads an image and prepares it as stock `LLaVADataset` does.

    Args:
        path: The image file.
        image_processor: A Hugging Face image processor.
        pad_to_square: Whether to pad it to a square in the processor's mean colour first.

    Returns:
        Pixel values of shape (3, H, W), float32.

    Raises:
        ImageProblem: The file is missing or broken, or the processor cannot take it.
    """
    image = load_image(path, pad_to_square)
    if pad_to_square:
        image = expand2square(image, tuple(int(x * 255) for x in image_processor.image_mean))
    try:
        pixels = image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    except ValueError as error:  # an image of 1 x N pixels, whose colour axis cannot be told
        raise ImageProblem(f"unusable image: {path} {image.size} ({error})") from error
    return pixels.float()
