"""Studies: planned whole, trained in real processes, and the same after any number of kills."""

import csv
import functools
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from regard.cli import _explained, run_command
from regard.commands.study_display import StudyDisplay
from regard.cores import cores
from regard.data.sources import ImageTable
from regard.errors import StudyStopped, UsageError
from regard.evaluation import Predictions
from regard.evaluation.calibration import Calibration, write_calibration
from regard.files import signed, signed_range
from regard.papers import parse_table
from regard.runs import RunFolder, write_predictions
from regard.studies import on_ray
from regard.studies.compare_page import difference_words
from regard.studies.page import write_page
from regard.studies.plan import (
    PlannedRun,
    choose_part,
    choose_rows,
    open_study,
    plan_study,
    slurm_script,
)
from regard.studies.progress import Progress, Running
from regard.studies.results import gather, sentence, to_dict, write_results
from regard.studies.runner import is_finished, run_all
from regard.training.config import Recipe
from regard.training.recipe_files import load_recipe, recipe_toml
from tests.helpers import rows_of

TABLE = """
title = "Gates on digits"
[[rows]]
name = "plain"
network = "sononet8"
[[rows]]
name = "gated"
network = "ag_sononet8"
"""

# stands in for `regard train`: a run of a quarter second that can be killed at any moment
TRAINER = """
import json, os, pathlib, sys, time
import numpy as np
words = sys.argv[1:]
if words[0] == "evaluate":
    file = pathlib.Path(words[words.index("--predictions") + 1])
    arrays = dict(np.load(file.with_name("predictions.npz")))
    arrays["probabilities"] = np.eye(3)[arrays["labels"]] * 0.97 + 0.01
    if not file.parent.parent.with_name("fails").exists():
        np.savez(file, **arrays)
    sys.exit("regard: an image can't be read")
value = lambda flag: words[words.index(flag) + 1]
out, seed, name = pathlib.Path(value("--out")), int(value("--seed")), value("--model")
fold = int(value("--fold").split("/")[0]) if "--fold" in words else 0
out.mkdir(parents=True, exist_ok=True)
if name == "broken" and seed == 1:
    sys.exit("regard: it can not be trained")
def say(status):
    facts = {"parameters": 10, "multiply_adds": 2_500_000, "steps": 40, "epochs": 2.0}
    facts |= {"seconds": 0.1, "counts": {"train": 80}}
    run = {"status": status, "plan": {}, "facts": facts}
    (out / "run.tmp").write_text(json.dumps(run))
    (out / "run.tmp").replace(out / "run.json")
if (out / "run.json").exists():
    assert "--resume" in words
say("running")
time.sleep(0.15)
rng = np.random.default_rng([seed, fold, len(name)])
labels = np.arange(60) % 3
p = rng.dirichlet(np.ones(3), 60) + (0.6 if name != "plain" else 0.2) * np.eye(3)[labels]
p /= p.sum(axis=1, keepdims=True)
own = pathlib.Path(__file__).with_name("recipe.toml")
text = own.read_text() if own.exists() else 'schedule_unit = "steps"\\nmilestones = [20.0]\\n'
(out / "recipe.toml").write_text(text)
maps = {"Grad-CAM": {"kind": "gradcam", "over_random": {"value": 0.1}}}
if name != "sononet8":
    for k, stage in enumerate(("a", "b")):
        maps[stage] = {"kind": "attention", "over_random": {"value": 0.2 + 0.1 * seed + 0.2 * k}}
(out / "faithfulness.json").write_text(json.dumps({"images": 3, "maps": maps}))
(out / "metrics.csv").write_text("epoch,step,accuracy,val_accuracy\\n1,1,0.5,0.4\\n2,2,0.6,0.5\\n")
np.savez(out / "predictions.npz", probabilities=p, labels=labels, classes=np.array(list("abc")),
         paths=np.array([f"{fold}-{i}" for i in range(60)]), split=np.array("test"))
say("finished")
time.sleep(0.05)
(out / "cores").write_text(os.environ.get("REGARD_CORES", "all"))
(out / "report.html").write_text("")
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return [sys.executable, str(path)]


def planned(out, text=TABLE, seeds=2, folds=1):
    table = parse_table(text, "gates")
    return table, plan_study(table, "digits", out, seeds=seeds, folds=folds)


PROCESS = f"""
import pathlib, sys
from regard.papers import parse_table
from regard.studies.plan import plan_study
from regard.studies.runner import run_all
table = parse_table({TABLE!r}, "gates")
runs = plan_study(table, "digits", pathlib.Path(sys.argv[1]), seeds=int(sys.argv[2]), folds=1)
print("ready", flush=True)
run_all(runs, python=sys.argv[3:])
"""  # in a process that can be killed


def test_every_row_fold_and_seed_is_a_run_with_its_command(tmp_path):
    table, runs = planned(tmp_path, seeds=2, folds=3)
    assert len(runs) == len({run.folder for run in runs}) == 12
    assert {(r.row, r.seed, r.fold) for r in runs} == {
        (row.name, s, f) for row in table.rows for s in (0, 1) for f in (1, 2, 3)
    }
    words = runs[-1].command
    assert words[:2] == ("train", "digits")
    assert words[words.index("--fold") + 1] == "3/3"
    assert words[words.index("--seed") + 1] == "1"
    assert "--split-seed" not in words  # one for all: the test images stay


def test_shipped_studies_and_what_they_refuse():
    twins = open_study("twins", "cbam_resnet18")
    assert [row.network for row in twins.rows][-1] == "cbam_resnet18"
    assert len(twins.rows) == 3
    assert len(open_study("cbam-4").rows) == 24
    assert [r.name for r in choose_rows(open_study("cbam-3"), ["2", "in parallel"]).rows] == [
        "channel, then spatial", "in parallel",
    ]  # fmt: skip
    for call in (
        lambda: open_study("twin"),
        lambda: open_study("cbam-4", "resnet18"),
        lambda: choose_rows(open_study("cbam-3"), ["9"]),
        lambda: planned("x", seeds=0),
        lambda: choose_part([], "3/2"),
    ):
        with pytest.raises(UsageError):
            call()


def test_parts_for_an_array_of_jobs_are_all_runs_once(tmp_path):
    _, runs = planned(tmp_path, seeds=5)
    parts = [choose_part(runs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(map(str, itertools.chain(*parts))) == sorted(map(str, runs))
    assert "--array=1-3" in slurm_script(["study", "twins", "data"], 3)
    assert "--only $SLURM_ARRAY_TASK_ID/3" in slurm_script(["study", "twins", "data"], 3)


def test_a_study_is_trained_once_and_its_failures_are_listed(tmp_path, trainer, caplog):
    text = TABLE + '[[rows]]\nname = "broken"\nnetwork = "broken"\n'
    table, runs = planned(tmp_path, text)
    seen = []
    done = run_all(runs, jobs=2, python=trainer, after_each=lambda p: seen.append(p.done))
    assert (done.done, len(done.failed)) == (5, 1)
    assert list(done.failed.values()) == ["it can not be trained"]
    assert seen == sorted(seen)
    again = run_all(runs, python=trainer)
    assert again.done == 5  # the five are not trained again
    assert len(again.seconds) == 0
    result = to_dict(gather(table, runs))
    assert [len(row["seeds"]) for row in result["rows"]] == [2, 2, 1]
    assert {row["multiply_adds"] for row in result["rows"]} == {2_500_000}
    shares = {(run.folder / "cores").read_text() for run in runs if is_finished(run)}
    assert shares == {str(max(1, cores() // 2))}  # of two runs at a time
    assert list(result["failed"].values()) == ["it can not be trained"]
    write_results(gather(table, runs), tmp_path)
    write_page(gather(table, runs), tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert "it can not be trained" in page
    assert page.count("<td>0.003</td>") == 3  # billion multiply-adds
    assert page.count("<polygon") == 3


def test_folds_of_a_seed_are_compared_as_one_and_images_are_paired(tmp_path, trainer):
    table, runs = planned(tmp_path, seeds=2, folds=2)
    run_all(runs, jobs=2, python=trainer)
    result = gather(table, runs)
    assert result.images == 120
    plain, gated = result.rows
    mean = np.mean(gated.values["accuracy"]) - np.mean(plain.values["accuracy"])
    assert gated.differences["accuracy"].value == pytest.approx(mean)
    assert gated.differences["accuracy"].folds == 2
    assert plain.differences == {}


def test_a_row_is_tested_as_its_evaluation_says(tmp_path, trainer):
    """Its training's predictions stay; the other test's are what is compared."""
    text = TABLE + "evaluation = { size = [24, 32], ten_crop = true }\n"
    table, runs = planned(tmp_path, text, seeds=1)
    (tmp_path / "runs" / "fails").mkdir(parents=True)
    failed = run_all(runs, python=trainer).failed
    assert list(failed.values()) == ["an image can't be read"]  # no file, so it is not done
    (tmp_path / "runs" / "fails").rmdir()
    done = run_all(runs, python=trainer)  # the test alone is repeated
    assert (done.done, done.failed) == (2, {})
    folder = runs[1].folder
    assert {p.name for p in folder.glob("*.npz")} == {
        "predictions.npz", "predictions-24x32-ten-crop.npz",
    }  # fmt: skip
    assert runs[1].test[1:6] == (str(folder), "--size", "24", "32", "--ten-crop")
    plain, gated = gather(table, runs).rows
    assert gated.values["accuracy"] == [1.0]
    assert plain.values["accuracy"][0] < 1
    assert to_dict(gather(table, runs))["rows"][1]["evaluation"]["size"] == [24, 32]


def test_networks_that_never_differ_have_a_page_too(tmp_path, trainer):
    table, runs = planned(tmp_path, TABLE.replace("ag_sononet8", "sononet8"))
    run_all(runs, python=trainer)
    result = gather(table, runs)
    write_page(result, tmp_path)
    assert result.rows[1].differences["accuracy"].value == 0
    assert "not shown" in (tmp_path / "study.html").read_text()


@pytest.mark.parametrize(("seeds", "stated"), [(2, ["1 comparison "]), (1, [])])
def test_the_page_counts_the_comparisons_that_were_made(tmp_path, trainer, seeds, stated):
    """A row without a finished run is in none, and one training of each claims nothing."""
    table, runs = planned(tmp_path, TABLE + '[[rows]]\nname = "c"\nnetwork = "c"\n', seeds)
    run_all([run for run in runs if run.row != "c"], jobs=2, python=trainer)
    result = gather(table, runs)
    write_page(result, tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert re.findall(r"corrected for (\d+ comparisons? )", page) == stated
    for name, p in result.rows[1].p_values.items():  # of one test, as it is
        assert p == pytest.approx(result.rows[1].differences[name].p_value, nan_ok=True)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_results(tmp_path, trainer):
    def results(out):
        table, runs = planned(out, seeds=3)
        return json.dumps(to_dict(gather(table, runs))).replace(str(out), "OUT")

    _, runs = planned(tmp_path / "whole", seeds=3)
    run_all(runs, python=trainer)
    rng = random.Random(0)
    killed = 0
    while killed < 4:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path / "killed", "3", *trainer],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        try:
            process.wait(rng.uniform(0.1, 1.0))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
            process.communicate()
    subprocess.run([sys.executable, "-c", PROCESS, tmp_path / "killed", "3", *trainer], check=True)
    assert killed > 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_stopped_study_says_so_and_leaves_no_process(tmp_path, trainer, capsys):
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, tmp_path / "s", "30", *trainer],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "s").rglob("run.json")):
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "StudyStopped" in err
    assert not list((tmp_path / "s").rglob("*.progress"))
    assert _explained(StudyStopped(3, 6, signal.SIGTERM)) == 128 + signal.SIGTERM
    line = capsys.readouterr().err
    assert "3 of 6" in line
    assert "--resume" not in line  # which no study takes


SAVING = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])

def stop(*_):
    with log.open("a") as file:
        file.write("asked\\n")
    while log.read_text().count("asked") < 3:  # saves while the others do
        time.sleep(0.01)
    with log.open("a") as file:
        file.write("saved\\n")
    sys.exit(1)

signal.signal(signal.SIGTERM, stop)
with log.open("a") as file:
    file.write("up\\n")
time.sleep(60)
"""
STUDY = """
import pathlib, signal, sys
from regard.studies.plan import PlannedRun
from regard.studies.runner import run_all
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
folder = pathlib.Path(sys.argv[1])
log = str(folder / "log")
runs = [
    PlannedRun(row="r", seed=s, fold=None, folder=folder / f"{s}.run", command=(log,))
    for s in range(3)
]
def results(progress):
    if len(sys.argv) > 2 and pathlib.Path(log).read_text().count("up") == 3:
        sys.exit("StudyStopped: its results can't be written")
run_all(
    runs, jobs=3, python=(sys.executable, str(folder / "saving.py")), meanwhile=results
)
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow), None],
)
def test_the_runs_of_a_stopped_study_save_at_the_same_time(tmp_path, number):
    """Also where its terminal is closed, and where the study itself fails."""
    (tmp_path / "saving.py").write_text(SAVING)
    (tmp_path / "log").write_text("")
    command = [sys.executable, "-c", STUDY, tmp_path, *(["fails"] if number is None else [])]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as study:
        while number is not None and (tmp_path / "log").read_text().count("up") < 3:
            assert study.poll() is None
            time.sleep(0.02)
        if number is not None:
            study.send_signal(number)
        _, told = study.communicate(timeout=60)
    assert (tmp_path / "log").read_text().splitlines()[3:] == ["asked"] * 3 + ["saved"] * 3
    assert "StudyStopped" in told.decode()


def test_rows_of_other_folds_are_not_paired(tmp_path, trainer):
    """Another split_seed divides the same images into other folds."""
    table, runs = planned(tmp_path, seeds=1, folds=2)
    run_all(runs, python=trainer)
    gather(table, runs)
    first, second = (run.folder / "predictions.npz" for run in runs if run.row == "gated")
    (name, a), (_, b) = (RunFolder(path.parent).read_predictions() for path in (first, second))
    assert a.paths
    assert b.paths
    swapped = [b.paths[0], *a.paths[1:]], [a.paths[0], *b.paths[1:]]
    for path, said, paths in zip((first, second), (a, b), swapped, strict=True):
        write_predictions(path, name, replace(said, paths=paths))
    with pytest.raises(UsageError, match="in different folds: their differences would not be"):
        gather(table, runs)


def test_the_command_plans_and_refuses(tmp_path, capsys):
    path = tmp_path / "gates.toml"
    path.write_text(TABLE)
    assert (
        run_command(["study", str(path), "digits", "--seeds", "2", "--dry-run", "--size", "16"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("--size 16" in line for line in lines)
    assert run_command(["study", str(path), "digits", "--seed", "3"]) == 2
    assert "--seeds" in capsys.readouterr().err
    assert run_command(["study", str(path)]) == 2
    assert "DATA" in capsys.readouterr().err


RAY = """
import json, pathlib, sys
import ray
from ray.cluster_utils import Cluster
from tests.test_studies import planned
from regard.studies.on_ray import run_on_ray
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
_, runs = planned(pathlib.Path(sys.argv[1]), sys.argv[2])
most = []
done = run_on_ray(
    runs, address=cluster.address, python=sys.argv[3:],
    meanwhile=lambda progress: most.append(len(progress.running)),
)
print(json.dumps([done.done, list(done.failed.values()), max(most)]))
ray.shutdown()  # a cluster removes no node that this process is connected to
cluster.shutdown()
"""


def test_on_a_ray_cluster_of_two_nodes_it_has_the_same_results(tmp_path, trainer):
    """The first run kills its Ray worker once, and is trained again; a failed run is listed."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    text = TABLE + '[[rows]]\nname = "broken"\nnetwork = "broken"\n'
    table, runs = planned(tmp_path / "whole", text)
    run_all(runs, jobs=2, python=trainer)
    path = tmp_path / "killing.py"
    path.write_text(TRAINER.replace('say("running")', f"""say("running")
import os
mark = pathlib.Path({str(tmp_path / "killed")!r})
if not mark.exists():
    mark.touch()
    os.kill(os.getppid(), 9)
"""))  # fmt: skip
    words = [sys.executable, "-c", RAY, str(tmp_path / "ray"), text, sys.executable, str(path)]
    cwd = Path(__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    finished, failed, most = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "killed").exists()
    assert (finished, failed, most) == (5, ["it can not be trained"], 2)
    _, others = planned(tmp_path / "ray", text)
    results = [
        json.dumps(to_dict(gather(table, each))).replace(str(tmp_path / name), "OUT")
        for name, each in (("whole", runs), ("ray", others))
    ]
    assert results[0] == results[1]


def test_what_fails_in_a_ray_task_is_no_worker_that_died(tmp_path):
    """A node without the study's folder, for example."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        cause = NotADirectoryError(20, "Not a directory", "/study")

    def get(error):
        raise error

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    ray, (run, *_) = SimpleNamespace(exceptions=exceptions, get=get), planned(tmp_path, TABLE)[1]
    told = on_ray._failure(ray, RayTaskError(), run)
    assert told == "its task failed ([Errno 20] Not a directory: '/study')"
    told = on_ray._failure(ray, RayError(), run)
    assert told == "its worker died, even after 3 retries (RayError)"


@pytest.fixture
def command(tmp_path, trainer, monkeypatch):
    """`regard study` on a file in a folder of its own, with the stand-in for `regard train`."""
    from regard.studies import runner

    monkeypatch.setattr(runner, "run_all", functools.partial(run_all, python=trainer))
    path = tmp_path / "gates.toml"
    path.write_text(TABLE)
    recipe = load_recipe("quick").changed(pretrained="no").for_start(random=True)
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe))

    def call(*words: str, out: str = "s") -> tuple[int, dict]:
        code = run_command(
            ["study", str(path), "digits", "--seeds", "2", "--out", str(tmp_path / out), *words]
        )
        file = tmp_path / out / "study.json"
        text = file.read_text().replace(str(tmp_path / out), "OUT") if file.is_file() else "{}"
        return code, json.loads(text)

    return call


@pytest.mark.slow
def test_parts_of_an_array_of_jobs_end_in_one_result(command, tmp_path, capsys):
    """As SLURM runs the printed script; the last to end has what all have trained."""
    with (tmp_path / "gates.toml").open("a") as file:
        file.write('[[rows]]\nname = "broken"\nnetwork = "sononet16"\n')
    trainer = tmp_path / "trainer.py"
    trainer.write_text(trainer.read_text().replace('"broken"', '"sononet16"'))
    assert command(out="whole")[0] == 1
    script = slurm_script(["study", "x"], 2)
    part = re.search(r"--only (\S+)", script)[1]
    jobs = [
        threading.Thread(target=command, args=("--only", part.replace("$SLURM_ARRAY_TASK_ID", i)))
        for i in ("1", "2")
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    whole, parts = (
        json.loads((tmp_path / out / "study.json").read_text().replace(str(tmp_path / out), "OUT"))
        for out in ("whole", "s")
    )
    assert parts == whole
    assert (whole["done"], len(whole["failed"])) == (5, 1)


def test_runs_in_different_precisions_are_told(command, tmp_path, capsys):
    """precision=auto is bf16 on one machine of an array of jobs, and fp32 on another."""
    assert command()[0] == 0
    files = sorted(tmp_path.glob("s/runs/*/seed-*/run.json"))
    for used, expected in (
        (["bf16"] * 4, {}),
        (["bf16", "fp32", "bf16", "bf16"], {"bf16": 3, "fp32": 1}),
    ):
        for file, precision in zip(files, used, strict=True):
            run = json.loads(file.read_text())
            run["facts"]["precision"] = precision
            file.write_text(json.dumps(run))
        capsys.readouterr()
        code, written = command()
        assert (code, written["precisions"]) == (0, expected)
        told = "not computed alike (3 in bf16 and 1 in fp32)"
        for text in (capsys.readouterr().out, (tmp_path / "s/study.html").read_text("utf-8")):
            assert (told in text) is bool(expected)


def test_an_interval_without_zero_does_not_seem_to_have_it():
    assert signed_range(-0.0016, -0.0029, -0.000285, 3) == ("-0.0016", "-0.0029", "-0.0003")
    assert signed_range(0.4, 0.04, 0.8, 1) == ("+0.40", "+0.04", "+0.80")
    assert signed_range(0.4, -0.04, 0.8, 1) == ("+0.4", "+0.0", "+0.8")
    assert signed_range(0.4, 0.1, 0.8, 1) == ("+0.4", "+0.1", "+0.8")
    assert signed_range(1e-18, 1e-19, 2e-18, 1) == ("+0.0000",) * 3
    barely = SimpleNamespace(value=0.004, low=0.0004, high=0.008, claims=True, metric="accuracy")
    assert sentence("gated", barely, 0.04) == (
        "gated is shown to be better: +0.40 points (95 % interval +0.04 to +0.80)."
    )
    words = difference_words({"value": 0.002, "low": 0.00003, "high": 0.004})
    assert words == "+0.00200 (+0.00003 to +0.00400)"
    assert difference_words({"value": 0.002, "low": None, "high": None}) == "+0.0020"


def test_a_difference_of_zero_has_no_minus():
    assert [signed(x, 1) for x in (-1.85e-18, -0.04, 0.0, -0.05001)] == ["+0.0"] * 3 + ["-0.1"]
    zero = SimpleNamespace(value=-1.8e-18, low=-2e-18, high=-0.0, claims=False, metric="accuracy")
    assert sentence("gated", zero, 1.0).startswith(
        "gated: +0.0 points (95 % interval +0.0 to +0.0) with one training"
    )


def test_faithfulness_at_different_temperatures_is_told(command, tmp_path, capsys):
    assert command()[0] == 0
    assert "temperatures" not in capsys.readouterr().out
    file = next(iter(sorted(tmp_path.glob("s/runs/*/seed-*/faithfulness.json"))))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 1.7}))
    assert command()[0] == 0
    assert "faithfulness of maps was measured at 2 temperatures" in capsys.readouterr().out


def test_the_slurm_script_has_the_command_without_its_own_flag(capsys, tmp_path):
    path = tmp_path / "my study.toml"
    path.write_text(TABLE)
    words = ["study", str(path), "digits", "--seeds", "3"]
    for own in (["--slurm", "3"], ["--slurm=3"]):
        assert run_command([*words[:3], *own, *words[3:]]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert shlex.split(last)[:-1] == ["exec", "regard", *words, "--only"]


def test_a_recipe_of_ones_own_trains_all_rows(command, tmp_path, capsys):
    code, _ = command("--recipe", "attention-cifar", "--epochs", "10", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert (code, len(lines)) == (0, 4)
    for line in lines:
        words = shlex.split(line)
        assert words.count("--recipe") == 1
        assert words[words.index("--recipe") + 1] == "attention-cifar"
        assert "--epochs 10" in line
    with (tmp_path / "gates.toml").open("a") as file:
        file.write('recipe = "demo"\nchanges = { lr = 0.02, nesterov = false }\n')
    command("--recipe", "attention-cifar", "--dry-run", "--root", "d", "--pretrained", "yes")
    line = capsys.readouterr().out.splitlines()[1]
    assert "--recipe attention-cifar" in line
    assert "--lr 0.02 --no-nesterov --root d" in line
    assert "--pretrained yes" in line


@pytest.mark.parametrize(
    ("row", "flags", "word"),
    [
        ("", ["--recipe", "quik"], "quick"),
        ("changes = { lrr = 1 }", [], "lrr"),
        ("changes = { lr = 'x' }", [], "lr"),
        ("changes = { seed = 5 }", [], "changes can't set seed, --seeds sets it"),
        ("changes = { fold = '1/3' }", [], "changes can't set fold, --folds sets it"),
        ("changes = { model = 'sononet8' }", [], "changes can't set model, network sets it"),
        ("changes = { random_start = { lr = 1.0 } }", [], "changes can't set random_start"),
        ("changes = { lr = 0.1 }", ["--lr", "0.2"], "gated"),
        ("changes = { milestones = [5] }", [], "onecycle"),
        ("changes = { epochs = 20, schedule = 'steps', milestones = [5] }",
         ["--schedule", "cosine"], "sets schedule"),
        ("arguments = { gates = 3 }", [], "gates"),
        ("", ["--epochs", "0"], "epochs"),
        ("", ["--jobs", "2", "--ray", "auto"], "--ray"),
        ("", ["--only", "5/4"], "5/4"),
        ("", ["--slurm", "0"], "slurm"),
    ],
)  # fmt: skip
def test_what_no_run_could_do_is_refused_before_the_first(command, tmp_path, capsys, row, flags,
                                                          word):  # fmt: skip
    with (tmp_path / "gates.toml").open("a") as file:
        file.write(f"{row}\n")
    assert command(*flags)[0] == 2
    err = capsys.readouterr().err
    assert word in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_rows_of_several_data_sets_are_not_compared(capsys):
    assert run_command(["study", "ran-6", "--dry-run"]) == 2
    err = capsys.readouterr().err
    rows = re.search(r"cifar100: rows ([\d ]+)", err)[1].split()
    assert run_command(["study", "ran-6", "--dry-run", "--seeds", "1", "--rows", *rows]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)
    assert all(line.split()[2] == "cifar100" for line in lines)
    assert run_command(["study", "ran-6", "digits", "--dry-run", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("regard train")]
    assert len({line.partition(" --out ")[0] for line in commands}) == len(commands)  # none twice
    assert run_command(["study", "twins", "no/such/folder", "--dry-run"]) == 2
    assert "no/such/folder" in capsys.readouterr().err
    assert run_command(["study", "ag-main", "--dry-run"]) == 2
    assert "DATA" in capsys.readouterr().err


def test_results_have_paper_and_ours_faithfulness_length_and_intervals(tmp_path, trainer):
    text = TABLE.replace('"ag_sononet8"', '"ag_sononet8"\npaper = { top1_error = 5.52 }')
    table, runs = planned(tmp_path, text)
    run_all(runs, python=trainer)
    base = {"name": "long", "steps": 400, "epochs": None}
    result = gather(table, runs, {row.name: base for row in table.rows})
    plain, gated = result.rows
    # the mean over the stages of each seed, and none for a network without maps
    assert gated.faithfulness["attention"] == pytest.approx([0.3, 0.4])
    assert gated.sd("attention") == pytest.approx(np.std([0.3, 0.4], ddof=1))
    assert "attention" not in plain.faithfulness
    assert plain.faithfulness["Grad-CAM"] == pytest.approx([0.1, 0.1])
    error = 100 * (1 - np.array(gated.values["accuracy"]))
    assert gated.printed["top1_error"] == pytest.approx(error)
    low, high = gated.intervals["accuracy"].low, gated.intervals["accuracy"].high
    assert low < np.mean(gated.values["accuracy"]) < high
    assert np.mean(list(gated.recalls.values()), axis=0) == pytest.approx(
        gated.values["balanced accuracy"]
    )
    assert gated.length.milestones == (1.0,)  # step 20 of 40 in 2 epochs
    assert "400 steps" in gated.length.sentence()
    write_results(result, tmp_path)
    write_page(result, tmp_path)
    with (tmp_path / "study.csv").open(newline="") as file:
        head = next(csv.reader(file))
        file.seek(0)
        one, two = csv.DictReader(file)
    assert len(head) == len(set(head))
    assert one["attention faithfulness"] == ""
    assert float(two["attention faithfulness"]) == pytest.approx(0.35)
    assert float(two["attention faithfulness sd"]) == pytest.approx(0.0707, abs=1e-4)
    assert float(two["accuracy low"]) == pytest.approx(low, rel=1e-4)
    row = to_dict(result)["rows"][1]
    assert row["faithfulness"]["attention"]["mean"] == pytest.approx(0.35)
    assert row["length"]["recipe_length"] == "400 steps"
    page = (tmp_path / "study.html").read_text()
    assert "+0.350 ± 0.071" in page
    assert "+0.100 ± 0.000" in page
    assert "5.52" in page
    assert f"{error.mean():.2f} ± " in page


# ------------------------------------------------------------------------- how far it is
def test_time_left_is_of_finished_runs_and_of_those_under_way(tmp_path, monkeypatch):
    from regard.studies import progress as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    _, runs = planned(tmp_path, seeds=3)  # plain, gated, plain, gated, plain, gated
    state = Progress(6, jobs=1, waiting=list(runs[1:]), running={runs[0]: Running(runs[0], 1000.0)})
    state.look()
    assert state.left() is None  # nothing is known yet
    assert state.running[runs[0]].phase == "starting"
    runs[0].progress_file.parent.mkdir(parents=True)
    for seconds, step in ((10, 0), (20, 25)):
        now[0] = 1000.0 + seconds
        runs[0].progress_file.write_text(f"{step} 100\n")
        state.look()
    # 25 steps in 10 s: 30 s left; a whole run takes 50 s, and five wait
    assert state.left() == pytest.approx(30 + 5 * 50)
    del state.running[runs[0]]
    state.seconds[runs[0]], state.earlier[runs[1]] = 40.0, 100.0
    state.waiting = runs[2:]
    assert state.left() == pytest.approx(2 * 40 + 2 * 100)  # each row by its own
    state.jobs = 2
    assert state.left() == pytest.approx((2 * 40 + 2 * 100) / 2)
    state.waiting = []
    assert state.left() == 0


def test_a_training_says_how_far_it_is_to_who_started_it(tmp_path, monkeypatch):
    from regard.runs import PROGRESS, read_progress
    from regard.training.progress import Display

    path = tmp_path / "a run.progress"
    monkeypatch.setenv(PROGRESS, str(path))
    trainer = SimpleNamespace(
        step=3, total=30, steps_an_epoch=10, seconds=1.0, waited=0.0, images_a_step=4
    )
    with Display(trainer, SimpleNamespace(close=lambda: None)) as display:
        assert read_progress(path) == (3, 30)
        trainer.step = 30
        display.step(0.5)
    assert read_progress(path) == (30, 30)
    path.write_text("damaged")
    assert read_progress(path) is None
    monkeypatch.setenv(PROGRESS, str(tmp_path / "nowhere" / "x"))
    display.step(0.5)  # a file that can't be written ends no training


def test_a_training_shows_its_speed_without_evaluations_and_its_time_with_them(caplog, monkeypatch):
    from regard.training import progress
    from regard.training.steps import StepPlan

    caplog.set_level("INFO", "regard")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    trainer = SimpleNamespace(
        step=10, total=50, steps_an_epoch=10, seconds=20.0, waited=2.0,
        steps=StepPlan(count=40, batch=4),
    )  # fmt: skip
    row = {"loss": 1.0, "accuracy": 0.5}
    with progress.Display(trainer, SimpleNamespace(close=list, log=lambda *_: None)) as display:
        now[0] += 7.0  # resumed, it evaluates first
        display.evaluated(row)
        now[0] += 13.0
        trainer.step, trainer.seconds = 20, 25.0
        display.evaluated(row)
    before, after = (record.getMessage() for record in caplog.records)
    assert before.endswith("2 images/s  10% waiting  1 min 20 s left")  # 40 steps of 2 s
    assert after.endswith("8 images/s  8% waiting  1 min 0 s left")  # 10 steps in 20 s, 5 of them


def test_the_display_has_runs_failures_time_left_and_the_table(tmp_path, trainer, caplog):
    from rich.console import Console

    caplog.set_level("INFO", "regard")
    table, runs = planned(tmp_path, seeds=1)
    run_all(runs, python=trainer)
    _, more = planned(tmp_path, seeds=2)
    under_way = Running(more[2], step=40, total=100)
    state = Progress(
        4, waiting=[], running={more[2]: under_way}, done=2, failed={more[3]: "no [memory]"}
    )
    state.earlier = {more[0]: 600.0}
    display = StudyDisplay()
    display.results(gather(table, more))
    screen = Console(record=True, width=100, file=io.StringIO())
    screen.print(display._frame(state))
    text = screen.export_text()
    assert "2 of 4 runs done, 1 failed, 1 running; about 10 min" in text
    assert "step 40/100" in text
    assert "no [memory]" in text
    assert re.search(r"gated\s+1/2\s+[\d.]+ %\s+[+-][\d.]+ \(", text)
    caplog.clear()
    display.show(state, now=True)  # without a terminal
    display.show(state)  # within a minute: not again
    assert len(caplog.messages) == 1
    assert "40/100 steps" in caplog.text


def test_a_study_in_a_pipe_says_what_ended_and_json_stays_alone(command, capsys):
    code, content = command("--json")
    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out)["done"] == content["done"] == 4
    assert "gated, seed-1: done" in err
    assert "gated: 2 of 2 seeds, accuracy" in err
    assert command()[0] == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out


def test_rows_that_leave_the_values_for_random_weights_are_named(command, tmp_path, caplog):
    command("--dry-run")
    assert "random_start" not in caplog.text
    with (tmp_path / "gates.toml").open("a") as file:
        file.write('[[rows]]\nname = "faster"\nnetwork = "sononet16"\nchanges = { lr = 0.02 }\n')
    command("--dry-run")
    assert "faster: trained from random weights without the recipe's [random_start]" in caplog.text
    caplog.clear()
    command("--dry-run", "--optimizer", "sgd")  # no row has them then
    assert "random_start" not in caplog.text


def test_a_run_that_was_killed_before_its_report_is_finished_first(tmp_path, trainer):
    """Its report writes the scores of its maps last: without them the results would differ."""
    table, runs = planned(tmp_path, seeds=1)
    run_all(runs, python=trainer)
    whole = to_dict(gather(table, runs))
    for name in ("report.html", "faithfulness.json"):
        (runs[1].folder / name).unlink()
    assert to_dict(gather(table, runs))["done"] == 1
    run_all(runs, python=trainer)
    assert to_dict(gather(table, runs)) == whole


@pytest.fixture
def edited(tmp_path, monkeypatch, capsys):
    """A study of two real trainings in this process; called again with what has changed."""
    from regard.commands import train as train_command
    from regard.studies import runner

    def empty_report(folder, _):  # a run is finished when its report is there
        (folder / "report.html").write_text("")
        return folder / "report.html"

    monkeypatch.setattr(train_command, "_report", empty_report)

    def train(runs, **_):
        waiting = [run for run in runs if not is_finished(run)]
        assert all(run_command([*run.command]) == 0 for run in waiting)
        return Progress(len(runs), 1, [], done=len(runs))

    monkeypatch.setattr(runner, "run_all", train)
    files = {
        "r.toml": "steps = 3\nbatch_size = 32\nschedule = 'steps'\nmilestones = [1]\n"
        "schedule_unit = 'steps'\neval_every = 9\nsize = 16\n",
        "s.toml": "recipe = 'r.toml'\n"
        + "".join(
            f"[[rows]]\nname = '{name}'\nnetwork = 'plain_resnet18'\n"
            f"arguments = {{ channels = [{c}, 8, 8, 8] }}\n"
            for name, c in (("A", 4), ("B", 6))
        ),
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def call(*words, data="digits", **changes):
        for name, text in files.items():
            old, new = changes.get(name[0], ("", ""))
            assert old in text
            Path(name).write_text(text.replace(old, new), encoding="utf-8")
        capsys.readouterr()
        words = [
            "study",
            "s.toml",
            data,
            "--out",
            "my st",
            "--faithfulness-images",
            "0",
            *words,
        ]
        return run_command([*words, "--log", "none", "--device", "cpu"]), capsys.readouterr().err

    return call


def test_runs_of_another_recipe_are_not_pooled(edited):
    """Its file may have been edited since, as the study's file; other rows may be the last's."""
    assert edited("--seeds", "1", "--steps", "6", "--rows", "A")[0] == 0
    assert edited("--seeds", "1", "--steps", "6", "--rows", "B")[0] == 0
    first = ("--seeds", "1", "--steps", "6")
    # the same call, and what only the machine asks for
    assert edited(*first, "--workers", "0", "--memory", "yes", "--save-minutes", "9")[0] == 0
    written = json.loads(Path("my st/study.json").read_text("utf-8"))
    assert written["rows"][0]["length"]["steps"] == 6
    assert written["done"] == 2
    scaled = load_recipe("my st/runs/a/seed-0/recipe.toml").milestones
    assert scaled == (2.0,)  # to 6 of the recipe's 3 steps
    for words, changes, value in (
        (first, {"r": ("32", "16")}, "batch_size=32"),
        (first, {"r": ("[1]", "[2]")}, "milestones=2, and this call asks for milestones=4"),
        (first, {"r": ("eval_every", "lr = 0.3\neval_every")}, "lr=0.1"),
        (first, {"s": ("[6, 8", "[7, 8")}, "channels=6 8"),
        (first, {"s": ("plain_resnet18", "se_resnet18")}, "model=plain_resnet18"),
        (("--seeds", "1", "--steps", "3", "--rows", "A"), {}, "steps=6"),
        (("--seeds", "2", "--epochs", "1"), {}, "epochs=none"),
    ):
        code, err = edited(*words, **changes)
        last = err.splitlines()[-1]
        assert code == 2
        assert err.count("regard: ") == 1
        assert value in last
        assert str(Path("my st/runs")) in last
    assert not Path("my st/runs/a/seed-1").exists()
    os.replace("my st/study.json", "gone.json")  # which remembers the last call's rows alone
    assert edited("--seeds", "1", "--steps", "3")[0] == 2
    # whoever gathers them without the command
    table = open_study("s.toml")
    runs = plan_study(table, "digits", Path("my st"), seeds=2, folds=1)
    other = runs[2].folder
    shutil.copytree(runs[0].folder, other)
    text = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(text.replace("steps = 6", "steps = 9"))
    with pytest.raises(UsageError, match="steps=9"):
        gather(table, runs)
    (other / "recipe.toml").write_text(text)  # by --pretrained auto, once there were weights
    facts = json.loads((other / "run.json").read_text("utf-8"))
    facts["plan"]["weights"] = "attention56_cifar.cifar10"
    (other / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UsageError, match=r"weights=attention56_cifar.cifar10, and .* weights=none"):
        gather(table, runs)


def test_runs_of_other_data_are_not_passed_off(edited, scans):
    """Relabelled, of another folder of the same name, or changed between two runs."""
    for place in ("here", "there"):
        shutil.copytree(scans, Path(place) / "few")
    (Path("there") / "few/0/00.png").unlink()
    first = ("--seeds", "1", "--steps", "1", "--rows")
    data = str(Path("here/few").resolve())
    assert edited(*first, "A", data=data)[0] == 0
    assert edited(*first, "A", data=str(Path("here/few")))[0] == 0  # by another path
    code, err = edited(*first, "A", data=str(Path("there/few").resolve()))
    assert code == 2
    assert f"data={data}" in err.splitlines()[-1]
    assert edited(*first, "A", "--pretrained", "yes", data=data)[0] == 2
    os.replace("here/few/0/00.png", "here/few/1/new.png")
    code, err = edited(*first, "A", data=data)
    assert code == 2
    assert "the data changed (" in err.splitlines()[-1]
    os.replace("here/few/1/new.png", "here/few/0/moved.png")
    assert edited(*first, "A", data=data)[0] == 0  # the same images by other names
    os.replace("here/few/0/moved.png", "here/few/0/00.png")
    shutil.copy("here/few/0/01.png", "here/few/0/00.png")  # the name stays, the image does not
    assert edited(*first, "A", data=data)[0] == 0  # nothing is left to train with it
    code, err = edited("--seeds", "2", "--steps", "1", "--rows", "A", data=data)
    assert code == 2
    assert "the data changed (0/00.png has another content)" in err.splitlines()[-1]
    assert not Path("my st/runs/a/seed-1").exists()
    code, err = edited(*first, "B", data=data)
    assert code == 0  # the first row is not looked at
    code, err = edited(*first[:-1], data=data)
    assert code == 2
    assert "0/00.png has another content in each" in err.splitlines()[-1]


def test_images_that_changed_their_split_are_told(edited, scans):
    """Of a CSV file that gives all of them, and of one that now gives those that were drawn."""
    few = sorted(scans.rglob("*.png"))[::4]

    def listed(split) -> None:
        rows = [f"{p},{p.parent.name},{split(i)}\n" for i, p in enumerate(few)]
        Path("few.csv").write_text("path,label,split\n" + "".join(rows), encoding="utf-8")

    words = ("--steps", "1", "--rows", "A", "--seeds")
    for before, after in (
        (lambda i: ("train", "val", "test")[i % 3], lambda i: ("val", "train", "test")[i % 3]),
        (lambda i: "", lambda i: ("train", "val", "test")[i % 3]),
    ):
        listed(before)
        assert edited(*words, "1", data="few.csv")[0] == 0
        assert edited(*words, "1", data="few.csv")[0] == 0
        listed(after)
        for seeds in ("1", "2"):
            code, err = edited(*words, seeds, data="few.csv")
            assert code == 2
            assert re.search(r"before the data changed \(the split of .* was \w+ and is \w+\)", err)
        assert not Path("my st/runs/a/seed-1").exists()
        shutil.rmtree("my st")
    listed(lambda i: "")
    folds = (*words, "1", "--folds", "2")
    assert edited(*folds, data="few.csv")[0] == 0
    assert edited(*folds, data="few.csv")[0] == 0
    listed(lambda i: ("train", "val", "test")[i % 3])
    code, err = edited(*folds, data="few.csv")
    assert code == 2
    assert "before the data changed (few.csv: already has splits" in err


def test_rows_of_other_input_channels_are_told(edited):
    words = ("--steps", "1", "--rows", "A", "--seeds")
    assert edited(*words, "1", s=("[4, 8", "[4, 8"))[0] == 0
    code, err = edited(*words, "2", s=("channels = [4", "in_chans = 3, channels = [4"))
    assert code == 2
    assert "channels=1, and this call asks for channels=3" in err.splitlines()[-1]
    # the channels of its images, by name
    assert edited(*words, "1", s=("channels = [4", "in_chans = 1, channels = [4"))[0] == 0
    code, err = edited(
        *words, "1", "--channels", "3", s=("channels = [4", "in_chans = 1, channels = [4")
    )
    assert code == 2
    assert "row 'A': in_chans=1 and channels=3: give one of them" in err


def test_a_schedule_edited_while_a_run_was_stopped_is_told(edited):
    """Its length is known from its splits: nothing of it is measured yet."""
    words = ("--steps", "6", "--rows", "A", "--seeds")
    assert edited(*words, "1")[0] == 0
    path = Path("my st/runs/a/seed-0/run.json")
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "status": "running", "facts": {}}), encoding="utf-8")
    for was, now in (("[1]", "[2]"), ("[1]", "[1.004]")):
        code, err = edited(*words, "2", r=(was, now))
        assert code == 2
        assert "milestones=2, and this call asks for milestones=" in err.splitlines()[-1]
    assert not Path("my st/runs/a/seed-1").exists()


def test_images_that_came_after_a_limited_run_are_told(edited, scans):
    """They would have been chosen among, so the next run would train on others."""
    shutil.copytree(scans, "few")
    words = ("--steps", "1", "--limit", "8", "--rows", "A", "--seeds")
    assert edited(*words, "1", data="few")[0] == 0
    assert edited(*words, "1", data="few")[0] == 0
    for i in range(40):
        shutil.copy("few/0/00.png", f"few/0/a{i}.png")
    code, err = edited(*words, "2", data="few")
    assert code == 2
    assert "the data changed (" in err.splitlines()[-1]


def test_a_rows_folder_does_not_depend_on_which_rows_are_chosen(tmp_path):
    table = parse_table(TABLE.replace("plain", "注意力").replace("gated", "基线"), "gates")
    names = [row.name for row in table.rows]
    folders = [{r.row: r.folder for r in plan_study(t, "digits", tmp_path, seeds=1, folds=1)}
               for t in (table, choose_rows(table, [names[1]]))]  # fmt: skip
    assert folders[1] == {names[1]: folders[0][names[1]]}
    assert len(set(folders[0].values())) == len(names)


def test_runs_that_chose_other_sizes_on_other_machines_are_not_compared(tmp_path, trainer):
    table, runs = planned(tmp_path, seeds=1)
    run_all(runs, python=trainer)

    def chosen(run, name, height):
        content = json.loads((run.folder / "run.json").read_text())
        content["plan"] = {
            "model": name, "model_args": {}, "preprocess": {"input_size": [1, height, height]},
        }  # fmt: skip
        (run.folder / "run.json").write_text(json.dumps(content))

    chosen(runs[0], "sononet8", 128)
    chosen(runs[1], "ag_sononet8", 128)
    assert gather(table, runs).done == 2
    chosen(runs[1], "attention56_cifar", 32)  # for images of that size
    assert gather(table, runs).done == 2
    chosen(runs[1], "ag_sononet8", 224)
    with pytest.raises(UsageError, match=r"224x224 pixels, but .* at 128x128"):
        gather(table, runs)
    own = f"size = [224, 224]\n{(runs[1].folder / 'recipe.toml').read_text()}"
    (runs[1].folder / "recipe.toml").write_text(own)
    assert gather(table, runs).done == 2


def test_the_stated_length_is_of_all_runs(tmp_path, trainer):
    table, runs = planned(tmp_path)
    run_all(runs, python=trainer)
    path = runs[2].folder / "run.json"
    content = json.loads(path.read_text())
    content["facts"] |= {"steps": 48, "counts": {"train": 96}}
    path.write_text(json.dumps(content))
    length = gather(table, runs).rows[0].length
    assert (length.steps, length.images, length.most) == (40, 80, (48, 2.0, 96))
    assert "40 to 48 steps" in length.sentence()
    assert "2 epochs" in length.sentence()


def test_images_are_paired_by_their_content(whole, scans, tmp_path, monkeypatch, capsys):
    """Whatever DATA was called, and wherever it was, a path is no proof of an image."""
    from regard.studies import cost

    fixed = cost.Cost(parameters=10, macs=20, ms_an_image=1.0, ms_a_step=None)
    monkeypatch.setattr(cost, "measure_costs", lambda folders: [fixed] * len(folders))
    other = shutil.copytree(whole, tmp_path / "other")
    split, said = RunFolder(whole).read_predictions()
    paths = [str(Path(path).relative_to(scans.parent)) for path in said.paths]  # of DATA "scans"
    write_predictions(other / "predictions.npz", split, replace(said, paths=paths))
    call = ["compare", str(whole), str(other), "--metric", "top1", "--json"]
    capsys.readouterr()
    assert run_command(call) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24
    write_predictions(other / "predictions.npz", split, said)
    tested = next(r for r in rows_of(other / "splits.csv") if r["split"] == "test")
    text = (other / "splits.csv").read_text().replace(tested["content"], "0" * 15 + "1")
    (other / "splits.csv").write_text(text)  # another image has its name
    assert run_command(call) == 2
    assert "different images (1 of 24 are missing" in capsys.readouterr().err


def test_copies_of_an_image_are_told_apart_by_label_and_name(tmp_path):
    rows = ["b.png,x,test,,7", "a.png,y,test,,7", "c.png,x,test,,", "n/b.png,x,train,,9"]
    (tmp_path / "splits.csv").write_text("\n".join(["path,label,split,group,content", *rows]))
    paths, file = [f"/d/{name}.png" for name in "bac"], tmp_path / "predictions.npz"
    said = Predictions(np.eye(2)[[0, 1, 0]], [0, 1, 0], ["x", "y"], None, paths)
    write_predictions(file, "test", said)
    found = RunFolder(tmp_path).read_named()[1]
    assert found.paths == [f"{7:016x} 1", f"{7:016x} 2", "c.png"]
    write_predictions(file, "test", replace(said, paths=["b.png", "x", "y"]))
    assert RunFolder(tmp_path).read_named()[1].paths == ["b.png", "x", "y"]


def test_compare_pairs_images_and_refuses_others(tmp_path, trainer, capsys, monkeypatch):
    _, runs = planned(tmp_path, seeds=1)
    run_all(runs, python=trainer)
    plain, gated = (str(run.folder) for run in runs)
    from regard.studies import cost

    fixed = cost.Cost(parameters=10, macs=20, ms_an_image=1.0, ms_a_step=None)
    monkeypatch.setattr(cost, "measure_costs", lambda folders: [fixed] * len(folders))
    page = tmp_path / "c.html"
    capsys.readouterr()
    call = ["compare", plain, gated, "--metric", "top1", "nll", "--json", "--html", str(page)]
    assert run_command(call) == 0
    content = json.loads(capsys.readouterr().out)
    top1, nll = content["comparisons"]
    assert top1["difference"]["value"] == pytest.approx(top1["a"] - top1["b"])
    assert top1["difference"]["low"] <= top1["difference"]["value"] <= top1["difference"]["high"]
    assert 0 <= top1["p_value"] <= top1["adjusted"] <= 1
    assert nll["shown"] in ("better", "worse", "not shown")
    assert top1["sentence"] in page.read_text().replace("&#39;", "'")
    other = tmp_path / "other"
    shutil.copytree(gated, other)
    assert "stored temperature" not in capsys.readouterr().err
    write_calibration(other, Calibration(2.0, None, "val", 20, None, {}, {}, [], []))
    assert run_command(["compare", plain, str(other), "--metric", "top1", "nll", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["comparisons"][1]["a"] == nll["a"]
    assert err == f"regard: {other}: compared without its stored temperature and threshold\n"
    with np.load(other / "predictions.npz") as file:
        arrays = dict(file)
    arrays["paths"][0] = "x"
    np.savez(other / "predictions.npz", **arrays)
    assert run_command(["compare", plain, str(other)]) == 2
    assert "different images" in capsys.readouterr().err
    assert run_command(["compare", plain]) == 2
    assert run_command(["compare", plain, plain]) == 2


def test_only_data_that_is_left_to_train_on_is_opened(scans, tmp_path, monkeypatch):
    """A finished row's data may be elsewhere, and may be read with groups by now."""
    from regard.commands import study_runs

    monkeypatch.setattr(study_runs, "_differences", lambda run, asked: ())
    runs, asked = [], {}
    for name, data in (("gone", "wds:/gone/{0..3}.tar"), ("here", str(scans))):
        run = PlannedRun(row=name, seed=0, fold=None, folder=tmp_path / name, command=())
        run.folder.mkdir()
        (run.folder / "run.json").write_text('{"status": "finished", "plan": {}, "facts": {}}')
        (run.folder / "recipe.toml").write_text("")
        (run.folder / "splits.csv").write_text("path,label,split,group,content\n")
        runs.append(run)
        asked[name] = study_runs.Asked(network="resnet18", base=Recipe(), data=data)
    done = {"gone"}
    monkeypatch.setattr(study_runs, "is_finished", lambda run: run.row in done)
    opened = []

    def noted(data, **how):
        opened.append(data)
        return ImageTable(data, ["a"], np.zeros(0, int), np.zeros(0, "U5"), groups=groups)

    monkeypatch.setattr(study_runs, "open_data", noted)
    groups = None
    study_runs.check_runs(runs, asked)
    assert opened == [str(scans)]
    groups = np.array([], str)
    with pytest.raises(UsageError, match="has groups now"):
        study_runs.check_runs(runs, asked)
    done.add("here")
    study_runs.check_runs(runs, asked)
