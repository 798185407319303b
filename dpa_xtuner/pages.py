"""HTML pages that need no other file: templates, and pictures inside them."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from dpa_xtuner.pictures import as_rgb

SIDE = 280
"""Longest side of a picture on a page, in pixels."""


def render(template: Path, **values) -> str:
    """Fill in a template; whatever is filled in is escaped.

    Args:
        template: a Jinja file; it may import ``tokens.html``, which colours tokens.
        values: its variables, besides ``side``, which is :data:`SIDE`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.from_string(template.read_text(encoding="utf-8"))
    return page.render(side=SIDE, **values) + "\n"


def embedded(picture_file: str | Path | io.BytesIO | None) -> str:
    """Make a thumbnail as a data URI; an empty text if the picture is broken or missing."""
    try:
        with Image.open(picture_file or "") as picture:
            small = as_rgb(picture)
    except Exception:  # the page says what is wrong with it
        return ""
    small.thumbnail((SIDE, SIDE))
    return data_uri(small, "jpeg", quality=85)


def data_uri(picture: Image.Image, kind: str, **options) -> str:
    """Put a picture into an address.

    Args:
        picture: the picture.
        kind: format of the file, "jpeg" or "png".
        options: of Pillow's writer.
    """
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
