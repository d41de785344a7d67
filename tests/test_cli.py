"""The command line as a person meets it: real processes, exit codes, one-line errors."""

import inspect
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

import regard
from regard.cli import COMMANDS, app, run_command
from regard.command_help import describe
from regard.log import info_on_stderr, show_messages
from tests.golden import authors_networks, fill
from tests.helpers import start


def run(*arguments: object, **options):
    """`regard ARGUMENTS` in a process of its own."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refused(*arguments: object, code: int = 2, **options) -> str:
    """The one line on standard error of a call that must fail without a traceback."""
    done = run(*arguments, **options)
    lines = done.stderr.splitlines()
    assert done.returncode == code, done
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("regard: ")
    return lines[0]


def imported_after(code: str) -> set[str]:
    names = "print(','.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{names}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split(","))


def test_importing_regard_or_asking_for_help_does_not_import_torch():
    heavy = {"torch", "timm", "numpy", "matplotlib", "sklearn"}
    assert not imported_after("import regard") & heavy
    ask = "from regard.cli import COMMANDS, run_command\n"
    ask += "for name in COMMANDS:\n    run_command([name, '--help'])"
    assert not imported_after(ask) & heavy


@pytest.mark.slow
def test_networks_are_registered_whichever_is_imported_first():
    for first, second in (("regard", "timm"), ("timm", "regard")):
        done = subprocess.run(
            [sys.executable, "-c", f"import {first}, {second}; timm.create_model('sononet8')"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout
    assert run("--version").stdout.strip() == regard.__version__
    script = Path(sys.executable).with_name("regard")  # as it is installed
    told = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.strip() == regard.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_its_whole_docstring_without_the_line_breaks(name):
    describe(app[name])
    printed = io.StringIO()
    app.help_print([name], console=Console(file=printed, width=2000))
    lines = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
    docstring = inspect.getdoc(app[name].default_command)
    for paragraph in docstring.partition("\n\nParameters\n")[0].split("\n\n"):
        assert " ".join(paragraph.split()) in lines
    for argument in app[name].assemble_argument_collection():
        told = " ".join((argument.parameter.help or "").split())
        assert argument.parameter.show is False or any(told in line for line in lines), told


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("demo", ""), ("shrink", " DATA OUT"), ("study", " STUDY [DATA]"), ("compare", " RUN..."),
     ("evaluate", " RUN [RUN...] [DATA]"), ("recipes", " [NAME]")],
)  # fmt: skip
def test_the_usage_of_a_command_names_its_arguments(name, arguments, capsys):
    assert run_command([name, "-h"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"Usage: regard {name} [OPTIONS]{arguments}"


def test_all_commands_are_called_alike():
    """An argument is no flag as well, and --json has no opposite."""
    for command in COMMANDS:
        for argument in app[command].assemble_argument_collection():
            if argument.field_info.is_positional:
                assert not any(name.startswith("-") for name in argument.names), command
            if argument.name == "--json":
                assert argument.names == ("--json",), command
    assert set(app["study"].assemble_argument_collection()["--log"].names) == {
        "--log", "--trackers"
    }  # fmt: skip


def test_information_is_on_standard_error_until_the_last_thread_needs_it_there(capsys):
    """One that began later ends later: its end had left all information there."""
    show_messages(force=True)
    logger = logging.getLogger("regard.somewhere")
    first, second = info_on_stderr(), info_on_stderr()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logger.info("between")
    second.__exit__(None, None, None)
    logger.info("after")
    out, err = capsys.readouterr()
    assert (out, err) == ("after\n", "between\n")


def test_a_reader_that_has_enough_is_no_fault():
    """`regard recipes NAME | head -1`, with more written than a pipe holds."""
    code = "from regard.cli import main, app\n"
    code += "app.command(lambda: print('line\\n' * 100_000), name='much')\nmain(['much'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_a_table_whose_reader_has_enough_ends_as_by_sigpipe():
    process = start("models")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_the_table_of_networks():
    done = run("models", "cbam_resnet50")
    assert done.returncode == 0
    assert "28.090" in done.stdout
    assert "28.09" in done.stdout
    assert "Woo et al." in done.stdout
    rows = json.loads(run("models", "--json").stdout)
    assert {r["name"] for r in rows} == set(regard.list_models())
    assert next(r for r in rows if r["name"] == "attention56")["parameters"] == 31_810_728


def test_recipes_are_listed_and_printed():
    listed = run("recipes").stdout
    assert "attention-cifar" in listed
    assert "quick" in listed
    assert "milestones = [64000, 96000]" in run("recipes", "attention-cifar").stdout
    assert "did you mean attention-cifar" in refused("recipes", "atention-cifar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "vgg"], "no network matches 'vgg'"),
        (["convert", "x.pth", "--model", "cbam_resnet5", "--out", "o"], "mean cbam_resnet50"),
        (["convert", "x.pth", "--model", "cbam_resnet50", "--out", "o"], "x.pth: no such file"),
        (["predict", "nowhere", "x.png"], "nowhere: no such folder"),
        (["predict", "ag_sononet9", "x.png"], "no such folder; did you mean ag_sononet8.digits?"),
        (["predict", __file__, "x.png"], "test_cli.py is a file: give a run's folder"),
        (["predict", ".", "x.png"], ". holds no trained network (no config.json)"),
        (["train", "nowhere", "--model", "ag_sononet8"], "nowhere"),
        (["train", "digits", "--model", "ag_sonnet8"], "did you mean ag_sononet8"),
        (["train", "digits", "--recipe", "quik"], "did you mean quick"),
        (["train", "digits", "--lr", "-1"], "ust be >= 0"),
        (["train", "digits", "--schedule", "linear"], "onecycle"),
        (["train", "digits", "--epochs", "2", "--steps", "3"], "give one of them"),
        (["train", "digits", "--epochs", "many"], "many"),
        (["train", "digits", "--batch-size", "16.5"], "--batch-size: unable to convert"),
        (["train", "digits", "--size", "32", "32.5"], "--size: unable to convert"),
        (["train", "digits", "--limit", "1e-1"], "--limit: unable to convert"),
        (["train", "digits", "--lr", "4_7e-3"], '--lr: unable to convert "4_7e-3" into float'),
        (["train", "digits", "--batch-size", "1_6"], '--batch-size: unable to convert "1_6" into'),
        (["train", "digits", "--size", "32", "3_2"], '--size: unable to convert "3_2"'),
        (["train", "digits", "--milestones", "1", "2_0"], '--milestones: unable to convert "2_0"'),
        (["train", "digits", "--model", "cbam_resnet18", "--arg", "reduction=1_6"], "1_6"),
        (["train", "nowhere", "--class-weights", "0=4_7"], "'0=4_7' has a weight that is not"),
        (["study", "twins", "digits", "--dry-run", "--lr", "4_7e-3"], '"4_7e-3" into float'),
        (
            ["study", "twins", "digits", "--dry-run", "--class-weights", "a=4_7, b=1"],
            "class_weights: 'a=4_7' has a weight that is not a number",
        ),
        (["study", "twins", "digits", "--dry-run", "--sampler-weights", "a=x"], "'a=x' has a"),
        (["study", "twins", "digits", "--dry-run", "--sampler-weights", "a"], "not CLASS=WEIGHT"),
        (["study", "twins", "digits", "--dry-run", "--log", "foo"], "--log foo: choose tensor"),
        (["study", "twins", "digits", "--out", __file__], "test_cli.py is a file; give a folder"),
        (["figures", "r", "--out", f"{__file__}/x"], "test_cli.py is a file; give a folder"),
        (["explain", "r", "x.png", "--out", __file__], "test_cli.py is a file; give a folder"),
        (["study", "twins", "digits", "--dry-run", "--weights", "x"], "x: no such folder"),
        (
            ["study", "insert", "digits", "--dry-run", "--model", "cbam_resnet18"],
            "this network has attention already: CBAM",
        ),
        (["train", "digits", "--model", "attention56_cifar", "--graft", "se"], "attention already"),
        (["bench", "--rounds", "1_0"], '--rounds: unable to convert "1_0" into'),
        (["evaluate", "r", "--max-fpr", "0.0_1"], '--max-fpr: unable to convert "0.0_1" into'),
        (["train", "nowhere", "--resize", "none"], 'Choose from: "squash", "crop", "pad"'),
        (["train", "nowhere", "--size", "none"], '--size: unable to convert "none"'),
        (["train", "nowhere", "--epochs", "null"], '--epochs: unable to convert "null"'),
        (["predict", "r", "x.png", "--engine", "none"], 'Choose from: "eager", "compiled"'),
        (["evaluate", "r", "--max-fpr", "none"], '--max-fpr: unable to convert "none"'),
        (["train", "digits", "more"], "['more']. (see `regard train --help`)"),
        (["shrink", "digits", "o", "--side", "10.5"], "--side: unable to convert"),
        (["train", "digits", "--bogus", "1"], "--bogus"),
        (["train", "digits", "--resume", "--out", "nowhere"], "nowhere holds no run to resume"),
        (["data", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "nowhere", "digits"], "nowhere: no such folder"),
        (["evaluate", "resnet18", "--weights", "x.pth"], "give labeled images"),
        (["compare", "nowhere", "."], "nowhere: no such folder"),
        (["calibrate", "nowhere", "--remove"], "nowhere: no such folder"),
        (["push", "nowhere", "me/it"], "nowhere: no such folder"),
        (["errors", "."], ". holds no finished run"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["report", "."], ". holds no finished run"),
        (["demo", "--epochs", "0"], "--epochs 0"),
        (["compare", "a", "b", "--seed", "-1"], '"-1" for --seed. Must be >= 0'),
        (["data", "digits", "--seed", "-1"], '"-1" for --seed. Must be >= 0'),
        (["demo", "--seed", "-1"], '"-1" for --seed. Must be >= 0'),
        (["explain", "r", "a.png", "--seed", "-1"], '"-1" for --seed. Must be >= 0'),
        (["data", "digits", "--val", "2"], "regard: --val 2.0: at least 0"),
        (["study", "twins", "digits", "--seeds", "0"], "regard: --seeds 0, folds=1: give at"),
        (["study", "twins", "digits", "--only", "3/2"], "regard: --only '3/2': give i/n"),
        (["study", "ran-1", "digits", "--model", "x"], "regard: --model 'x': only twins"),
        (["train", "digits", "--log", "foo"], "regard: --log foo: choose tensorboard"),
        (["compare", "seed=1", "b"], "regard: seed=1: no such folder"),
        (["calibrate", "nowhere"], "nowhere: no such folder"),
        (["calibrate", "ag_sononet8", "digits"], "is no folder, in which the calibration"),
        (["calibrate", "r", "--remove", "--split", "val"], "--remove: give RUN alone"),
        (["calibrate", "r", "--remove", "--tta", "flips"], "--remove: give RUN alone"),
        (["calibrate", "r", "--remove", "--no-temperature"], "--remove: give RUN alone"),
        (["calibrate", "r", "--remove", "--json"], "--remove: give RUN alone"),
        (["evaluate", "r", "--map", "a=b", "a="], "--map a=: a has another name already"),
        (["evaluate", "r", "--bands", "age=1", "Age=2"], "--bands Age=2: age has bands already"),
        (["figures", "r", "--bands", "=2"], "--bands =2: give COLUMN=A,B,C"),
        (["evaluate", ".", "--weights", "w"], "--weights w: only with the name of a network"),
        (["explain", "r", "a.png", "--baseline", "mean"], "--baseline mean: only with --score"),
        (
            ["explain", "r", "a.png", "--method", "attention", "--layer", "x"],
            "--layer x: only with --method gradcam",
        ),
        (
            ["explain", "r", "a.png", "--method", "gradcam", "--reduce", "mean"],
            "--reduce mean: only with --method attention",
        ),
        (
            ["explain", "r", "a.png", "--method", "gradcam", "--channels"],
            "--channels: only with --method attention",
        ),
        (["export", "r", "--to", "torch", "--out", "a.pt2", "--force"], "--force: only with"),
        (["bench", "--recipe", "quick"], "--recipe quick: only with --train"),
        (["study", "twins", "digits", "--slurm", "2", "--dry-run"], "--dry-run: not with --slurm"),
        (["study", "twins", "digits", "--slurm", "2", "--only", "1/2"], "--only 1/2: not with"),
        (["study", "twins", "digits", "--dry-run", "--json"], "--json: not with --dry-run"),
        (["recipes", "no.toml"], "no.toml: can't be read as a recipe (No such file or directory)"),
        (["frobnicate"], "frobnicate"),
    ],
)  # fmt: skip
def test_a_wrong_call_gets_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regard: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_and_a_run_that_has_not_ended_are_told_apart(tmp_path, capsys):
    run_folder = tmp_path / "runs" / "scans-cbam_resnet18"
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text('{"status": "running", "plan": {}, "facts": {}}')
    for command in ("report", "figures"):
        assert run_command([command, str(run_folder.with_name("scan-cbam_resnet18"))]) == 2
        assert f"no such folder; did you mean {run_folder}?" in capsys.readouterr().err
        assert run_command([command, str(run_folder)]) == 2
        assert "holds a run that has not ended: resume it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        "evaluate nowhere --subgroups site --subgroups-csv mine.csv",
        "compare a b --html mine.csv",
        "compare a b --html mine.html",
        "data nowhere --html mine.csv",
        "data nowhere --table1 mine.csv",
        "errors nowhere --html mine.csv",
        "errors nowhere --csv mine.csv",
    ],
)
def test_a_file_that_regard_did_not_write_is_not_replaced(tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    files = {"mine.csv": "path,label\na.png,cat\n", "mine.html": "<p>notes</p>\n"}
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    assert run_command(call.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{' '.join(call.split()[-2:])}: " in line
    assert "it is not replaced" in line
    assert {name: Path(name).read_text(encoding="utf-8") for name in files} == files


@pytest.mark.parametrize("call", ["compare a b --html", "errors a --html", "errors a --csv"])
def test_a_folder_that_does_not_exist_is_told_before_the_work(call, tmp_path, capsys):
    assert run_command([*call.split(), str(tmp_path / "no" / "file")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        ("explain RUN a.png --method attention gradcam", "method", ["attention", "gradcam"]),
        ("explain RUN a.png --method attention --method gradcam", "method",
         ["attention", "gradcam"]),
        ("evaluate RUN digits --map A=B C= --split test", "map", ["A=B", "C="]),
        ("evaluate RUN --map A=B --map C= --json", "map", ["A=B", "C="]),
        ("train digits --arg a=1 b=2 --lr 1", "arg", ["a=1", "b=2"]),
        ("convert a.pth --arg a=1 b=2 --arg c=3 --model m --out o", "arg", ["a=1", "b=2", "c=3"]),
    ],
)  # fmt: skip
def test_flags_of_several_values_take_several_words(arguments, name, words):
    bound = app.parse_args(arguments.split(), exit_on_error=False, print_error=False)[1]
    assert bound.arguments[name] == words


def test_no_flag_of_several_values_takes_one_word_only():
    for command in COMMANDS:
        for argument in app[command].assemble_argument_collection():
            if argument.name.startswith("--") and argument.token_count()[1]:
                assert argument.parameter.consume_multiple, f"{command} {argument.name}"


def test_a_word_none_is_a_value_where_there_is_one():
    words = ["--class-weights", "none", "--random-crop", "none", "--log", "none", "--out", "none"]
    words = ["train", "digits", *words]
    bound = app.parse_args(words, exit_on_error=False, print_error=False)[1].arguments
    assert (bound["flags"].class_weights, bound["flags"].random_crop) == ("none", "none")
    assert (bound["log"], bound["out"]) == (["none"], Path("none"))


def test_a_wrong_call_as_a_process(tmp_path):
    line = refused("train", "nowhere", "--model", "ag_sononet8", cwd=tmp_path)
    assert "nowhere" in line


# ------------------------------------------------------------------------------- convert
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An authors' file of the concat network, as nn.DataParallel saves it."""
    tensors = {
        f"module.{n}": torch.from_numpy(fill(n, s))
        for n, s in authors_networks()["ag_sononet8_concat"]["tensors"]
    }
    path = tmp_path_factory.mktemp("authors") / "ag.pth"
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    return path


def test_convert_makes_a_folder_that_timm_loads(tmp_path, checkpoint):
    done = run("convert", checkpoint, "--model", "ag_sononet8", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "aggregation=concat" in done.stdout
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    direct = regard.create_model("ag_sononet8", aggregation="concat").eval()
    regard.load_authors_weights(direct, checkpoint)
    x = torch.from_numpy(fill("input", (2, 1, 64, 80)))
    with torch.no_grad():
        assert torch.equal(loaded(x), direct(x))
        assert loaded(x).std() > 0.01


def test_convert_refuses_what_does_not_fit_and_leaves_nothing(tmp_path, checkpoint):
    line = refused("convert", checkpoint, "--model", "sononet8", "--out", tmp_path / "out")
    assert "missing: " in line
    assert "conv6_p.cb_unit.0.weight" in line
    assert "extra: " in line
    assert "compatibility_score1.psi.weight" in line
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    line = refused("convert", checkpoint, "--model", "ag_sononet8", "--out", tmp_path / "mine")
    assert "already exists" in line
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    line = refused("convert", checkpoint, "--model", "ag_sononet8", "--out", tmp_path / "o",
                   "--arg", "aggregation=sum")  # fmt: skip
    assert "aggregation='sum': choose one of concat, mean, deep_sup, ft" in line
