"""The methods by name: the stages and the loss of each."""

from dataclasses import dataclass

from dpa_xtuner.errors import DPAError, nearest


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        proxy: whether a proxy LLM is trained, from which align starts. Without one there are only
            the stages align and tune, and align starts from the original LLM.
        loss: weighting scheme of align and tune, unless they name one.
    """

    proxy: bool
    loss: str


METHODS = {
    "vanilla": Method(proxy=False, loss="uniform"),
    "pmo": Method(proxy=True, loss="uniform"),
    "cmo": Method(proxy=False, loss="cmo"),
    "dpa": Method(proxy=True, loss="cmo"),
    "cal": Method(proxy=False, loss="cal"),
}


def find_method(name: str) -> Method:
    """Find a method by its name.

    Raises:
        DPAError: there is none.
    """
    if name not in METHODS:
        raise DPAError(
            f"{name!r} is not a known method{nearest(str(name), METHODS) or '.'} Known: "
            f"{', '.join(METHODS)}."
        )
    return METHODS[name]
