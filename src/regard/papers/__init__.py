"""The tables of the three papers, as data: the printed results of each row, and how to train it.

A table is a TOML file in `tables/`; studies read user files of the same form.
Detection and segmentation (CBAM's tables 6 and 7, the second half of the attention gates
paper) are out of scope.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from regard.errors import UsageError

PAPERS = {
    "RAN": "Wang et al., Residual Attention Network for Image Classification, CVPR 2017",
    "CBAM": "Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018",
    "AG": "Schlemper et al., Attention gated networks, Medical Image Analysis 2019",
}


class Printed(float):
    """A number as a paper prints it: 3.90 is shown as 3.90.

    Attributes:
        text: its digits.
    """

    def __new__(cls, text: str) -> "Printed":
        number = super().__new__(cls, text)
        number.text = text.replace("_", "")  # TOML's 1_000.0, which no flag is
        return number

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: a network, and how it is trained.

    Attributes:
        name: the row's name.
        network: for create_model().
        arguments: of the network.
        recipe: the name of the recipe; None: the table's.
        changes: values that override the recipe's.
        data: the data set; None: the table's.
        evaluation: how the test differs from training: {"size": 320}, {"size": [224, 288]},
            {"ten_crop": True}, or both keys.
        paper: the paper's numbers by metric; errors in percent, parameters in millions.
        note: what a reader must know about this row.
    """

    name: str
    network: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to be trained and compared with each other; the first is the reference.

    Attributes:
        key: such as "cbam-4", or the name of the file.
        title: description of the table.
        rows: at least one.
        paper: RAN, CBAM or AG; None: the user's own study.
        data: the data set that the numbers are for; None: any.
        recipe: the name of the rows' recipe.
        metrics: the metrics that the paper prints.
        source: where the paper's numbers were read.
        names: of all rows, if these are some of them.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    names: tuple[str, ...] = ()
    paper: str | None = None
    data: str | None = None
    recipe: str = "quick"
    metrics: tuple[str, ...] = ()
    source: str = ""


def tables() -> list[str]:
    """The keys of the papers' tables: ran-1 to ran-7, cbam-1 to cbam-5, ag-main, ag-classes."""
    return sorted(p.name.removesuffix(".toml") for p in _folder().iterdir())


def load_table(source: str | Path) -> Table:
    """A paper's table by its key, or the table in a TOML file.

    Raises:
        UsageError: no table has this key, the file can't be read, or it holds an unknown key.
    """
    if str(source) in tables():
        return parse_table(_folder().joinpath(f"{source}.toml").read_text("utf-8"), str(source))
    path = Path(source)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(str(source), tables(), n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no table {str(source)!r}; {hint}choose {', '.join(tables())}, or a file")
    try:
        return parse_table(path.read_text(encoding="utf-8-sig"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"{path}: can't be read as a table ({reason})") from error


def parse_table(text: str, key: str) -> Table:
    """Parses a table from TOML text.

    Raises:
        UsageError: the text is not TOML, a key is unknown or missing, a value has another type, or
            two rows have one name.
    """
    try:
        values = tomllib.loads(text, parse_float=Printed)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"table {key}: {error}") from error
    rows = values.pop("rows", [])
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"table {key}: [[rows]] is needed, at least once")
    _known(values, Table, f"table {key}")
    _check_types(values, f"table {key}")
    made = tuple(_row(row, f"table {key}, row {n}") for n, row in enumerate(rows, start=1))
    names = [row.name for row in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"table {key}: two rows are called {twice[0]!r}")
    values["metrics"] = tuple(values.get("metrics", ()))
    return Table(**{"title": key, **values, "key": key, "rows": made})


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a table of keys is needed, not {values!r}")
    _known(values, Row, where)
    if missing := [k for k in ("name", "network") if not isinstance(values.get(k), str)]:
        raise UsageError(f"{where}: {missing[0]} is needed, as a string")
    paper = values.get("paper", {})  # a row's numbers; a table's is a name
    _check_types({**values, "paper": ""}, where)
    numbers = paper.values() if isinstance(paper, dict) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise UsageError(f"{where}: paper = {paper!r}; give a table of numbers")
    _check_evaluation(values.get("evaluation", {}), where)
    return Row(**values)


def _check_evaluation(values: Any, where: str) -> None:
    """Refuses an evaluation that `evaluate_words` can't express."""
    good = isinstance(values, dict) and values.keys() <= {"size", "ten_crop"}
    if good and "size" in values:
        sides = values["size"] if isinstance(values["size"], list) else [values["size"]]
        good = len(sides) in (1, 2) and all(type(n) is int and n > 0 for n in sides)
    if not good or not isinstance(values.get("ten_crop", False), bool):
        raise UsageError(
            f"{where}: evaluation = {values!r}; give {{ size = 320 }}, {{ size = [224, 288] }}, "
            "{ ten_crop = true }, or both"
        )


def _check_types(values: Mapping[str, Any], where: str) -> None:
    """Checks that each value but `evaluation` is a table, a list of strings, or a string."""
    for name, value in values.items():
        if name in ("arguments", "changes"):
            good, wanted = isinstance(value, dict), "a table of values"
        elif name == "metrics":
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
            wanted = "a list of strings"
        else:
            good, wanted = isinstance(value, str) or name == "evaluation", "a string"
        if not good:
            raise UsageError(f"{where}: {name} = {value!r}; give {wanted}")


def _known(values: Mapping[str, Any], kind: type, where: str) -> None:
    known = [name for name in kind.__dataclass_fields__ if name not in ("key", "rows", "names")]  # type: ignore[attr-defined]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}"
            raise UsageError(f"{where}: no key is called {name!r}; {hint}")


def _folder() -> Any:
    return resources.files("regard.papers").joinpath("tables")


def train_command(table: Table, row: Row, data: str | None = None) -> list[str]:
    """The arguments of `regard` that train a row, for subprocess or shlex.join.

    Args:
        table: the row's table.
        row: one of its rows.
        data: used instead of the row's data set.
    """
    words = ["train", data or row.data or table.data or "DATA"]
    words += ["--recipe", row.recipe or table.recipe, "--model", row.network]
    for name, value in row.arguments.items():
        words += ["--arg", f"{name}={value}"]
    for name, value in row.changes.items():
        words += flag_words(name, value)
    return words


def flag_words(name: str, value: Any) -> list[str]:
    """A recipe field and its value as arguments for the command line.

    >>> flag_words("batch_size", 32), flag_words("nesterov", False), flag_words("size", [32, 48])
    (['--batch-size', '32'], ['--no-nesterov'], ['--size', '32', '48'])
    """
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *_words(value)]


def evaluate_words(row: Row) -> list[str]:
    """The flags of `regard evaluate` for a row's test; none if training tests the same way."""
    words = []
    if "size" in row.evaluation:
        words += ["--size", *_words(row.evaluation["size"])]
    if row.evaluation.get("ten_crop"):
        words.append("--ten-crop")
    return words


def _words(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
