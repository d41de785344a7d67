"""`regard study`: does attention help here? Networks trained several times on the same splits."""

import json as json_module
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag
from regard.commands.train import RecipeFlags
from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.papers import Table
    from regard.studies.plan import PlannedRun
    from regard.studies.runner import Progress

log = logging.getLogger(__name__)


def command(
    study: Annotated[str, Parameter(name="STUDY")],
    source: Annotated[str | None, Parameter(name="DATA")] = None,
    /,
    *,
    model: str | None = None,
    out: Path | None = None,
    seeds: int = 3,
    folds: int = 1,
    rows: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    only: str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    slurm: int | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    device: DeviceFlag = "auto",
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Compare networks over seeds and folds, with paired differences and their intervals.

    Every run is an ordinary run's folder below --out. The results so far are in study.html,
    study.json and study.csv, written again after each run. The same command continues a study
    that was stopped; finished runs are not run again.

    Parameters
    ----------
    study
        twins (--model and its SE and plain twins), insert (a plain timm network, and the same
        with SE and CBAM inserted), a paper's table (ran-1 to ran-7, cbam-1 to cbam-5, ag-main,
        ag-classes), or a TOML file.
    source
        Labeled images, as for training. Default: the table's data set.
    model
        Network of twins (default: cbam_resnet18) or insert (default: resnet18).
    out
        Folder of the study. Default: runs/study-STUDY-DATA.
    seeds
        Trainings of each network, with seeds 0, 1, ...; the splits stay the same.
    folds
        Folds of a cross-validation, by group where there are groups. 1 is a single split.
    rows
        Names or numbers of the rows to train. Default: all.
    only
        Train the i-th of n parts of the runs (i/n), for an array of jobs.
    jobs
        Runs at a time; cores or GPUs are divided among them.
    ray
        Run on a Ray cluster: its address, or "auto".
    slurm
        Print a SLURM script of an array of this many jobs, and exit.
    dry_run
        Print the commands of all runs, and exit.
    json
        Print study.json at the end.
    """
    from regard.studies.plan import choose_part, choose_rows, open_study, plan_study, slurm_script

    table = choose_rows(open_study(study, model), rows or [])
    words = _flag_words(flags) + (["--device", device] if device != "auto" else [])
    data = source or table.data
    if data is None:
        raise UsageError(f"study {study} needs DATA")
    if out is None:
        out = Path("runs") / f"study-{table.key}-{Path(data).stem}"
    runs = plan_study(table, source, out, seeds=seeds, folds=folds, flags=words)
    if slurm is not None:
        print(slurm_script([w for w in sys.argv[1:] if w not in ("--slurm", str(slurm))], slurm))
        return 0
    if dry_run:
        for run in runs:
            print(run)
            if run.test:
                print(shlex.join(["regard", *run.test]))
        return 0
    done = _train(table, runs, choose_part(runs, only), out, jobs, ray)
    if json:
        print((out / "study.json").read_text(encoding="utf-8"), end="")
    return 1 if done.failed else 0


def _train(
    table: "Table",
    runs: "list[PlannedRun]",
    part: "list[PlannedRun]",
    out: Path,
    jobs: int,
    ray: str | None,
) -> "Progress":
    """Trains a part of the runs and writes the results of all after each."""
    from regard.studies.page import write_page
    from regard.studies.results import gather, write_results
    from regard.studies.runner import run_all

    _check_same_study(out, runs)

    def write(progress: "Progress") -> None:
        result = gather(table, runs, progress.failed)
        write_results(result, out)
        write_page(result, out)
        show(progress, result)

    with _display(jobs) as show:
        if ray is not None:
            from regard.studies.on_ray import run_on_ray

            done = run_on_ray(part, address=ray, after_each=write)
        else:
            done = run_all(part, jobs=jobs, after_each=write)
        write(done)
    for row in gather(table, runs, done.failed).rows:
        if row.verdict:
            print(row.verdict)
    print(f"the study: {out / 'study.html'}")
    return done


def _check_same_study(out: Path, runs: "list[PlannedRun]") -> None:
    """Refuses a folder in which another study was started, before anything is trained.

    Raises:
        UsageError: the commands of the runs there are others.
    """
    path = out / "study.json"
    if not path.is_file():
        return
    try:
        before = set(json_module.loads(path.read_text(encoding="utf-8"))["commands"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a study's: give --out another folder") from error
    by_folder = {str(run.folder): str(run) for run in runs}
    for command_before in before:
        folder = command_before.rpartition(" --out ")[2].strip("'")
        now = by_folder.get(folder)
        if now is not None and now != command_before:
            raise UsageError(
                f"{out} holds a study with other settings ({command_before}); give --out another "
                "folder"
            )


def _flag_words(flags: Any) -> list[str]:
    """The recipe's flags that were given, as words for `regard train`."""
    words: list[str] = []
    for name, value in vars(flags).items():
        if value is None or name in ("seed", "fold"):
            if value is not None:
                raise UsageError(f"--{name}: a study sets it; give --{name}s")
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


class _display:  # noqa: N801
    """Shows what runs, what is done, the time left, and the table as it grows."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.live: Any = None

    def __enter__(self) -> "Callable[[Progress, Any], None]":
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if console.is_terminal:
            self.live = Live(console=console, auto_refresh=False, transient=True)
            self.live.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, progress: "Progress", result: Any) -> None:
        """One line, or the table in a terminal."""
        left = progress.left(self.jobs)
        names = ", ".join(f"{run.row} {run.folder.name}" for run in progress.running)
        line = f"{progress.done} of {progress.total} runs done"
        line += f", {len(progress.failed)} failed" if progress.failed else ""
        line += f"; running: {names}" if names else ""
        line += f"; about {_clock(left)} left" if left else ""
        if self.live is None:
            log.info(line)
            return
        from rich.console import Group
        from rich.table import Table as RichTable

        shown = RichTable(box=None, pad_edge=False, header_style="bold")
        for heading in ("network", "seeds", "accuracy", "difference, points"):
            shown.add_column(heading, justify="left" if heading == "network" else "right")
        for row in result.rows:
            d = row.differences.get("accuracy")
            cell = f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})" if d else ""
            mean = f"{row.mean('accuracy'):.2%}" if row.seeds else ""
            shown.add_row(row.row.name, f"{len(row.seeds)}/{result.seeds}", mean, cell)
        self.live.update(Group(line, shown), refresh=True)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
