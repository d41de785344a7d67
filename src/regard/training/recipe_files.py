"""Recipes in TOML files: the shipped ones, a user's, and the one stored in each run.

`regard recipes` lists the shipped recipes; the header of each file gives the source, the command,
the hardware and what was measured.
"""

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from regard.errors import UsageError
from regard.files import reason
from regard.training.config import Recipe, cast, fields_of


def shipped() -> dict[str, str]:
    """The text of each shipped recipe's TOML file, by name."""
    folder = resources.files("regard.training").joinpath("recipes")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".toml"))
    return {n.removesuffix(".toml"): folder.joinpath(n).read_text(encoding="utf-8") for n in names}


def summary(text: str) -> str:
    """The first line of a recipe's header."""
    return text.splitlines()[0].lstrip("# ").strip()


def load_recipe(name: str | Path = "quick") -> Recipe:
    """A shipped recipe by name, or the recipe in a TOML file.

    Raises:
        UsageError: no recipe has this name, the file can't be read, or a key or value is wrong.
    """
    texts = shipped()
    if str(name) in texts:
        return parse_recipe(texts[str(name)], str(name))
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(str(name), texts, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no recipe {str(name)!r}; {hint}choose {', '.join(texts)}, or a file")
    try:
        return parse_recipe(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read as a recipe ({reason(error)})") from error


def parse_recipe(text: str, name: str) -> Recipe:
    """Parses a recipe from TOML text; its [model] table holds the network's `name` and arguments.

    Raises:
        UsageError: the text is not TOML, or a key or value is wrong; the message starts with
            `name`.
    """
    try:
        values = tomllib.loads(text)
        network = values.pop("model", {})
        if not isinstance(network, dict) or not isinstance(network.get("name", ""), str):
            raise UsageError(f"model={network!r}: give a table [model] with the network's name")
        table = values.pop("random_start", {})
        known = [*(f.name for f in fields_of()), "model", "random_start"]
        recipe = Recipe(
            model=network.pop("name", None), model_args=network, random_start=table,
            **cast(values, known),
        )  # fmt: skip
        recipe.for_start(random=True)  # raises if the table doesn't fit the other fields
        return recipe
    except ValueError as error:  # TOMLDecodeError is a subclass
        raise UsageError(f"recipe {name}: {error}") from error


def recipe_toml(recipe: Recipe, header: str = "") -> str:
    """The recipe as TOML that `parse_recipe` reads back, every field written out."""
    import tomli_w

    values: dict[str, Any] = {
        f.name: list(v) if isinstance(v, tuple) else v
        for f in fields_of()
        if (v := getattr(recipe, f.name)) is not None
    }
    network = {"name": recipe.model, **recipe.model_args}
    network = {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}
    values["model"] = {k: v for k, v in network.items() if v is not None}
    if recipe.random_start:
        table = recipe.random_start.items()
        values["random_start"] = {k: list(v) if isinstance(v, tuple) else v for k, v in table}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + tomli_w.dumps(values)
