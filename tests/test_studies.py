"""Studies: planned whole, trained in real processes, and the same after any number of kills."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from regard.cli import run_command
from regard.errors import UsageError
from regard.papers import parse_table
from regard.studies.page import write_page
from regard.studies.plan import (
    choose_part,
    choose_rows,
    open_study,
    plan_study,
    slurm_script,
)
from regard.studies.results import gather, to_dict, write_results
from regard.studies.runner import run_all

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
import json, pathlib, sys, time
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
    run = {"status": status, "plan": {}, "facts": {"parameters": 10, "steps": 2, "seconds": 0.1}}
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
(out / "metrics.csv").write_text("epoch,step,accuracy,val_accuracy\\n1,1,0.5,0.4\\n2,2,0.6,0.5\\n")
np.savez(out / "predictions.npz", probabilities=p, labels=labels, classes=np.array(list("abc")),
         paths=np.array([f"{fold}-{i}" for i in range(60)]), split=np.array("test"))
say("finished")
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
    result = to_dict(gather(table, runs, again.failed))
    assert [len(row["seeds"]) for row in result["rows"]] == [2, 2, 1]
    write_results(gather(table, runs, again.failed), tmp_path)
    write_page(gather(table, runs, again.failed), tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert "it can not be trained" in page
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


def test_a_stopped_study_says_so_and_leaves_no_process(tmp_path, trainer):
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
    assert "Stopped" in err


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


def test_compare_pairs_images_and_refuses_others(tmp_path, trainer, capsys, monkeypatch):
    _, runs = planned(tmp_path, seeds=1)
    run_all(runs, python=trainer)
    plain, gated = (str(run.folder) for run in runs)
    from regard.studies import cost

    fixed = cost.Cost(parameters=10, macs=20, ms_an_image=1.0, ms_a_step=None)
    monkeypatch.setattr(cost, "measure_costs", lambda folders: [fixed] * len(folders))
    page = tmp_path / "c.html"
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
    with np.load(other / "predictions.npz") as file:
        arrays = dict(file)
    arrays["paths"][0] = "x"
    np.savez(other / "predictions.npz", **arrays)
    assert run_command(["compare", plain, str(other)]) == 2
    assert "different images" in capsys.readouterr().err
    assert run_command(["compare", plain]) == 2
    assert run_command(["compare", plain, plain]) == 2
