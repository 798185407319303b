"""Wrong answers with their pictures, on one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.files import write_text

SIDE = 280
"""Longest side of a picture on the page, in pixels."""

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Wrong answers</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
section { display: grid; grid-template-columns: {{ side }}px 1fr; gap: 0 1.5em;
  border-top: 1px solid #ccc; padding: 1em 0 }
img { max-width: {{ side }}px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0 }
dt { color: #777; font-size: 85% }
dd { margin: 0 0 .6em }
.given { color: #a00 }
.gold { color: #060 }
</style>
</head>
<body>
<h1>Wrong answers</h1>
{% for group in groups %}
<h2>{{ group.model }}, {{ group.dataset }}</h2>
<p>{{ group.shown|length }} of {{ group.wrong }} wrong answers to {{ group.asked }} questions,
evenly spread.</p>
{% for sample in group.shown %}
<section>
<div>
{% if sample.picture %}
<img src="{{ sample.picture }}" alt="picture of sample {{ sample.index }}">
{% else %}
no picture
{% endif %}
</div>
<dl>
<dt>question {{ sample.index }}</dt><dd><pre>{{ sample.question }}</pre></dd>
<dt>answer given</dt><dd class="given"><pre>{{ sample.prediction }}</pre></dd>
<dt>expected</dt><dd class="gold"><pre>{{ sample.answer }}</pre></dd>
</dl>
</section>
{% endfor %}
{% endfor %}
</body>
</html>
""")


def page(details: dict[tuple[str, str], list[dict]], count: int) -> str:
    """Make the page.

    Args:
        details: (model's label, data set) -> samples, as the evaluator lists them.
        count: Wrong answers to draw of each, evenly spread over all wrong ones.
    """
    groups = []
    for (model, dataset), samples in details.items():
        wrong = [s for s in samples if s["correct"] is not None and s["correct"] < 1]
        number = min(count, len(wrong))
        shown = [_sample(wrong[i * len(wrong) // number]) for i in range(number)]
        groups.append(
            dict(model=model, dataset=dataset, asked=len(samples), wrong=len(wrong), shown=shown)
        )
    return _PAGE.render(groups=groups, side=SIDE) + "\n"


def save(details: dict[tuple[str, str], list[dict]], count: int, file: Path) -> None:
    """Write the page whole or not at all; see `page`."""
    write_text(file, page(details, count))


def _sample(detail: dict) -> dict:
    said = str(detail["prediction"])
    if said.startswith(NO_ANSWER):
        said = f"none{said.removeprefix(NO_ANSWER)}"
    return {**detail, "prediction": said, "picture": _embedded(detail["image"])}


def _embedded(path: str | None) -> str:
    """A thumbnail as a data URI; nothing where there is no picture, or a broken one."""
    try:
        with Image.open(path or "") as picture:
            small = picture.convert("RGB")
    except Exception:  # the answer says what was wrong with it
        return ""
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
