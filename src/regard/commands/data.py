"""`regard data`: what is in a data set, and what is wrong with it."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import (
    JsonFlag,
    SeedFlag,
    SplitsFlag,
    check_page,
    progress_bar,
    require_data,
)
from regard.errors import UsageError
from regard.files import plural, write_text

if TYPE_CHECKING:
    from regard.data.audit import DataCheck

log: logging.Logger = logging.getLogger(__name__)

_COPIES = 4  # named of one picture: one of each split, and of images without one


def command(
    source: Annotated[str, Parameter(name="DATA")],
    /,
    *,
    val: float = 0.1,
    test: float = 0.2,
    seed: SeedFlag = 0,
    limit: int | None = None,
    workers: int | None = None,
    splits: SplitsFlag = "auto",
    root: Path | None = None,
    near_duplicates: bool = True,
    keep_together: Annotated[bool, Parameter(negative=())] = False,
    html: Path | None = None,
    table1: Path | None = None,
    json: JsonFlag = False,
) -> int:
    """Check a data set before training: counts, sizes, faults, leakage.

    Parameters
    ----------
    source
        A folder of class folders (with or without train, val and test above them), a CSV file
        (path, label, split, group), digits, cifar10, cifar100, medmnist:FILE.npz,
        wds:SHARDS (tar files) or hf:NAME.
    val
        Validation fraction, for data without a validation split.
    test
        Test fraction, for data without a test split.
    seed
        Random seed for those splits.
    limit
        Check only this many images, evenly spread.
    workers
        Processes that decode images. Default: one per core.
    splits
        Whether the top folders of DATA are splits rather than classes.
    root
        Folder of cifar10 and cifar100.
    near_duplicates
        Look for near-duplicates: the same picture scaled, saved again, cropped a little,
        brightened, mirrored, or with other burnt-in text.
    keep_together
        Put near-duplicates into the same split, where splits are made.
    html
        Write the check as a page with pictures to this file.
    table1
        Write the paper's Table 1 to this .csv or .md file: images that can be read, groups,
        classes and further columns of a CSV file, by split.
    json
        Print JSON.
    """
    require_data(source)
    if html is not None:
        check_page(html)
    if table1 is not None:
        _check_table(table1)
    from regard.data import assign_splits, check_data, open_data
    from regard.data.near_duplicates import grouped_by_content

    table = open_data(source, root=root, splits=splits)
    groups = table.groups
    if keep_together:
        with progress_bar("comparing the images") as progress:
            table = grouped_by_content(table, progress)
    table = assign_splits(table, val=val, test=test, seed=seed)
    table = replace(table, groups=groups)
    with progress_bar("looking at the images") as progress:
        check = check_data(
            table, progress=progress, workers=workers, limit=limit,
            near_duplicates=near_duplicates,
        )  # fmt: skip
    print_check(check, as_json=json)
    if table1 is not None:
        from regard.data.table_one import as_csv, as_markdown, table_one

        written = as_csv if table1.suffix.lower() == ".csv" else as_markdown
        lost = {path for path, _ in check.unreadable}  # training leaves them out, too
        readable = [i for i in range(len(table)) if table.path(i) not in lost]
        write_text(table1, written(table_one(table.select(readable))))
    if html is not None:
        from regard.report.data_page import write_data_page

        write_data_page(table, check, html)
        if not json:
            print(f"the page: {html}")
    return 0


def _check_table(path: Path) -> None:
    if path.suffix.lower() not in (".csv", ".md"):
        raise UsageError(f"--table1 {path}: choose a name that ends in .csv or .md")
    if path.exists() or not path.absolute().parent.is_dir():
        why = "exists; it is not replaced" if path.exists() else "its folder does not exist"
        raise UsageError(f"--table1 {path}: {why}")


# ---- showing it


def print_check(check: "DataCheck", as_json: bool = False) -> None:
    """Prints tables and sentences, or everything as JSON."""
    if as_json:
        print(json.dumps(asdict(check), indent=2))  # ASCII: a file name need not be UTF-8
        return
    from rich.console import Console

    console = Console()
    # piped, a table must not be cut to the width of a terminal that is not there
    Console(width=None if console.is_terminal else 160).print(_table(check))
    for line in _lines(check):
        console.print(_plain(line), markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _table(check: "DataCheck") -> Any:
    """Classes down, splits across; of many classes the largest and the smallest."""
    from rich.table import Table
    from rich.text import Text

    from regard.data.sources import SPLITS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    splits = [s for s in (*SPLITS, "") if s in check.counts]
    for split in splits:
        table.add_column(split or "images", justify="right")
    rows = [(c, [check.counts[s][c] for s in splits]) for c in check.counts[splits[0]]]
    if len(rows) > 20:
        rows.sort(key=lambda row: -sum(row[1]))
        rows = [*rows[:8], (f"({len(rows) - 16} more)", []), *rows[-8:]]
    for name, numbers in rows:
        table.add_row(Text(_plain(name)), *map(str, numbers))
    table.add_row("all", *(str(sum(check.counts[s].values())) for s in splits), style="bold")
    return table


def _lines(check: "DataCheck") -> Iterator[str]:
    yield ""
    if check.checked < check.images:
        yield f"looked at {check.checked:,} of {plural(check.images, 'image')}"
    for name in ("height", "width"):
        if extent := check.sizes[name]:
            yield f"{name}  {extent['min']} to {extent['max']}, median {extent['median']}"
    common = ", ".join(f"{h} x {w} ({n:,})" for h, w, n in check.sizes["common"])
    yield f"height x width  {common}"
    yield "channels  " + ", ".join(f"{c} ({n:,})" for c, n in check.channels.items())
    yield "depth  " + ", ".join(f"{d} ({n:,})" for d, n in check.depths.items())
    if check.value_range is not None:
        low, high = check.value_range
        span = f"values  {low:.6g} to {high:.6g}"
        yield f"{span}, mapped to 0 to 1 in every image that does not store its own range"
    yield "mean  " + ", ".join(f"{m:.4f}" for m in check.mean)
    yield "deviation  " + ", ".join(f"{s:.4f}" for s in check.std)
    if g := check.groups:
        yield f"groups  {g['number']} of {g['smallest']} to {g['largest']}, median {g['median']}"
    yield from _listed("can't be read", [f"{p}: {reason}" for p, reason in check.unreadable])
    for title, groups in (("in several splits", check.leaks), ("twice", check.duplicates)):
        yield from _listed(title, list(map(_copies, groups)))
    for title, reason in (
        ("near-duplicates with different labels", "labels"),
        ("near-duplicates in different splits", "splits"),
        ("near-duplicates", "copies"),
    ):
        pairs = [pair for pair in check.near_duplicates if pair["reason"] == reason]
        yield from _listed(title, list(map(_pair, pairs)))
    yield ""
    for line in check.warnings:
        yield f"warning: {line}"
    advice = check.suggestion
    flags = ["size", "channels"] + ["resize"] * (advice["resize"] != "none")  # is no --resize
    shown = ", ".join(f"{key} {advice[key]}" for key in flags)
    yield f"suggestion: {shown}"


def _copies(group: Sequence[tuple[str, str]]) -> str:
    """A few of the copies of a picture, in each split one at least, and the number of others."""
    first: dict[str, str] = {}
    for path, split in group:
        first.setdefault(split, path)
    examples = [(path, split) for split, path in first.items()]
    shown = [*examples, *(copy for copy in group if copy not in examples)][:_COPIES]
    more = f" = {len(group) - _COPIES:,} more" if len(group) > _COPIES else ""
    return " = ".join(f"{path} ({split or '-'})" for path, split in shown) + more


def _pair(pair: dict[str, Any]) -> str:
    both = zip(pair["paths"], pair["labels"], pair["splits"], strict=True)
    shown = " ~ ".join(f"{path} ({label}, {split or '-'})" for path, label, split in both)
    return shown + " mirrored" * pair["mirrored"]


def _listed(title: str, rows: list[str]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
        yield from (f"  {row}" for row in rows[:5])
        if len(rows) > 5:
            yield f"  and {len(rows) - 5} more (--json lists all)"
