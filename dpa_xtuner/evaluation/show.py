"""Shows wrong answers with their pictures on one HTML page that needs no other file."""

import base64
import io
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.report import Details
from dpa_xtuner.pictures import as_rgb

SIDE = 280
"""Longest side of a picture on the page, in pixels."""

_TEMPLATE = Path(__file__).with_name("wrong_answers.html")


def page(details: Details, count: int) -> str:
    """Make the page.

    Args:
        details: the samples of each model and data set.
        count: the number of wrong answers to show of each data set, evenly spread over all.
    """
    groups = []
    for (model, dataset), samples in details.items():
        wrong = [s for s in samples if s["correct"] is not None and s["correct"] < 1]
        number = min(count, len(wrong))
        shown = [_sample(wrong[i * len(wrong) // number]) for i in range(number)]
        groups.append(
            dict(model=model, dataset=dataset, asked=len(samples), wrong=len(wrong), shown=shown)
        )
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(groups=groups, side=SIDE) + "\n"


def _sample(detail: dict) -> dict:
    answer = str(detail["prediction"])
    if answer.startswith(NO_ANSWER):
        answer = f"none{answer.removeprefix(NO_ANSWER)}"
    return {**detail, "prediction": answer, "picture": _embedded(detail["image"])}


def _embedded(path: str | None) -> str:
    """Make a thumbnail as a data URI; an empty text if the picture is broken or missing."""
    try:
        with Image.open(path or "") as picture:
            small = as_rgb(picture)
    except Exception:  # the answer says what is wrong with it
        return ""
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
