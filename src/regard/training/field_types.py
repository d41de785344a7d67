"""Checks and converts the values of a recipe by the types of its fields.

A type may be optional, a Literal of choices, a tuple of numbers, and annotated with validators.
"""

import math
from typing import Annotated, Any, Literal, get_args, get_origin

from regard.errors import UsageError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _plain(hint: Any) -> Any:
    """A field's type without None and without validators."""
    kinds = [a for a in get_args(hint) if a is not type(None)] if _optional(hint) else [hint]
    return get_args(kinds[0])[0] if get_origin(kinds[0]) is Annotated else kinds[0]


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def check(name: str, value: Any, hint: Any) -> None:
    """Checks a value against the choices and the range of its field's type.

    Raises:
        UsageError: it is not among the choices, or out of range.
    """
    if value is None and _optional(hint):
        return
    kind = _plain(hint)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise UsageError(f"{name}={value!r}: choose one of {', '.join(get_args(kind))}")
    kinds = get_args(hint) if _optional(hint) else (hint,)
    for parameter in (p for k in kinds for p in getattr(k, "__metadata__", ())):
        for validator in parameter.validator:
            try:
                validator(kind, value)
            except ValueError as error:
                shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                reason = str(error).rstrip(".")
                raise UsageError(f"{name}={shown}: {reason[0].lower()}{reason[1:]}") from None


def convert(name: str, value: Any, hint: Any) -> Any:
    """Converts a value from TOML or Python to the field's type: list to tuple, 1 to 1.0.

    Raises:
        UsageError: it has another type.
    """
    value = _python(value)
    if value is None and _optional(hint):
        return None
    kind = _plain(hint)
    if get_origin(kind) is Literal:
        if not isinstance(value, str):
            raise UsageError(f"{name}={value!r}: choose one of {', '.join(get_args(kind))}")
        kind = str
    if kind is str and isinstance(value, str):
        return str.__str__(value)  # also of an enumeration
    if get_origin(kind) is tuple:
        if name == "size" and _is_number(value):
            value = [value]
        one, *more = get_args(kind)
        value = [_python(v) for v in value] if isinstance(value, list | tuple) else value
        if not isinstance(value, list | tuple) or not all(_is_number(v) for v in value):
            raise UsageError(f"{name}={value!r}: give a list of numbers")
        if more != [...] and len(value) != len(get_args(kind)):
            raise UsageError(f"{name}={value!r}: give {len(get_args(kind))} numbers")
        return tuple(convert(name, v, one) for v in value)
    if kind is float and _is_number(value):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            return math.inf if value > 0 else -math.inf
    if kind in _KINDS and type(value) is not kind:
        raise UsageError(f"{name}={value!r}: {_KINDS[kind]} is needed")
    return value


def _python(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, without importing NumPy; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
