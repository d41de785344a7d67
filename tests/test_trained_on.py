"""What was trained on is no test: images are known by content, data by its place."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regard.calibrating import validation_predictions
from regard.cli import run_command
from regard.data.content import content_hashes, file_hash
from regard.data.sources import open_data
from regard.data.splits_file import read_rows, write_splits
from regard.files import plural
from regard.run_data import predictions_of, run_table
from regard.runs import RunFolder, choose_out
from regard.trained_on import (
    attach_splits,
    changed_line,
    known_images,
    moved_table,
    overlap_line,
    watch,
)
from tests.helpers import QUICK, answer, rows_of, run


@pytest.fixture
def splits(whole) -> dict[str, list[str]]:
    """{split: keys} of the run's images."""
    found: dict[str, list[str]] = {}
    for row in rows_of(whole / "splits.csv"):
        found.setdefault(row["split"], []).append(row["path"])
    return found


@pytest.fixture
def warned(caplog):
    """The warnings so far, as one text."""
    caplog.set_level(logging.WARNING, "regard")
    return lambda: caplog.text


def copied(scans, to, keys, *, renamed=False):
    """Some of the images in class folders, if asked under other names."""
    for n, key in enumerate(keys):
        label, name = key.split("/")
        (to / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(scans / key, to / label / (f"copy {n}.png" if renamed else name))
    return str(to)


def new_images(to, count, seed=0, classes="012"):
    for k in range(count):
        pixels = np.random.default_rng([seed, k]).integers(0, 256, (24, 24), np.uint8)
        path = to / classes[k % len(classes)] / f"new{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(to)


def test_a_hash_is_of_the_whole_file(tmp_path):
    data = bytearray(os.urandom(3_000_000))
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "copy").write_bytes(data)
    data[1_700_000] ^= 1
    (tmp_path / "b").write_bytes(data)
    a, copy, b = (file_hash(tmp_path / name) for name in ("a", "copy", "b"))
    assert a == copy != b
    (tmp_path / "empty").touch()
    assert file_hash(tmp_path / "empty") == file_hash(tmp_path / "missing") == 0
    digits = open_data("digits")
    hashes = content_hashes(digits)
    assert np.array_equal(content_hashes(digits.select([7, 3])), hashes[[7, 3]])
    assert len(np.unique(hashes)) == len(np.unique(digits.arrays, axis=0))


def test_splits_hold_the_content(whole, scans):
    rows = list(read_rows(whole / "splits.csv"))
    assert len(rows) == 120
    assert all(row.content == file_hash(scans / row.key) for row in rows)


@pytest.mark.parametrize("renamed", [False, True])
def test_its_own_data_is_tested_by_its_own_splits(whole, scans, tmp_path, splits, renamed):
    before = json.loads((whole / "evaluation.json").read_text())
    data = copied(
        scans, tmp_path / "data", [key for keys in splits.values() for key in keys], renamed=renamed
    )
    named, said, _ = predictions_of(whole, data)
    assert named == "test"
    assert len(said) == before["n"] == len(splits["test"])
    assert np.mean(said.probabilities.argmax(1) == said.labels) == pytest.approx(
        before["metrics"]["top1"]["value"]
    )
    part = copied(scans, tmp_path / "part", splits["test"][:7] + splits["train"][:9])
    assert len(predictions_of(whole, part)[1]) == 7


def test_copies_in_two_splits_of_a_run_are_told(whole, scans, tmp_path, splits, warned):
    copy, original = splits["test"][0], splits["train"][0]
    data, run = shutil.copytree(scans, tmp_path / "data"), shutil.copytree(whole, tmp_path / "run")
    hashes = [f"{file_hash(data / key):016x}" for key in (copy, original)]
    shutil.copy(data / original, data / copy)
    text = (run / "splits.csv").read_text(encoding="utf-8")
    (run / "splits.csv").write_text(text.replace(*hashes), encoding="utf-8")
    named, said, _ = predictions_of(run, str(data))
    assert (named, len(said)) == ("test", len(splits["test"]) - 1)
    assert "2 images in several splits of the run (copies)" in warned()


def test_its_own_images_without_its_test_are_said_to_be_no_test(
    whole, scans, tmp_path, splits, warned
):
    data = copied(scans, tmp_path / "a", splits["val"] + splits["train"][:9])
    named, said, _ = predictions_of(whole, data)
    assert (named, len(said)) == ("val", len(splits["val"]))
    assert "no test split" in warned()
    data = copied(scans, tmp_path / "b", splits["train"][::4])
    named, said, _ = predictions_of(whole, data)
    assert (named, len(said)) == ("all", len(splits["train"][::4]))
    assert f"{len(said)} trained this network" in warned()


def test_a_resumed_table_counts_the_images_that_it_answers_now(
    whole, scans, tmp_path, splits, capsys
):
    images = [str(scans / name) for name in splits["train"][:5]]
    table = ["--csv", str(tmp_path / "a.csv")]
    assert run_command(["predict", str(whole), *images[:3], *table]) == 0
    assert "of 3 images 3 trained this network" in capsys.readouterr().err
    assert run_command(["predict", str(whole), *images, *table, "--resume"]) == 0
    assert "of 2 images 2 trained this network" in capsys.readouterr().err
    assert run_command(["predict", str(whole), *images, *table, "--resume"]) == 0
    assert "trained this network" not in capsys.readouterr().err


def test_other_data_is_tested_without_what_was_trained_on(whole, scans, tmp_path, splits, warned):
    known = splits["train"][:5] + splits["val"][:2] + splits["test"][:3]
    data = new_images(tmp_path / "data", 12)
    copied(scans, tmp_path / "data", known, renamed=True)
    named, said, _ = predictions_of(whole, data)
    assert (named, len(said)) == ("new", 15)
    assert "left out 7 images of 22" in warned()
    named, said, _ = predictions_of(whole, data, split="all")
    assert (named, len(said)) == ("all", 22)
    assert "of 22 images 5 trained this network and 2 validated it" in warned()
    data = new_images(tmp_path / "other/train", 12, seed=1).removesuffix("/train")
    copied(scans, tmp_path / "other/test", splits["train"][:6:2])
    with pytest.raises(ValueError, match="trained on all 3 images"):
        predictions_of(whole, data)


def test_data_that_is_all_new_is_tested_whole(whole, tmp_path, warned):
    named, said, _ = predictions_of(whole, new_images(tmp_path / "data", 9))
    assert (named, len(said), warned()) == ("all", 9, "")


def test_prediction_counts_what_was_trained_on(whole, scans, tmp_path, splits, warned):
    copied(scans, tmp_path / "data", splits["train"][:4] + splits["test"][:2])
    paths = sorted((tmp_path / "data").rglob("*.png"))
    assert list(watch(whole, paths)) == paths
    assert "of 6 images 4 trained this network" in warned()
    assert list(watch(tmp_path, paths)) == paths  # no run: nothing is known
    assert known_images(tmp_path) is None


def test_names_that_are_not_utf8_go_through(whole, scans, tmp_path, splits):
    odd = "\udcff\udce9.png"
    for label in "012":
        (tmp_path / "data" / label).mkdir(parents=True)
        trained = next(key for key in splits["train"] if key.startswith(label))
        shutil.copy(scans / trained, tmp_path / "data" / label / odd)
    shutil.copy(scans / "0/00.png", tmp_path / "data/0/again.png")
    (tmp_path / "data/1/\udcfe.png").write_text("broken")
    said = run("predict", whole, tmp_path / "data", "--csv", tmp_path / "out.csv", code=1)
    assert "trained this network" in said
    written = (tmp_path / "out.csv").read_bytes()
    assert os.fsencode(tmp_path / "data" / "1" / odd) in written
    lines = run("predict", whole, tmp_path / "data/0", "--json").splitlines()
    paths = {json.loads(line)["path"] for line in lines if line.startswith("{")}
    assert str(tmp_path / "data" / "0" / odd) in paths
    folder = RunFolder(tmp_path)
    for name in ("\udcff.png", "\udcfe.png"):  # the second call reads what the first wrote
        folder.write_unreadable([(name, "broken")])
    assert (tmp_path / "unreadable.csv").read_bytes().splitlines()[1:] == [
        b"\xff.png,broken", b"\xfe.png,broken",
    ]  # fmt: skip
    folder.write_text("recipe.toml", "# of \udcff\n")
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == "# of \\udcff\n"


# ---- patients that were trained on


@pytest.fixture
def patients(whole, tmp_path, splits):
    """A copy of the run whose images are of patients: "train 00", "train 01", ... of three each."""
    group_of = {
        key: f"{split} {k // 3:02d}" for split, keys in splits.items() for k, key in enumerate(keys)
    }
    rows = rows_of(shutil.copytree(whole, tmp_path / "run") / "splits.csv")
    lines = [",".join({**row, "group": group_of[row["path"]]}.values()) for row in rows]
    text = "\n".join([",".join(rows[0]), *lines, ""])
    (tmp_path / "run/splits.csv").write_text(text, encoding="utf-8")
    return tmp_path / "run"


def listed(to, *rows):
    """A CSV file of (path, label, group)."""
    lines = ["path,label,group", *(",".join(map(str, row)) for row in rows)]
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(to)


@pytest.fixture
def fresh(tmp_path):
    """[(path, label)] of nine images that nobody has."""
    new_images(tmp_path / "fresh", 9)
    return [(path, path.parent.name) for path in sorted((tmp_path / "fresh").rglob("*.png"))]


def test_other_images_of_patients_that_were_trained_on_are_left_out(
    patients, whole, scans, tmp_path, splits, fresh, warned
):
    # one image of patient A trained the network, one of B validated it; C is new
    known = [(splits["train"][0], "A"), (splits["val"][0], "B"), (splits["test"][0], "C")]
    groups = ["A", "A", "A", "B", "B", "C", "C", "C", "D"]
    rows = [(scans / key, key[0], group) for key, group in known]
    rows += [(*image, group) for image, group in zip(fresh, groups, strict=True)]
    data = listed(tmp_path / "new.csv", *rows)
    for run_folder in (patients, whole):  # whether or not the run knows groups itself
        named, said, _ = predictions_of(run_folder, data)
        assert (named, len(said), set(said.groups)) == ("new", 5, {"C", "D"})
    assert "left out 7 images of 12 that" in warned()
    assert "share a group with such images (5 of 2 groups)" in warned()
    assert len(predictions_of(patients, data, split="all")[1]) == 12
    assert (
        "of 12 images 1 trained this network and 1 validated it and 5 came from 2 groups"
        in warned()
    )
    with pytest.raises(
        ValueError, match=r"all 6 images to test, or .* \(5 of 1 group\); split=all"
    ):
        predictions_of(whole, listed(tmp_path / "a.csv", rows[0], *((*i, "A") for i in fresh[:5])))


def test_names_of_patients_count_where_images_show_that_they_mean_the_same(
    patients, scans, tmp_path, splits, fresh, warned
):
    trained, tested = splits["train"][0], splits["test"][0]
    groups = ["train 01", "Train1", "val 00", "test 00", "test 00", "E", "E", "E", "E"]
    rows = [(*image, group) for image, group in zip(fresh, groups, strict=True)]
    same = listed(tmp_path / "same.csv", (scans / tested, tested[0], "test 00"), *rows)
    _, said, _ = predictions_of(patients, same)
    assert (len(said), set(said.groups)) == (7, {"test 00", "E"})
    assert "left out 3 images of 10" in warned()
    assert "whose names" not in warned()
    # nothing shows it, or an image shows the contrary: told, and tested
    other = (scans / trained, trained[0], "test 01")
    for more, n in (([], 9), ([(scans / tested, tested[0], "train 07"), other], 10)):
        _, said, _ = predictions_of(patients, listed(tmp_path / f"{n}.csv", *more, *rows))
        assert len(said) == n
        assert "3 images of 3 groups whose names the run's train and val" in warned()
    _, said, _ = predictions_of(patients, listed(tmp_path / "x.csv", *((*i, "E") for i in fresh)))
    assert (len(said), warned().count("whose names")) == (9, 2)


def test_its_own_images_by_other_groups_than_it_was_split_by(
    whole, scans, tmp_path, splits, warned
):
    tests = splits["test"]
    rows = [(key, f"t{n}") for n, key in enumerate(splits["train"])]
    rows += [(key, f"t{n}" if n < 4 else f"own {n}") for n, key in enumerate(tests)]
    data = listed(tmp_path / "own.csv", *((scans / key, key[0], group) for key, group in rows))
    named, said, _ = predictions_of(whole, data)
    assert (named, len(said)) == ("test", len(tests))
    assert f"of {len(tests)} images 4 came from 4 groups that trained" in warned()


def test_images_that_trained_the_weights_it_started_from_are_told(
    whole, scans, tmp_path, splits, fresh, warned
):
    call = ["train", new_images(tmp_path / "own", 60, seed=3), *QUICK, "--steps", "1"]
    assert run_command([*map(str, [*call, "--weights", whole, "--out", tmp_path / "tuned"])]) == 0
    known = [*splits["train"][:3], splits["val"][0], *splits["test"][:2]]
    rows = [(scans / key, key[0], k) for k, key in enumerate(known)]
    rows += [(*image, f"new {k}") for k, image in enumerate(fresh)]
    named, said, _ = predictions_of(tmp_path / "tuned", listed(tmp_path / "data.csv", *rows))
    assert (named, len(said)) == ("all", 15)
    assert "4 of 15 images trained or validated the weights that this run started" in warned()
    validation_predictions(tmp_path / "tuned", tmp_path / "data.csv")
    assert "3 of 15 images trained the weights that this run started from" in warned()


def test_images_that_trained_the_first_of_a_chain_of_runs_are_told(
    whole, scans, tmp_path, splits, fresh, warned, capsys, monkeypatch
):
    """Also where the first run is gone, and the second was named from another folder."""
    first = shutil.copytree(whole, tmp_path / "first")
    call = ["train", new_images(tmp_path / "own", 60, seed=3), *QUICK, "--steps", "1"]
    assert run_command([*map(str, [*call, "--weights", first, "--out", tmp_path / "second"])]) == 0
    shutil.rmtree(first)
    monkeypatch.chdir(tmp_path)
    call = ["train", scans, *QUICK, "--steps", "1", "--split-seed", "1", "--weights", "second"]
    capsys.readouterr()
    assert run_command([*map(str, [*call, "--out", "third"])]) == 0
    used = {*splits["train"], *splits["val"]}
    tested = [row["path"] for row in rows_of(Path("third/splits.csv")) if row["split"] == "test"]
    count = len(used.intersection(tested))
    assert f"{count} of 24 test images, or others of their" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "own")
    rows = [(scans / key, key[0], n) for n, key in enumerate(tested)]
    predictions_of(tmp_path / "third", listed(tmp_path / "data.csv", *rows, (*fresh[0], "new")))
    assert f"{count} of 25 images trained or validated the weights that this run" in warned()


def test_calibration_leaves_out_patients_that_train_or_test(
    patients, scans, tmp_path, splits, fresh, warned
):
    known = [(splits["train"][0], "A"), (splits["test"][0], "B"), (splits["val"][0], "C")]
    groups = ["A", "A", "B", "C", "C", "C", "D", "D", "train 05"]
    rows = [(scans / key, key[0], group) for key, group in known]
    rows += [(*image, group) for image, group in zip(fresh, groups, strict=True)]
    said = validation_predictions(patients, listed(tmp_path / "new.csv", *rows))
    assert (len(said), set(said.groups)) == (7, {"C", "D", "train 05"})
    assert "left out 5 images of 12" in warned()
    assert "1 image of 1 group whose names the run's train and test" in warned()


# ---- where the data is


@pytest.fixture
def moved(whole, scans, tmp_path):
    """A copy of the run whose data was at tmp_path/was, which is gone."""
    shutil.copytree(whole, tmp_path / "run")
    content = json.loads((whole / "run.json").read_text())
    content["plan"] |= {"data": "was", "location": str(tmp_path / "was")}
    (tmp_path / "run/run.json").write_text(json.dumps(content))
    return tmp_path / "run"


def test_a_run_finds_its_data_from_any_folder(moved, scans, tmp_path, monkeypatch):
    shutil.copytree(scans, tmp_path / "was")
    for place in (tmp_path, scans):
        monkeypatch.chdir(place)
        table = run_table(moved, None, None)
        assert len(table) == 120
        assert table.location == str(tmp_path / "was")


def test_moved_data_is_attached_again(moved, scans, tmp_path, splits):
    with pytest.raises(ValueError, match=rf"trained on {tmp_path}/was, which does not exist"):
        run_table(moved, None, None)
    data = copied(scans, tmp_path / "now", splits["train"])
    predictions_of(moved, data)  # a part of it: not its new place
    with pytest.raises(ValueError, match="does not exist any more"):
        run_table(moved, None, None)
    copied(scans, tmp_path / "now", splits["val"] + splits["test"], renamed=True)
    assert predictions_of(moved, data)[0] == "test"
    assert RunFolder(moved).read_plan()["location"] == data
    named, said, _ = predictions_of(moved)
    assert (named, len(said)) == ("test", len(splits["test"]))


def test_splits_come_back_in_their_own_order(whole, scans, tmp_path):
    table = open_data(str(scans))
    file = whole / "splits.csv"
    keys = [row["path"] for row in rows_of(file)]
    turned = attach_splits(table.select(range(119, -1, -1)), file)
    assert [turned.key(i) for i in range(120)] == keys
    shutil.copytree(scans, tmp_path / "more")
    new_images(tmp_path / "more", 3)
    (tmp_path / "more/1/00.png").rename(tmp_path / "more/1/another name.png")
    more = attach_splits(open_data(str(tmp_path / "more")), file)
    assert more.splits.tolist() == turned.splits.tolist()
    assert any("3 images not of this run" in line for line in more.warnings)
    (tmp_path / "more/0/00.png").unlink()
    with pytest.raises(ValueError, match="are not in it"):
        attach_splits(open_data(str(tmp_path / "more")), file)


@pytest.mark.parametrize(
    ("data", "name"), [("abc/", "abc"), (".", "here"), ("a/b.csv", "b"), ("hf:x/y", "y")]
)
def test_runs_are_named_after_their_data(tmp_path, monkeypatch, data, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(choose_out(None, data, "m", False)) == os.path.join("runs", f"{name}-m")


# ---- classes of others


def test_classes_are_renamed_and_left_out(whole, scans, tmp_path, splits, warned):
    data = tmp_path / "data"
    copied(scans, data, splits["test"])
    (data / "0").rename(data / "Zero")
    (data / "1").rename(data / "eins")
    new_images(data, 4, classes=["cyst"])
    ones = sum(key.startswith("1/") for key in splits["test"])
    _, said, _ = predictions_of(whole, str(data), renamed={"Zero": "0", "cyst": ""})
    assert len(said) == len(splits["test"]) - ones
    assert "eins (" in warned()
    assert "cyst" not in warned()
    for renamed, words in (({"zero": "0"}, "zero=0.*Zero"), ({"Zero": "null"}, "knows 0, 1, 2")):
        with pytest.raises(ValueError, match=words):
            predictions_of(whole, str(data), renamed=renamed)
    shutil.rmtree(data / "2")
    with pytest.raises(ValueError, match="no image of a class that the network knows"):
        predictions_of(whole, str(data))


def test_one_class_is_enough_to_be_tested(whole, tmp_path):
    _, said, _ = predictions_of(whole, new_images(tmp_path, 3, classes="1"))
    assert said.labels.tolist() == [1, 1, 1]


def test_on_the_command_line(whole, scans, tmp_path, splits):
    copied(scans, tmp_path / "data", splits["test"])
    (tmp_path / "data/0").rename(tmp_path / "data/null")
    found = answer("evaluate", whole, tmp_path / "data", "--map", "null=0", "--json")
    before = json.loads((whole / "evaluation.json").read_text())
    assert (found["split"], found["confusion"]) == ("test", before["confusion"])
    assert "CLASS=NAME" in run("evaluate", whole, tmp_path / "data", "--map", "x", code=2)
    for top in ("Training", "Testing"):
        shutil.copytree(scans, tmp_path / "both" / top)
    said = run("data", tmp_path / "both", code=2)
    assert "--splits yes" in said
    assert "--splits no" in said
    assert "1 .png" not in run("data", tmp_path / "both", "--splits", "yes", "--limit", "3")
    assert "no such folder" in run("data", "digitz", code=2)


# ---- training


def test_a_run_is_resumed_where_its_data_is_now(moved, scans, tmp_path, monkeypatch):
    shutil.copytree(scans, tmp_path / "now/abc")
    monkeypatch.chdir(tmp_path / "now")
    for data in ("abc/", "./abc", tmp_path / "now/abc"):
        assert "is finished" in run("train", data, "--resume", "--out", moved)
    assert RunFolder(moved).read_plan()["location"] == str(tmp_path / "now/abc")
    shutil.copytree(scans, tmp_path / "other")
    new_images(tmp_path / "other", 1)
    (tmp_path / "other/0/new0.png").rename(tmp_path / "other/0/00.png")
    said = run("train", tmp_path / "other", "--resume", "--out", moved, code=2)
    assert "1 image not the same as the run was trained with, such as 0/00.png" in said


def test_images_that_changed_under_their_names_are_told(scans, tmp_path, warned, capsys):
    data, out = shutil.copytree(scans, tmp_path / "data"), tmp_path / "run"
    call = [*map(str, ["train", data, *QUICK, "--steps", "1", "--out", out])]
    (data / "0/03.png").write_text("broken")
    assert run_command([*call, "--max-unreadable", "1"]) == 0
    assert len(predictions_of(out)[1]) == 24
    assert changed_line(open_data(str(data)), out / "splits.csv") is None
    content = json.loads((out / "run.json").read_text())
    assert content.pop("status") == "finished"
    (out / "run.json").write_text(json.dumps({**content, "status": "running"}))
    keys = sorted(row.key for row in read_rows(out / "splits.csv") if row.split == "test")
    for key, other in zip(keys, reversed(keys), strict=True):  # renumbered
        shutil.copy(scans / key, data / other)
    shutil.copy(scans / "0/03.png", data / "0/03.png")  # which the run left out: no matter
    assert "changed since" not in warned()
    predictions_of(out)
    assert f"24 of 24 images changed since the run was started, such as {keys[0]}" in warned()
    capsys.readouterr()
    assert run_command([*call, "--max-unreadable", "1", "--resume"]) == 0
    assert f"note: {data}: 24 of 120 images changed since" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_labels_whatever_became_of_the_folder(tmp_path):
    data, run_folder = tmp_path / "data", tmp_path / "run"
    new_images(data, 9)
    shutil.copy(data / "0/new0.png", data / "2/new0.png")  # one picture, two labels
    run_folder.mkdir()
    table = open_data(str(data))
    write_splits(table, run_folder / "splits.csv", content_hashes(table))
    plan = {"classes": table.classes, "location": str(data)}

    def labels() -> list[tuple[str, int]]:
        now, keys = moved_table(run_folder, plan, str(data), None)
        assert now.classes == ["0", "1", "2"]
        assert [now.key(i) for i in range(len(now))] == [keys[key] for key in before]
        return list(zip(before, now.labels.tolist(), strict=True))

    before = [table.key(i) for i in range(len(table))]
    started = list(zip(before, table.labels.tolist(), strict=True))
    assert labels() == started
    shutil.copytree(data / "1", data / "00")  # a further class, which sorts before others
    (data / "0/new3.png").rename(data / "0/other name.png")
    assert labels() == started
    (data / "1/new1.png").rename(data / "2/new1.png")
    shutil.rmtree(data / "00")
    with pytest.raises(ValueError, match=r"2/new1\.png is '2' now, and was '1' when"):
        labels()
    (data / "2/new1.png").rename(data / "1/new1.png")
    (data / "2/new0.png").unlink()
    (data / "0").rename(data / "null")
    with pytest.raises(ValueError, match=r"null/new0\.png is 'null' now, and was '0' when"):
        labels()


@pytest.mark.slow
def test_results_in_the_data_and_a_split_that_cannot_be_read(scans, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(scans, data / split)
    monkeypatch.chdir(data)
    for path in (data / "test").rglob("*.png"):
        path.write_text("broken")
    arguments = ["train", ".", "--model", "ag_sononet8", "--size", "16", "--epochs", "1"]
    said = run(*arguments, "--max-unreadable", "1", code=2)
    assert "no test image can be read" in said
    shutil.rmtree(data / "test")
    shutil.copytree(scans, data / "test")
    run(*arguments)
    (network,) = (data / "runs").glob("data-ag_sononet8*/model.safetensors")
    assert open_data(str(data)).classes == ["0", "1", "2"]
    assert "images of its own data" in run("evaluate", network.parent.relative_to(data))


@pytest.mark.parametrize(
    ("counts", "total", "related", "said"),
    [
        ({"train": 2, "val": 1}, 4, 0, "of 4 images 2 trained this network and 1 validated it"),
        ({"val": 1}, 4, 0, "of 4 images 1 validated this network"),
        ({"val": 1}, 1, 0, "the image validated this network"),
        ({}, 1, 1, "the image came from 1 group that trained or validated this network"),
    ],
)
def test_a_single_image_that_was_trained_on_is_told_as_one(counts, total, related, said):
    them = "it" if total == 1 else "them"
    expected = f"{said}: results on {them} say nothing about new images"
    assert overlap_line(Counter(counts), total, related, related) == expected


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "image", "1 image"), (2000, "test image", "2,000 test images"), (1, "class", "1 class"),
        (0, "process", "0 processes"), (3, "batch", "3 batches"), (2, "box", "2 boxes"),
    ],
)  # fmt: skip
def test_counts_are_told_in_english(count, noun, said):
    assert plural(count, noun) == said
