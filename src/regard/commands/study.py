"""`regard study`: does attention help here? Networks trained several times on the same splits."""

import json as json_module
import logging
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.called import command_words
from regard.commands.flags import DeviceFlag, JsonFlag, SplitsFlag, check_folder, parse_arguments
from regard.commands.train import RecipeFlags
from regard.errors import UsageError
from regard.log import info_on_stderr

if TYPE_CHECKING:
    from regard.commands.study_runs import Asked
    from regard.papers import Table
    from regard.studies.plan import PlannedRun
    from regard.studies.progress import Progress

log: logging.Logger = logging.getLogger(__name__)

# what a row's `changes` can't set, although a recipe has it, and what sets it
_SET_BY = {
    "seed": "--seeds", "fold": "--folds", "model": "network", "model_args": "arguments",
    "random_start": "a recipe's file",
}  # fmt: skip


@dataclass(frozen=True)
class TrainFlags:
    """The flags of `regard train` that belong to no recipe, for all rows."""

    recipe: Annotated[
        str | None,
        Parameter(
            help="Name or path of a recipe for all rows, instead of the study's; a row's own "
            "changes still apply. Flags override its values."
        ),
    ] = None
    weights: Annotated[
        Path | None,
        Parameter(help="Start from the network of a run's folder, or from an authors' checkpoint."),
    ] = None
    root: Annotated[Path | None, Parameter(help="Folder of cifar10 and cifar100.")] = None
    splits: SplitsFlag = "auto"
    log: Annotated[
        list[str] | None,
        Parameter(
            alias="--trackers",
            negative=(),
            consume_multiple=True,
            help="Experiment trackers of the runs, as for train, or none. Default: tensorboard.",
        ),
    ] = None

    def words(self) -> list[str]:
        """For `regard train`; the recipe stands in each row's command."""
        words = [] if self.weights is None else ["--weights", str(self.weights)]
        words += [] if self.root is None else ["--root", str(self.root)]
        words += [] if self.splits == "auto" else ["--splits", self.splits]
        return words + (["--log", *self.log] if self.log else [])


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
    json: JsonFlag = False,
    device: DeviceFlag = "auto",
    train: Annotated[TrainFlags, Parameter(name="*")] = TrainFlags(),
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
        Names or numbers of the rows to train and compare; the one that comes first in the study is
        the reference. Default: all.
    only
        Train only part i of n of the runs (i/n), for job arrays.
    jobs
        Number of runs at the same time; cores or GPUs are divided among them.
    ray
        Run on a Ray cluster: its address, or "auto".
    slurm
        Print a SLURM script for an array of this many jobs, and exit.
    dry_run
        Print the commands of all runs, and exit.
    json
        Print study.json at the end.
    """
    from regard.studies.plan import (
        choose_part,
        choose_rows,
        on_one_data_set,
        open_study,
        with_recipe,
    )

    if slurm is not None and (dry_run or only is not None):
        flag = "--dry-run" if dry_run else f"--only {only}"
        raise UsageError(f"{flag}: not with --slurm, whose jobs would have it too")
    if dry_run and json:
        raise UsageError("--json: not with --dry-run, which trains nothing")
    if ray is not None and jobs != 1:
        raise UsageError(f"--jobs {jobs}: not used with --ray: its cluster distributes the runs")
    check_folder(out)
    table = choose_rows(open_study(study, model), rows or [])
    table = on_one_data_set(table, source)
    start_alike = flags.pretrained is None and all(  # type: ignore[attr-defined]
        "pretrained" not in r.changes for r in table.rows
    )
    if start_alike:
        flags = replace(flags, pretrained="no")
    table = table if train.recipe is None else with_recipe(table, train.recipe)
    data = source or table.rows[0].data or table.data
    asked = _asked(table, str(data), train, flags)
    _check_start(train)
    _check_data(study, source, str(data), train.root)
    if out is None:
        from regard.runs import data_name

        out = Path("runs") / f"study-{table.key}-{data_name(str(data))}"
    words = [*train.words(), *(["--device", device] if device != "auto" else [])]
    runs = _plan(table, source, out, seeds, folds, [*words, *_flag_words(flags)])
    part = choose_part(runs, only)
    if slurm is not None:
        return _print_script(slurm)
    if dry_run:
        return _print_commands(part)
    if start_alike and train.weights is None:
        with info_on_stderr():
            log.info("all runs start from random weights; --pretrained yes changes that")
    study_now = _Study(table, runs, asked, out)
    if json:
        with info_on_stderr():
            failed = study_now.train(part, jobs, ray).failed
        print((out / "study.json").read_text(encoding="utf-8"), end="")
        return 1 if failed else 0
    failed = study_now.train(part, jobs, ray).failed
    study_now.print_results()
    return 1 if failed else 0


def _plan(
    table: "Table", source: str | None, out: Path, seeds: int, folds: int, words: list[str]
) -> "list[PlannedRun]":
    from regard.studies.plan import plan_study

    return plan_study(table, source, out, seeds=seeds, folds=folds, flags=words)


def _asked(table: "Table", data: str, train: TrainFlags, flags: Any) -> "dict[str, Asked]":
    """By row, what is trained.

    Raises:
        UsageError: a recipe, a row's changes of it, or its network can't be had, before anything
            is trained; or a flag is given for what a row sets.
    """
    from regard.commands.study_runs import Asked
    from regard.training.config import with_channels
    from regard.training.plan import choose_model
    from regard.training.recipe_files import load_recipe

    given = {k: v for k, v in vars(flags).items() if v is not None}
    found = {}
    for row in table.rows:
        if twice := sorted(given.keys() & row.changes.keys()):
            flag = twice[0].replace("_", "-")
            raise UsageError(f"--{flag}: row {row.name!r} sets {twice[0]} itself; change it there")
        if fixed := sorted(_SET_BY.keys() & row.changes.keys()):
            by = _SET_BY[fixed[0]]
            raise UsageError(f"row {row.name!r}: changes can't set {fixed[0]}, {by} sets it")
        base = load_recipe(row.recipe or table.recipe)
        # as the run's command line reads them
        read = parse_arguments([f"{k}={v}" for k, v in row.arguments.items()])
        try:
            arguments, changes = with_channels(read, {**row.changes, **given})
            choose_model(row.network, base.changed(**changes), arguments)
        except UsageError as error:
            raise UsageError(f"row {row.name!r}: {error}") from error
        found[row.name] = Asked(
            network=row.network, base=base, data=data, changes=changes, arguments=arguments,
            root=None if train.root is None else str(train.root), splits=train.splits,
            weights=None if train.weights is None else str(train.weights),
        )  # fmt: skip
    with_table = [a for a in found.values() if a.base.random_start]
    alone = [r for r, a in found.items() if a.base.random_start and not _starts_at_random(a)]
    if alone and len(alone) < len(with_table):
        log.warning(
            f"{', '.join(alone)}: trained from random weights without the recipe's [random_start], "
            "as one of its values is changed; the other rows are trained with it"
        )
    return found


def _starts_at_random(asked: "Asked") -> bool:
    """Whether the row keeps its recipe's values for random weights."""
    return bool(asked.base.changed(**asked.changes).random_start)


def _check_start(train: TrainFlags) -> None:
    """Refuses trackers and weights that are not there, before each run does.

    Raises:
        UsageError: a tracker is unknown or not installed, or there are no such weights.
    """
    from regard.models.io import network_folder
    from regard.training.trackers import check_trackers

    check_trackers(train.log or ())
    if train.weights is not None and not train.weights.is_file():
        network_folder(train.weights)


def _check_data(study: str, source: str | None, data: str, root: Path | None) -> None:
    """Refuses data that is not there, before each run does.

    Raises:
        UsageError: there is no such data, or DATA has to be given for a paper's table.
    """
    from regard.data.sources import NAMES, open_data

    if data in NAMES or ":" in data or Path(data).expanduser().exists():
        return
    if source is None:
        raise UsageError(f"study {study} needs DATA: the {data} images, or others")
    open_data(data, root=None if root is None else str(root))  # says what is wrong


def _print_commands(runs: "list[PlannedRun]") -> int:
    for run in runs:
        print(run)
        if run.test:
            print(shlex.join(["regard", *run.test]))
    return 0


def _print_script(parts: int) -> int:
    """Prints the SLURM script of this command line.

    Raises:
        UsageError: fewer than one part.
    """
    from regard.studies.plan import slurm_script

    if parts < 1:
        raise UsageError(f"--slurm {parts}: at least 1 job")
    words = command_words()
    for place in reversed([i for i, w in enumerate(words) if w.partition("=")[0] == "--slurm"]):
        del words[place : place + (1 if "=" in words[place] else 2)]
    print(slurm_script(words, parts), end="")
    return 0


class _Study:
    """A study that is trained: its results are written after each run, and shown meanwhile."""

    def __init__(
        self,
        table: "Table",
        runs: "list[PlannedRun]",
        asked: "dict[str, Asked]",
        out: Path,
    ) -> None:
        self.table, self.runs, self.asked, self.out = table, runs, asked, out
        self.recipes = {
            row.name: {**asdict(asked[row.name].base), "name": row.recipe or table.recipe}
            for row in table.rows
        }

    def train(self, part: "list[PlannedRun]", jobs: int, ray: str | None) -> "Progress":
        """Trains a part of the runs and writes the results of all after each.

        Raises:
            UsageError: the folder holds something else or other runs, or what `run_all` raises.
            StateError: the folder can't be written.
        """
        from regard.commands.study_display import StudyDisplay
        from regard.commands.study_runs import check_runs
        from regard.files import check_space
        from regard.studies.runner import run_all

        check_space(self.out, 0)
        _check_is_study(self.out)
        check_runs(self.runs, self.asked)
        with StudyDisplay() as display:

            def after_each(progress: "Progress") -> None:
                display.results(self._write())
                display.show(progress, now=True)

            if ray is not None:
                from regard.studies.on_ray import run_on_ray

                done = run_on_ray(part, address=ray, after_each=after_each, meanwhile=display.show)
            else:
                done = run_all(part, jobs=jobs, after_each=after_each, meanwhile=display.show)
            self._write()  # of all parts, where another one has just ended too
        return done

    def print_results(self) -> None:
        """What was shown, and where it is written."""
        from regard.studies.results import gather

        result = gather(self.table, self.runs, self.recipes)
        for row in result.rows:
            if row.verdict:
                print(row.verdict)
        if result.caution:
            print(result.caution)
        for run, why in result.failed.items():
            print(f"failed: {run.row}, {run.folder.name}: {why}")
        print(f"the study: {self.out / 'study.html'}")

    def _write(self) -> Any:
        from regard.studies.page import write_page
        from regard.studies.results import gather, results_lock, write_results

        with results_lock(self.out):
            result = gather(self.table, self.runs, self.recipes)
            write_results(result, self.out)
            write_page(result, self.out)
        return result


def _check_is_study(out: Path) -> None:
    """Refuses a folder with another's study.json, which would be written over.

    Raises:
        UsageError: it is not a study's.
    """
    path = out / "study.json"
    try:
        if not path.exists() or "commands" in json_module.loads(path.read_text(encoding="utf-8")):
            return
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a study's: give --out another folder") from error
    raise UsageError(f"{path} is not a study's: give --out another folder")


def _flag_words(flags: Any) -> list[str]:
    """The recipe's flags that were given, as words for `regard train`."""
    from regard.papers import flag_words

    words: list[str] = []
    for name, value in vars(flags).items():
        if value is None:
            continue
        if name in ("seed", "fold"):
            raise UsageError(f"--{name}: a study sets it; give --{name}s")
        words += flag_words(name, value)
    return words
