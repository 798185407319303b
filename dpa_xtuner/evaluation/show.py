"""Shows wrong answers with their pictures on one HTML page that needs no other file."""

from pathlib import Path

from dpa_xtuner import pages
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.report import Details

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
    return pages.render(_TEMPLATE, groups=groups)


def _sample(detail: dict) -> dict:
    answer = str(detail["prediction"])
    if answer.startswith(NO_ANSWER):
        answer = f"none{answer.removeprefix(NO_ANSWER)}"
    return {**detail, "prediction": answer, "picture": pages.embedded(detail["image"])}
