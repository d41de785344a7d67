"""`regard recipes`."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

log: logging.Logger = logging.getLogger(__name__)


def command(name: Annotated[str | None, Parameter(name="NAME")] = None, /) -> int:
    """List the training recipes, or print one.

    Parameters
    ----------
    name
        Name of a recipe, or path of a TOML file; the file is printed, to start your own from.
    """
    from regard.training.recipe_files import load_recipe, shipped, summary

    texts = shipped()
    if name is None:
        for each, text in texts.items():
            print(f"{each:22s} {summary(text)}")
        return 0
    load_recipe(name)
    print(texts[name] if name in texts else Path(name).read_text(encoding="utf-8"), end="")
    return 0
