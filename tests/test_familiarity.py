"""The sign of images that are unlike the training images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from sklearn.covariance import LedoitWolf

import regard
from regard.cli import run_command
from regard.data.preprocess import Preprocess
from regard.errors import UsageError
from regard.evaluation.familiarity import (
    FILE,
    fit_familiarity,
    read_familiarity,
    write_familiarity,
)
from regard.files import write_atomically
from tests.helpers import rows_of


def features(n, *, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    mix = np.random.default_rng(9).normal(size=(5, 5))
    return (labels[:, None] * 4 + rng.normal(size=(n, 5)) @ mix + shift).astype(np.float32), labels


def test_whoever_can_read_a_runs_other_files_can_read_its_familiarity(tmp_path):
    write_atomically(tmp_path / "text", lambda beside: beside.write_text("any"))
    write_atomically(tmp_path / "numbers", lambda beside: save_file({"a": np.zeros(2)}, beside))
    assert (tmp_path / "numbers").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_distances_are_mahalanobis_and_the_threshold_keeps_its_false_alarm_rate(tmp_path):
    x, labels = features(5000)
    f = fit_familiarity([x], labels, [features(400, seed=1)[0]], network="ab")
    means = np.stack([x[labels == k].mean(axis=0) for k in range(3)])
    inverse = LedoitWolf(assume_centered=True).fit(x - means[labels]).precision_
    others, _ = features(20_000, seed=2)
    differences = others[:, None] - means
    squares = np.einsum("nkd,de,nke->nk", differences, inverse, differences).min(axis=1)
    distances = f.distances([others])
    assert distances * f.kinds[0].scale == pytest.approx(np.sqrt(squares / 5), rel=1e-3)
    assert f.false_alarms == pytest.approx(0.01, abs=0.0025)
    assert (distances > f.threshold).mean() == pytest.approx(0.01, abs=0.01)
    assert (f.distances([features(100, shift=30)[0]]) > f.threshold).all()
    write_familiarity(tmp_path, f)
    again = read_familiarity(tmp_path)
    assert np.array_equal(again.distances([others]), distances)
    assert (again.threshold, again.images, again.network) == (f.threshold, (5000, 400), "ab")
    constant = np.concatenate([x, np.ones((5000, 1), np.float32)], axis=1)  # a feature that is dead
    val = np.concatenate([x[:50], np.ones((50, 1), np.float32)], axis=1)
    dead = fit_familiarity([constant], labels, [val])
    assert np.isfinite(dead.distances([val])).all()
    few = fit_familiarity([x], labels, [x[:24]])
    assert few.false_alarms == pytest.approx(1 / 25)
    with pytest.raises(UsageError, match="at least 20"):
        fit_familiarity([x], labels, [x[:19]])


def test_the_false_alarm_rate_is_that_of_a_new_patient(tmp_path):
    """Images of one patient are alike: 25 of each of 8 patients are no 200 images."""
    rng = np.random.default_rng(0)
    rates, flagged = [], []
    for _ in range(40):
        x = rng.normal(size=(300, 2)).astype(np.float32)
        patients = 0.8 * rng.normal(size=(208, 2)).repeat(25, axis=0)
        images = (patients + 0.6 * rng.normal(size=patients.shape)).astype(np.float32)
        groups = np.arange(8).repeat(25).astype(str)
        f = fit_familiarity([x], np.zeros(300, int), [images[:200]], groups=groups)
        rates.append(f.false_alarms)
        flagged.append((f.distances([images[200:]]) > f.threshold).mean())
    assert rates == pytest.approx([1 / 9] * 40)  # one of nine patients may exceed the other eight
    assert 1 / 201 < np.mean(flagged) < 1 / 9
    write_familiarity(tmp_path, f)
    assert read_familiarity(tmp_path).groups == 8
    assert "at most 0.11 by 200 validation images of 8 groups" in f.sentence()
    alone = fit_familiarity(
        [x], np.zeros(300, int), [images[:200]], groups=np.arange(200).astype(str)
    )
    plain = fit_familiarity([x], np.zeros(300, int), [images[:200]])
    assert (alone.threshold, alone.false_alarms) == pytest.approx(
        (plain.threshold, plain.false_alarms)
    )


def test_a_patient_of_many_images_counts_as_one():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    far = (x[:100] + 20).astype(np.float32)  # of one patient; of 299 others there is one image each
    validation = np.concatenate([rng.normal(size=(299, 2)).astype(np.float32), far])
    groups = np.append(np.arange(299), np.full(100, 299)).astype(str)
    labels = np.zeros(300, int)
    f = fit_familiarity([x], labels, [validation], groups=groups)
    assert (f.distances([far]) > f.threshold).all()
    assert f.false_alarms == pytest.approx(1 - 298 / 301)


@pytest.fixture
def pictures(scans, tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(scans / "1" / "03.png", folder / "a.png")
    Image.new("L", (24, 24), 255).save(folder / "white.png")
    return folder


def test_a_white_image_is_not_one_of_its_classes_without_a_word(whole, pictures, tmp_path, capsys):
    assert run_command(["predict", str(whole), str(pictures)]) == 0
    known, white = capsys.readouterr().out.splitlines()
    assert "unlike" not in known
    assert white.endswith("(unlike the training images)")
    assert run_command(["predict", str(whole), str(pictures), "--json"]) == 0
    known, white = map(json.loads, capsys.readouterr().out.splitlines())
    assert (known["unlike_training"], white["unlike_training"]) == (False, True)
    table = tmp_path / "x.csv"
    assert run_command(["predict", str(whole), str(pictures), "--csv", str(table)]) == 0
    assert "false alarm rate 0.04" in capsys.readouterr().err
    rows = rows_of(table)
    assert [row["unlike_training"] for row in rows] == ["no", "yes"]
    assert float(rows[1]["distance"]) == pytest.approx(white["distance"], rel=1e-3)
    classifier = regard.load(whole)
    answers = classifier.predict([pictures / "a.png", pictures / "white.png"])
    assert [a.unlike_training for a in answers] == [False, True]
    x = torch.stack([classifier.decode(pictures / "white.png")] * 2)
    (probabilities, distances) = classifier.with_distances(torch.stack([x, x], dim=1))  # views
    assert probabilities.shape == (2, 3)
    assert distances == pytest.approx([white["distance"]] * 2, rel=1e-4)
    classifier.engine = lambda images: torch.full((len(images), 3), 1 / 3)
    (a,) = classifier.predict(pictures / "white.png")
    assert (a.distance, a.unlike_training) == (None, None)


def test_a_run_without_it_gets_it_by_calibrating(whole, pictures, tmp_path, caplog):
    mine = Path(shutil.copytree(whole, tmp_path / "mine"))
    (mine / FILE).unlink()
    assert regard.load(mine).familiarity is None
    regard.calibrate(mine)
    before, after = (read_familiarity(run) for run in (whole, mine))
    assert after.threshold == pytest.approx(before.threshold, rel=1e-3)
    (mine / FILE).write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match=FILE):
        regard.load(mine)
    x, labels = features(50)
    write_familiarity(mine, fit_familiarity([x], labels, [x], network="0123"))
    assert regard.load(mine).familiarity is None
    assert "another network" in caplog.text


@pytest.mark.parametrize("name", ["ag_sononet8", "sononet8", "cbam_resnet18", "resnet10t"])
def test_every_kind_of_network_has_features(name):
    torch.manual_seed(0)
    model = regard.create_model(name, num_classes=3)
    channels = model.pretrained_cfg["input_size"][0] if hasattr(model, "pretrained_cfg") else 3
    preprocess = Preprocess((channels, 64, 64), (0.5,), (0.25,), "squash")
    classifier = regard.Classifier(model, ["a", "b", "c"], preprocess)
    found = classifier.features(torch.rand(2, channels, 64, 64) * 255)
    assert found[0].shape[1] >= 32
    assert found[1].shape[1] == 2 * channels + 4
    assert all(len(each) == 2 and np.isfinite(each).all() for each in found)
