"""What a callable declares of its arguments: which there are, and of what types."""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin

from dpa_xtuner.errors import nearest


def parameters(call: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters by name, and whether any other keyword is taken too.

    A class that passes ``**kwargs`` on has its parents' parameters as well.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in _calls(call):
        kinds = set()
        for name, parameter in inspect.signature(each).parameters.items():
            kinds.add(parameter.kind)
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                kind = _resolved(parameter.annotation, each)
                found.setdefault(name, parameter.replace(annotation=kind))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found, False
    return found, True


def _calls(call: Callable) -> list[Callable]:
    return [c.__init__ for c in call.__mro__[:-1]] if inspect.isclass(call) else [call]


def _resolved(annotation: Any, call: Callable) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(call), "__globals__", {}))
    except Exception:  # a name that is there for type checkers alone
        return inspect.Parameter.empty


def taken(call: Callable) -> set[str]:
    """Names that a callable takes, those that it looks up in its ``**kwargs`` included.

    Such a lookup, ``kwargs.pop("revision")``, names its key as a constant of the code.
    """
    names = set(parameters(call)[0])
    for each in _calls(call):
        plain = inspect.unwrap(getattr(each, "__func__", each))
        code = getattr(plain, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
            names.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return names


def problems(
    call: Callable, keywords: Mapping[str, Any], others: Iterable[str] = (), positional: int = 0
) -> Iterator[tuple[str, str]]:
    """What is wrong with keyword arguments: each key, and what to say of it.

    Args:
        call: what they are for.
        keywords: names and values.
        others: names that are taken elsewhere, whatever their values.
        positional: how many of the first parameters are not the user's.
    """
    known, takes_any = parameters(call)
    known.pop("self", None)
    for name in list(known)[:positional]:
        del known[name]
    names = {*known, *others}
    for key, value in dict.items(keywords) if isinstance(keywords, dict) else keywords.items():
        if key not in names and not takes_any and key not in taken(call):
            yield key, f"not an argument{nearest(key, names)}"
        elif key in known and key not in others and (expected := mistyped(known[key], value)):
            yield key, f"expected {expected} (got {value!r})"


def mistyped(parameter: inspect.Parameter, value: Any) -> str:
    """The types that a parameter expects, where a value is of none of them; else nothing."""
    kind, default = parameter.annotation, parameter.default
    if kind is parameter.empty:
        kind = type(default) if isinstance(default, (bool, str)) else Any
        kind = int | float if isinstance(default, (int, float)) and kind is Any else kind
    if (value is None and default is None) or fits(value, kind):
        return ""
    return inspect.formatannotation(kind).replace("typing.", "")


def fits(value: Any, kind: Any) -> bool:
    """Whether a config's value can stand for an annotated type.

    Classes other than the plain ones may stand in a config as names or dicts, so that only numbers
    are known not to be one.
    """
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if get_origin(kind) is Literal:
        return value in inner
    kind = get_origin(kind) or kind
    if kind is None or kind is type(None):
        return value is None
    if kind is Any or not inspect.isclass(kind):
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if kind is str or issubclass(kind, PathLike):
        return isinstance(value, (str, PathLike))
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in [
            each for m in kind for each in (m.value, m.name)
        ]
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and inner and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(each, inner[0]) for each in value) if inner else True
    if kind.__name__ == "Tensor":  # has no name
        return isinstance(value, kind)
    return isinstance(value, kind) or not isinstance(value, (bool, int, float))
