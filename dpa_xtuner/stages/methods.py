"""The methods by name: which stages each has, and how its loss weighs the tokens."""

from dataclasses import dataclass

from dpa_xtuner.errors import DPAError, nearest


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Attributes:
        proxy: whether a proxy LLM is trained, for align to start from; without one there are
            the stages align and tune alone, and align starts from the original LLM.
        loss: weighting scheme of align and tune, where they name none.
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
    """A method by name.

    Raises:
        DPAError: there is none of that name.
    """
    if name not in METHODS:
        raise DPAError(
            f"{name!r} is not a known method{nearest(str(name), METHODS) or '.'} Known: "
            f"{', '.join(METHODS)}."
        )
    return METHODS[name]
