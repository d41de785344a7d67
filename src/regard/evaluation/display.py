"""Results as small HTML tables, for notebooks."""

import html
from collections.abc import Iterable, Sequence

from regard.evaluation.intervals import Estimate


def cell(estimate: Estimate, decimals: int = 3) -> tuple[str, str]:
    """The value and its interval as text; "–" if there is none."""
    if estimate.value != estimate.value:
        return "–", "–"
    value = f"{estimate.value:.{decimals}f}"
    if not estimate.has_interval:
        return value, "–"
    return value, f"{estimate.low:.{decimals}f} to {estimate.high:.{decimals}f}"


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; every cell is escaped, and an empty header row is omitted."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head = f"<thead>{row('th', headings)}</thead>" if any(headings) else ""
    body = "".join(row("td", cells) for cells in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{head}<tbody>{body}</tbody></table>"
