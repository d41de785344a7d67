"""The page of `regard compare --html`: costs, differences and sentences in one file."""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from regard.files import write_atomically


def write_comparison(content: dict[str, Any], path: Path) -> None:
    """Writes the page.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["n"] = lambda value: "–" if value is None else f"{value:.4f}"
    text = resources.files("regard.studies").joinpath("compare.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(c=content)
    write_atomically(path, lambda beside: beside.write_text(page, encoding="utf-8"))
