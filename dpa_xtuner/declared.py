"""Checks keyword arguments against the signatures of callables."""

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from dpa_xtuner.errors import nearest


def parameters(*calls: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Collect the parameters by name, and whether any other keyword is accepted too.

    Args:
        calls: each passes the keywords that it does not know on to the next. A class that takes
            ``**kwargs`` has its parents' parameters as well. ``**kwargs: Unpack[SomeTypedDict]``
            stands for the parameters that the typed dict names.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in _functions(calls):
        kinds = set()
        for name, parameter in inspect.signature(each).parameters.items():
            kinds.add(parameter.kind)
            kind = _resolved(parameter.annotation, each)
            if parameter.kind is parameter.VAR_KEYWORD:
                for field, of_field in _unpacked(kind).items():
                    more = inspect.Parameter(field, parameter.KEYWORD_ONLY, annotation=of_field)
                    found.setdefault(field, more)
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                found.setdefault(name, parameter.replace(annotation=kind))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found, False
    return found, True


def _unpacked(annotation: Any) -> dict[str, Any]:
    """Return the fields and types of ``Unpack[SomeTypedDict]``, none of any other annotation."""
    inner = get_args(annotation)
    return get_type_hints(inner[0]) if inner and is_typeddict(inner[0]) else {}


def _functions(calls: Iterable[Any]) -> Iterator[Callable]:
    for call in calls:
        if inspect.isclass(call):
            yield from (c.__init__ for c in call.__mro__[:-1])  # type: ignore[misc]  # read only
        else:
            yield call


def _resolved(annotation: Any, call: Callable) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(call), "__globals__", {}))
    except Exception:  # a name that only type checkers import
        return inspect.Parameter.empty


def taken(*calls: Callable) -> set[str]:
    """Collect the names that callables take, also those they look up in their ``**kwargs``.

    The key of such a lookup, ``kwargs.pop("revision")``, is a constant of the code, by itself or in
    a tuple that is looped over.
    """
    names = set(parameters(*calls)[0])
    for each in _functions(calls):
        plain = inspect.unwrap(getattr(each, "__func__", each))
        code = getattr(plain, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
            for constant in code.co_consts:
                each_one = constant if isinstance(constant, tuple) else (constant,)
                names.update(c for c in each_one if isinstance(c, str) and c.isidentifier())
    return names


def problems(
    calls: Sequence[Callable],
    keywords: dict[str, Any],
    others: Collection[str] = (),
    positional: int = 0,
    whole: bool = False,
) -> Iterator[tuple[str, str]]:
    """Find what is wrong with keyword arguments: yields each key and a message.

    Args:
        calls: what takes them, as in :func:`parameters`.
        keywords: names and values.
        others: names that are accepted elsewhere, whatever their values.
        positional: number of first parameters that the user does not give.
        whole: whether parameters without a default must be given.
    """
    known, takes_any = parameters(*calls)
    known.pop("self", None)
    for name in list(known)[:positional]:
        del known[name]
    names = {*known, *others}
    for key, value in dict.items(keywords):
        if key in others:
            continue
        if key in known:
            if expected := mistyped(known[key], value):
                yield key, f"expected {expected} (got {value!r})"
        elif not takes_any and key not in taken(*calls):
            yield key, f"not a known key{nearest(key, names)}"
    first = list(inspect.signature(calls[0]).parameters.values())[positional:] if whole else []
    for each in first:
        variadic = each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if each.default is each.empty and not variadic and each.name not in keywords:
            yield each.name, "it is missing"


def mistyped(parameter: inspect.Parameter, value: Any) -> str:
    """Name the types that a parameter expects if the value has none of them; else nothing."""
    kind, default = parameter.annotation, parameter.default
    if kind is parameter.empty:
        kind = type(default) if isinstance(default, (bool, str)) else Any
        kind = int | float if isinstance(default, (int, float)) and kind is Any else kind
    if (value is None and default is None) or fits(value, kind):
        return ""
    return inspect.formatannotation(kind).replace("typing.", "")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a config's value may have an annotated type.

    A config may give an object of any class by a name or a dict; so only numbers are known not to
    fit such a class.
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
        return isinstance(value, kind) or value in [e for m in kind for e in (m.value, m.name)]
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and inner and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(each, inner[0]) for each in value) if inner else True
    if kind.__name__ == "Tensor":  # a config can't name one
        return isinstance(value, kind)
    return isinstance(value, kind) or not isinstance(value, (bool, int, float))
