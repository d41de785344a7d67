"""What the cells of users' tables say: a number, that something is missing, or a word."""

from typing import Any


def is_missing(value: Any, number: bool) -> bool:
    """Whether a cell is empty or says so: NaN, and for numbers also NA as R writes it."""
    words = ("", "nan", "na", "n/a") if number else ("", "nan")
    return value is None or str(value).strip().lower() in words


def number_of(value: Any) -> float:
    """The number that a cell says.

    Raises:
        ValueError: it says none. "4_1" is a code, though Python reads it as 41.
    """
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")
    return float(value)
