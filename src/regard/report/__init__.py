"""One self-contained HTML page on a training run: the result, where the network looked, its
mistakes, and how to run it again.

`page.py` fills `page.html`, `charts.py` draws the training curves, and `build.py` collects a
report from a run's folder. The page loads nothing from the network, needs no scripts, follows
the reader's light or dark mode, and can be printed.
"""

from regard.report.page import MAX_BYTES, Report, write_report

__all__ = ["MAX_BYTES", "Report", "write_report"]
