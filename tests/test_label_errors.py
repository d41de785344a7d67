"""Labels that may be wrong: ranked by networks that were not trained on them."""

import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from regard.cli import run_command
from regard.data.sources import open_data
from regard.extras import is_installed
from regard.report import label_errors

COUNT = 120


@pytest.fixture
def folds(tmp_path, monkeypatch):
    """Three runs of a cross-validation, whose networks know the truth; 12 labels are wrong."""
    rng = np.random.default_rng(0)
    truth = np.arange(COUNT) % 3
    given = truth.copy()
    wrong = rng.choice(COUNT, 12, replace=False)
    given[wrong] = (truth[wrong] + 1) % 3
    for i in range(COUNT):
        path = tmp_path / "data" / "abc"[given[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    table = open_data(str(tmp_path / "data"))
    number = np.array([int(path.rpartition("/")[2][:-4]) for path in table.files])
    for k in range(3):
        run = tmp_path / "runs" / f"fold {k}"
        run.mkdir(parents=True)
        plan = {"data": str(tmp_path / "data"), "classes": ["a", "b", "c"]}
        facts = {"counts": {"train": 80, "test": 40}}
        content = {"status": "finished", "plan": plan, "facts": facts}
        (run / "run.json").write_text(json.dumps(content))

    def predictions_of(run, data, *, root, choose, warn):
        in_test = number % 3 == int(run.name[-1])
        split, _ = choose(replace(table, splits=np.where(in_test, "test", "train")), None)
        predictions_of.warned.append(warn)
        rows = np.flatnonzero(in_test if split == "test" else ~in_test)
        says = truth if split == "test" else given  # what it was trained on it knows by heart
        probabilities = 0.8 * np.eye(3)[says[number[rows]]] + 0.2 / 3
        paths = [table.path(i) for i in rows]
        return split, SimpleNamespace(
            paths=paths, labels=table.labels[rows], probabilities=probabilities
        ), []  # fmt: skip

    predictions_of.warned = []
    monkeypatch.setattr(label_errors, "predictions_of", predictions_of)
    monkeypatch.setattr(label_errors, "own_table", lambda *_: table)
    return tmp_path / "runs", set(wrong.tolist())


def numbers(rows):
    return {int(row["path"].rpartition("/")[2][:-4]) for row in rows}


def test_the_folds_together_rank_all_wrong_labels_first(folds, tmp_path, capsys):
    runs, wrong = folds
    page, table = tmp_path / "page.html", tmp_path / "all.csv"
    code = run_command(["errors", str(runs), "--top", "12", "--json", "--html", str(page),
                        "--csv", str(table)])  # fmt: skip
    assert code == 0
    shown = json.loads(capsys.readouterr().out)
    assert numbers(shown) == wrong
    assert all(row["out_of_sample"] and row["runs"] == 1 for row in shown)
    assert shown[0]["probability"] == pytest.approx(0.2 / 3)
    assert shown[0]["loss"] == pytest.approx(-np.log(0.2 / 3))
    assert {row["cleanlab"] for row in shown} == {True if is_installed("cleanlab") else None}
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == COUNT
    text = page.read_text()
    assert text.count("data:image/jpeg") == 12
    assert "12 of 12 are not the network’s answer" in text
    assert '"Segoe UI"' in text  # an escaped quote would end the style of the whole body
    assert "http" not in text.replace("http-equiv", "")


def test_a_page_of_all_images_calls_no_answered_label_wrong(folds, tmp_path, capsys):
    runs, _ = folds
    page = tmp_path / "page.html"
    assert run_command(["errors", str(runs), "--top", "999", "--json", "--html", str(page)]) == 0
    shown = json.loads(capsys.readouterr().out)
    others = [row for row in shown if row["predicted"] != row["label"]]
    text = page.read_text(encoding="utf-8")
    assert 12 <= len(others) < COUNT
    assert f"{len(others)} of {COUNT} are not the network’s answer" in text
    assert text.count("<b>") == text.count("→") == len(others)
    assert text.count(", as answered") == COUNT - len(others)


def test_one_run_says_which_images_trained_it(folds, capsys):
    runs, wrong = folds
    assert run_command(["errors", str(runs / "fold 1"), "--json", "--top", "999"]) == 0
    shown = json.loads(capsys.readouterr().out)
    held_out = [row for row in shown if row["out_of_sample"]]
    assert len(shown) == COUNT
    assert len(held_out) == 40
    hits = {n for n in wrong if n % 3 == 1}
    assert numbers(shown[: len(hits)]) == hits
    assert run_command(["errors", str(runs / "fold 1"), "--top", "1"]) == 0
    assert "80 images of 120" in capsys.readouterr().err


def test_an_image_whose_copy_trained_the_run_is_in_its_sample(folds, tmp_path):
    runs, _ = folds
    run = runs / "fold 1"
    table = open_data(str(tmp_path / "data"))
    lines = ["path,label,split,group,content"]
    for i in range(COUNT):
        number = int(table.path(i).rpartition("/")[2][:-4])
        content = {4: 5}.get(number, number)  # 4 tests the run, and 5 trained it
        split = "test" if number % 3 == 1 else "train"
        lines.append(f"{table.key(i)},{table.classes[table.labels[i]]},{split},,{content:x}")
    (run / "splits.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    suspects, _ = label_errors.find_label_errors([run])
    held_out = {int(s.path.rpartition("/")[2][:-4]) for s in suspects if s.out_of_sample}
    assert held_out == set(range(1, COUNT, 3)) - {4}
    assert all(s.cleanlab is None for s in suspects if not s.out_of_sample)


def test_wrong_calls_end_in_a_line(folds, tmp_path, capsys):
    runs, _ = folds
    (tmp_path / "notes.csv").write_text("mine")
    calls = (
        [tmp_path / "nothing"], [runs, "--top", "0"], [runs, "--html", tmp_path],
        [runs, "--csv", tmp_path / "notes.csv"],
    )  # fmt: skip
    for arguments in calls:
        assert run_command(["errors", *map(str, arguments)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "notes.csv").read_text() == "mine"
    plan = json.loads((runs / "fold 2/run.json").read_text())
    plan["plan"]["classes"] = ["x", "y"]
    (runs / "fold 2/run.json").write_text(json.dumps(plan))
    assert run_command(["errors", str(runs)]) == 2
    assert "different data" in capsys.readouterr().err


def test_runs_that_spell_the_same_folder_otherwise_are_on_the_same_data(folds, tmp_path, capsys):
    runs, wrong = folds
    file = runs / "fold 2" / "run.json"
    stored = json.loads(file.read_text())

    def errors(*arguments, **plan):
        file.write_text(json.dumps({**stored, "plan": stored["plan"] | plan}))
        return run_command(["errors", str(runs), "--top", "12", "--json", *arguments])

    place = str(tmp_path / "data")
    for k in range(2):
        other = runs / f"fold {k}" / "run.json"
        content = json.loads(other.read_text())
        content["plan"]["location"] = place
        other.write_text(json.dumps(content))
    assert errors(data="./data", location=place) == 0
    assert numbers(json.loads(capsys.readouterr().out)) == wrong
    for plan in ({"location": place + "2"}, {"location": ""}, {}):
        assert errors(data="./data", **plan) == 2
        assert "different data" in capsys.readouterr().err
    assert errors(data="hf:data:two", location=place) == 2  # another configuration
    assert errors("--data", place, data="./data") == 0  # its images decide


def test_what_the_data_warns_of_is_said_once(folds):
    runs, _ = folds
    label_errors.find_label_errors([runs])
    assert label_errors.predictions_of.warned == [True, *[False] * 5]


def test_a_run_is_ranked_without_a_warning_of_its_own_images(whole, caplog):
    suspects, table = label_errors.find_label_errors([whole])
    assert len(suspects) == len(table) == 120
    assert caplog.records == []


def test_cleanlab_says_nothing_where_it_cannot_judge():
    pytest.importorskip("cleanlab", reason="the extra 'cleanlab' is not installed")
    names = ["a", "b", "one image", "no image"]
    labels = np.array([0] * 20 + [1] * 20 + [2])
    probabilities = np.full((41, 4), 0.01)
    probabilities[np.arange(41), labels] = 0.97
    probabilities[0] = [0.01, 0.97, 0.01, 0.01]  # a label error
    probabilities[1] = [0.01, 0.01, 0.01, 0.97]  # taken for classes without enough labels
    probabilities[2] = [0.01, 0.01, 0.97, 0.01]
    probabilities[40] = [0.97, 0.01, 0.01, 0.01]  # the only one with its label
    sums = label_errors._Sums(names)
    sums.add(map(str, range(41)), labels, probabilities, ())
    said = {int(s.path): s.cleanlab for s in label_errors._ranked(sums)}
    assert [said[i] for i in (0, 1, 2, 40)] == [True, None, None, None]
    assert {said[i] for i in range(3, 40)} == {False}
