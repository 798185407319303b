"""A picture and its caption: rows of a table, or JSON objects of the same two keys."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.data.formats.turns import picture_names, pictures_of
from dpa_xtuner.data.records import Malformed, Parts, refuse_other_marks

IMAGES = (
    "image", "images", "image_path", "image_file", "img_path", "file_name", "filename", "filepath",
)  # fmt: skip
CAPTIONS = ("caption", "text", "description", "title", "blip_caption")
# With one of these, a "text" may be a question and is no caption for sure.
_NO_CAPTION = re.compile(
    r".*(?:question|answer|instruct|prompt|response|option|choice|categor|label|query|dialog"
    r"|conversation|bbox).*|input|output|prefix|suffix|messages|texts|turns|target|ground_truth",
    re.IGNORECASE,
)


def reserved(names: Iterable[str]) -> list[str]:
    """Those of a record's keys that captions don't have."""
    return [name for name in names if _NO_CAPTION.fullmatch(name)]


def read(item: Mapping[str, Any]) -> Parts:
    """Read a record.

    Raises:
        Malformed: it is not as the format says.
    """
    image, key = (next(name for name in names if name in item) for names in (IMAGES, CAPTIONS))
    caption = item[key]
    if not isinstance(caption, str):
        raise Malformed(f"malformed caption: expected a string under {key!r}")
    refuse_other_marks(caption, True)
    images = pictures_of(item) if image in IMAGES[:2] else picture_names(item[image])
    if not images:
        raise Malformed("caption without an image")
    return Parts(images, None, ((DEFAULT_IMAGE_TOKEN * len(images), caption),))
