"""The command line: runs a command, and turns errors into one line and an exit code."""

import contextlib
import functools
import io
import operator
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import cyclopts

from regard.called import as_command, is_told_by_another, launched_processes
from regard.errors import (
    RegardError,
    Stopped,
    StudyStopped,
    ToldElsewhere,
    UsageError,
    is_out_of_memory,
)
from regard.log import show_messages
from regard.version import __version__

COMMANDS = {
    "demo": "Train AG-SonoNet-8 on handwritten digits and show where it looks.",
    "data": "Check a data set before training: counts, sizes, faults, leakage.",
    "shrink": "Copy a data set with its images made smaller, which training reads faster.",
    "train": "Train a network on labeled images.",
    "evaluate": "Evaluate a network on labeled images, with 95 % intervals.",
    "calibrate": "Fit a run's temperature and threshold on its validation images.",
    "predict": "Classify images with a trained network.",
    "explain": "Show where a network looks, and measure how far that can be believed.",
    "compare": "Compare finished runs on the same test images.",
    "study": "Compare networks over seeds and folds: does attention help on these images?",
    "errors": "Rank the images whose labels may be wrong.",
    "report": "Write a run's report.html again.",
    "figures": "Write a run's figures as files for print.",
    "export": "Export a network as one file that runs without Regard.",
    "serve": "Serve a web page and an HTTP API for a network.",
    "models": "List the networks: parameters, multiply-adds, the papers' figures, weights.",
    "recipes": "List the training recipes, or print one.",
    "push": "Upload a run with its model card to the Hugging Face hub.",
    "convert": "Convert an authors' checkpoint into a folder that timm loads.",
    "bench": "Measure how fast networks predict or train on this machine, engine by engine.",
}
"""The commands in the order of `regard --help`; each is `command` in a module of its name."""

HELP = {"--help", "-h"}


def _kinds(type_: Any) -> set[Any]:
    """The types that make up a type: `int` and `None` for `tuple[int, ...] | None`."""
    return {type_}.union(*(_kinds(part) for part in get_args(type_)))


def _given(type_: Any) -> Any:
    """The type of a flag that was given: `int` for `int | None`."""
    parts = get_args(type_)
    if NoneType not in parts or get_origin(type_) not in (Union, UnionType):
        return type_
    return functools.reduce(operator.or_, (part for part in parts if part is not NoneType))


def _as_written(type_: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """Converts a flag's words as cyclopts does, but without rounding 16.5 images to 16.

    Nor is 4_7 read as 47, or the word none as though the flag had not been given.
    """
    type_ = _given(type_)
    kinds = _kinds(type_)
    whole = int in kinds and float not in kinds
    if kinds & {int, float} and str not in kinds:
        for token in tokens:
            if "_" in token.value or (whole and _has_a_fraction(token.value)):
                raise cyclopts.CoercionError(token=token, target_type=int if whole else float)
    return cyclopts.convert(type_, tokens)


def _has_a_fraction(word: str) -> bool:
    try:
        return not float(word).is_integer()
    except ValueError:
        return False


app: cyclopts.App = cyclopts.App(
    name="regard",
    default_parameter=cyclopts.Parameter(converter=_as_written),
    version=__version__,
    help="Attention networks for image classification that show where they look.",
    help_format="plaintext",
    result_action="return_value",
)
for _place, (_name, _help) in enumerate(COMMANDS.items()):
    app.command(f"regard.commands.{_name}:command", name=_name, help=_help, sort_key=_place)


def _complain(line: str) -> None:
    print(f"regard: {line}", file=sys.stderr, flush=True)


def main(tokens: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    The exit code is 0 if all is done, 1 if work failed at least in part, 2 for a wrong call, and
    128 + N if signal N ended it.
    """
    for stream in (sys.stdout, sys.stderr):  # a missing character ends nothing
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe in a wrapper that claims to be seekable
                stream.reconfigure(errors="backslashreplace")
    code = run_command(sys.argv[1:] if tokens is None else tokens)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    sys.exit(code)


def _unread() -> int:
    """Ends as with SIGPIPE: the reader of the output, such as `head`, has enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def run_command(tokens: Sequence[str]) -> int:
    """Runs one command; a user's mistake becomes one line on standard error."""
    show_messages(force=True)
    try:
        with as_command(tokens):
            _refuse_several_processes(tokens)
            if tokens and tokens[0] in COMMANDS and not HELP.isdisjoint(tokens):
                from regard.command_help import describe

                describe(app[tokens[0]])
            return app(_with_resume_auto(tokens), exit_on_error=False, print_error=False) or 0
    except cyclopts.CycloptsError as error:
        if is_told_by_another():
            return 2
        named = [name for name in tokens[:1] if name in COMMANDS]
        _complain(f"{' '.join(str(error).split())} (see `{' '.join(['regard', *named])} --help`)")
        return 2
    except BrokenPipeError:
        return _unread()
    except ToldElsewhere as error:
        return int(error.code or 0)
    except SystemExit as error:  # rich exits this way when the reader of a table has enough
        return _unread() if error.code == 1 else int(error.code or 0)
    except Exception as error:
        if os.environ.get("REGARD_DEBUG") == "1":
            traceback.print_exception(error)
        return _explained(_naming_flags(error, tokens))
    except KeyboardInterrupt:
        _complain("stopped")
        return 130


def _refuse_several_processes(tokens: Sequence[str]) -> None:
    """Refuses commands that every process would run in full, writing the same files.

    Raises:
        UsageError: torchrun started several processes for a command other than training.
        ToldElsewhere: the same, in all processes of a machine but the first.
    """
    several = launched_processes()
    if several == 1 or not tokens or tokens[0] not in COMMANDS or tokens[0] == "train":
        return
    if is_told_by_another():
        raise ToldElsewhere(2)
    raise UsageError(
        f"{tokens[0]} runs in one process, but {several} were started: use torchrun and "
        "accelerate launch for train only"
    )


def _with_resume_auto(tokens: Sequence[str]) -> list[str]:
    """`train ... --resume auto` as --resume-auto: --resume itself takes no value.

    A flag with an optional value would take DATA as its value in `train --resume DATA`.
    """
    words = list(tokens)
    if words[:1] != ["train"]:
        return words
    words = ["--resume-auto" if word == "--resume=auto" else word for word in words]
    for k in range(len(words) - 1, 0, -1):
        if words[k - 1 : k + 1] == ["--resume", "auto"]:
            words[k - 1 : k + 1] = ["--resume-auto"]
    return words


def _naming_flags(error: Exception, tokens: Sequence[str]) -> Exception:
    """The error of a wrong call with the command's flags, --x, where a library names arguments, x=.

    Words of the call keep their spelling, and what a recipe's or a study's file may have set its
    name, unless the flag is in the call.
    """
    if not isinstance(error, UsageError) or not tokens or tokens[0] not in COMMANDS:
        return error
    given = {word.partition("=")[0] for word in tokens}
    by_file = tokens[0] in ("train", "study")
    flags = {}
    for argument in app[tokens[0]].assemble_argument_collection():
        flag = argument.name
        if by_file and (_is_of_a_recipe(argument) or flag not in {*given, "--splits"}):
            continue
        flags[flag.removeprefix("--").replace("-", "_")] = flag

    def as_flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags or any(word.startswith(found[0]) for word in tokens):
            return found[0]
        return flags[name] if value == "True" else f"{flags[name]} {value}"

    return UsageError(re.sub(r"(?<![^\s(])([a-z_]\w*)=([-'./\w]+)", as_flag, str(error)))


def _is_of_a_recipe(argument: Any) -> bool:
    groups = argument.parameter.group
    groups = groups if isinstance(groups, tuple) else (groups,)
    return any(getattr(group, "name", "").endswith("(recipe)") for group in groups)


def _explained(error: Exception) -> int:
    """Prints in one line what went wrong, and returns the exit code."""
    if isinstance(error, Stopped) and not isinstance(error, StudyStopped):
        _complain(f"{error}; its state is saved: continue with the same command and --resume")
        return error.exit_code
    if isinstance(error, RegardError):
        _complain(" ".join(str(error).split()))
        return error.exit_code
    if is_out_of_memory(error):
        _complain("out of memory: lower --batch-size or --size, or give --fit-memory to train")
        return 1
    if isinstance(error, OSError) and error.errno is not None:
        # the system's: a full disk, a folder that can't be written
        where = f"{error.filename}: " if error.filename is not None else ""
        _complain(f"{where}{(error.strerror or str(error)).lower()}")
        return 1
    _complain(
        f"this is a bug in Regard ({type(error).__name__}); please report it with the lines below"
    )
    traceback.print_exception(error)
    return 70


if __name__ == "__main__":
    main()
