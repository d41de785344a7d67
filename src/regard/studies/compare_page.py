"""The page of `regard compare --html`: costs, differences and sentences in one file."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from regard.files import signed, signed_range, write_atomically


def write_comparison(content: dict[str, Any], path: Path) -> None:
    """Writes the page.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(n=_number, difference=difference_words, p=_p_value)
    text = resources.files("regard.studies").joinpath("compare.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(c=content)
    write_atomically(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def difference_words(difference: Mapping[str, float | None]) -> str:
    """ "+0.0120 (-0.0031 to +0.0271)"; "–" if it is not defined."""
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    if low is None or high is None:
        return signed(value, 4)
    return "{} ({} to {})".format(*signed_range(value, low, high, 4))


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
