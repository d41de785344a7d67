"""A run's calibration: fitted on validation images, stored, and used wherever the run answers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.cli import run_command
from regard.engines.standalone import _decision
from regard.errors import UsageError
from regard.evaluation import (
    Predictions,
    choose_threshold,
    fit_calibration,
    fit_temperature,
    read_calibration,
    with_temperature,
    write_calibration,
)
from regard.evaluation.statistics import OneClassStatistics
from regard.evaluation.thresholds import Threshold
from regard.explanations.explanation import explain
from regard.run_data import predictions_of
from regard.runs import RunFolder
from tests.helpers import rows_of


def call(*arguments: object, code: int = 0, capsys) -> tuple[str, str]:
    assert run_command([*map(str, arguments)]) == code
    return capsys.readouterr()


@pytest.fixture
def mine(whole, tmp_path) -> Path:
    """A copy of the run, to calibrate."""
    return Path(shutil.copytree(whole, tmp_path / "my rün"))


def toy(n=200, classes=("well", "sick"), seed=0) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, len(classes))) * 3
    labels = (logits + rng.gumbel(size=logits.shape) * 3).argmax(axis=1)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Predictions(p / p.sum(axis=1, keepdims=True), labels, list(classes))


def test_a_run_keeps_its_validation_probabilities(whole):
    stored = RunFolder(whole).read_validation()
    _, again, _ = predictions_of(whole, split="val")
    assert stored.paths == again.paths
    assert np.array_equal(stored.labels, again.labels)
    assert np.allclose(stored.probabilities, again.probabilities, atol=1e-6)


def test_the_card_says_what_was_calibrated_and_that_its_metrics_are_without_it(mine, caplog):
    before = (mine / "README.md").read_text(encoding="utf-8")
    assert "## Calibration" not in before
    for rule in ("youden", "sensitivity=0.9"):  # the second one replaces the first
        found = regard.calibrate(mine, positive="1", rule=rule)
        card = (mine / "README.md").read_text(encoding="utf-8")
        assert card.count("## Calibration\n") == 1
        section = card[card.index("## Calibration") : card.index("## How to use it")]
        assert f"fitted on {found.images} validation images of the run" in section
        assert "The metrics above are without it" in section
        assert f"- temperature {found.temperature:.4g}: negative log-likelihood" in section
        assert found.threshold.sentence() in section
    assert run_command(["calibrate", str(mine), "--remove"]) == 0
    assert (mine / "README.md").read_text(encoding="utf-8") == before
    edited = before.replace("## How to use it", "## Calibration\n\nOur own words.\n\n## Usage")
    (mine / "README.md").write_text(edited, encoding="utf-8")
    regard.calibrate(mine)
    assert (mine / "README.md").read_text(encoding="utf-8").startswith(edited)
    (mine / "README.md").write_bytes("größer".encode("latin-1"))
    regard.calibrate(mine)
    assert f"{mine / 'README.md'} can't be read (" in caplog.text
    (mine / "README.md").unlink()
    regard.calibrate(mine)
    assert not (mine / "README.md").exists()


def test_what_is_stored_is_what_was_fitted_and_is_read_back(tmp_path):
    p = toy()
    c = fit_calibration(p, positive="sick", rule="sensitivity=0.9")
    assert c.temperature == fit_temperature(p) > 1.5
    assert c.threshold == choose_threshold(
        with_temperature(p, c.temperature), "sick", c.threshold.rule
    )
    assert c.after["nll"] < c.before["nll"]
    assert sum(b.images for b in c.reliability) == c.images == 200
    write_calibration(tmp_path, c)
    assert read_calibration(tmp_path) == c
    never = replace(c, threshold=replace(c.threshold, value=np.inf))
    write_calibration(tmp_path, never)
    assert read_calibration(tmp_path) == never
    assert [f.name for f in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("value", [5.4e-11, 3e-7, 1e-4, 0.01, 0.5, 0.999, np.inf])
def test_prediction_evaluation_and_exports_decide_alike_at_any_threshold(value):
    """Near 0 a slack of 1e-6 called every image positive that evaluation called negative."""
    at = min(value, 1.0)
    shares = np.array([at * factor for factor in (0.0, 0.5, 0.9, 0.999, 1 - 1e-7, 1.0, 1.5)])
    shares = shares.clip(0, 1).astype(np.float32)
    wanted = [False, False, False, False, True, True, True] if value < 1 else [False] * 7
    predictions = Predictions(
        np.stack([1 - shares, shares], 1), np.array([0, 1, 0, 1, 0, 1, 1]), ["no", "yes"]
    )
    threshold = Threshold("yes", "youden", float(value), 1.0, 1.0, 7)
    fitted = replace(fit_calibration(toy()), threshold=threshold)
    decided = [fitted.decide({"no": 1 - p, "yes": p}) == "yes" for p in shares.tolist()]
    assert decided == wanted
    one = OneClassStatistics(predictions, "yes", float(value))
    assert one.called.tolist() == wanted
    facts = {"class_names": ["no", "yes"], "calibration": fitted.to_dict()}
    exported = [_decision(np.array([1 - p, p]), facts)["decision"] == "yes" for p in shares]
    assert exported == wanted


@pytest.mark.parametrize(
    ("classes", "shares", "decision"),
    [
        (("well", "sick"), (0.7, 0.3), "sick"),
        (("well", "sick"), (0.71, 0.29), "well"),
        (("a", "b", "sick"), (0.6, 0.1, 0.3), "sick"),
        (("a", "b", "sick"), (0.6, 0.2, 0.2), "not sick"),
    ],
)
def test_the_threshold_decides_not_the_top_class(classes, shares, decision):
    c = fit_calibration(toy(classes=classes), positive="sick", rule="youden", temperature=False)
    c = replace(c, threshold=replace(c.threshold, value=0.3))
    assert c.decide(dict(zip(classes, shares, strict=True))) == decision
    assert replace(c, threshold=None).decide({}) is None


def test_every_door_uses_it(mine, scans, tmp_path, capsys):
    picture = scans / "1" / "03.png"
    raw = regard.load(mine)
    found = regard.calibrate(mine, positive="1", rule="sensitivity=1")
    classifier = regard.load(mine)
    assert classifier.calibration == found
    assert regard.load(mine, calibrated=False).calibration is None
    x = raw.decode(picture)[None]
    logits = raw.probabilities(x).log() / found.temperature
    expected = logits.softmax(dim=1)[0]
    assert torch.allclose(classifier.probabilities(x)[0], expected, atol=1e-5)
    classifier.engine = raw.probabilities  # an engine's answers are scaled too
    assert torch.allclose(classifier.probabilities(x)[0], expected, atol=1e-5)
    (p,) = classifier.predict(picture)
    assert p.decision == "1"
    (shown,) = explain(mine, picture)
    assert shown.classes[0] == pytest.approx((p.classes[0][0], p.classes[0][1]), abs=1e-5)
    out, err = call("predict", mine, picture, "--json", capsys=capsys)
    assert json.loads(out)["decision"] == "1"
    assert json.loads(out)["classes"][0]["probability"] == pytest.approx(
        float(expected.max()), abs=1e-5
    )
    assert f"{found.temperature:.4g}" in err
    call("predict", mine, picture, "--csv", tmp_path / "x.csv", capsys=capsys)
    (row,) = rows_of(tmp_path / "x.csv")
    assert list(row) == [
        "path", "class1", "probability1", "decision", "distance", "unlike_training",
        "p_0", "p_1", "p_2", "error",
    ]  # fmt: skip
    assert row["decision"] == row["class1"] == "1"
    assert float(row["p_1"]) == pytest.approx(float(expected[1]), abs=1e-5)


def test_explanations_are_made_again_with_another_temperature(mine, scans, tmp_path, capsys):
    picture, out = scans / "1" / "03.png", tmp_path / "out"
    shares, figures = [], []
    for change in ([], ["calibrate", mine], ["calibrate", mine, "--remove"]):
        if change:
            call(*change, capsys=capsys)
        for unchanged in (False, True):
            said, err = call("explain", mine, picture, "--out", out, capsys=capsys)
            assert ("unchanged" in said) is unchanged, change
            assert (f"{mine}: temperature " in err) is (change == ["calibrate", mine])
        with np.load(out / "03.png.explained.npz") as numbers:
            shares.append(json.loads(str(numbers["about"]))["classes"][0])
        figures.append((out / "03.png.explained.png").read_bytes())
        expected = regard.load(mine).predict(picture)[0].classes[0]
        assert shares[-1] == [expected[0], pytest.approx(expected[1], abs=1e-5)]
    assert abs(shares[0][1] - shares[1][1]) > 1e-3
    assert figures[0] == figures[2] != figures[1]


def test_what_was_fitted_for_other_probabilities_is_not_used(mine, scans, caplog, capsys):
    picture = scans / "1" / "03.png"
    plain = regard.calibrate(mine, positive="1", rule="youden")
    classifier = regard.load(mine)
    classifier.use_flips()
    assert classifier.temperature == 1.0
    assert classifier.predict(picture)[0].decision is None
    assert "not used" in caplog.text
    out, err = call("evaluate", mine, "--tta", "flips", "--json", capsys=capsys)
    content = json.loads(out)
    assert "temperature" not in content["diagnostics"]
    assert "stored" not in content
    assert "not used" in err
    flipped = regard.calibrate(mine, positive="1", rule="youden", tta="flips")
    assert flipped.tta == "flips"
    assert flipped.temperature != plain.temperature
    classifier = regard.load(mine)
    assert classifier.calibration is None
    x = classifier.decode(picture)
    mean = classifier.probabilities(torch.stack([x, x.flip(-1)])).mean(dim=0)
    classifier.use_flips()
    assert classifier.calibration == flipped == read_calibration(mine)
    scaled = (mean.log() / flipped.temperature).softmax(dim=0)
    assert classifier.predict(picture, top=3)[0].probabilities == pytest.approx(
        scaled.tolist(), abs=1e-5
    )
    with pytest.raises(UsageError, match="flips"):
        regard.calibrate(mine, tta="crops")


def test_the_command_calibrates_for_flips_and_other_ways_of_asking_do_not_use_it(
    mine, scans, tmp_path, capsys
):
    picture = scans / "1" / "03.png"
    flags = ["--positive", "1", "--at", "youden", "--device", "cpu", "--tta", "flips", "--json"]
    out, err = call("calibrate", mine, *flags, capsys=capsys)
    found = json.loads(out)
    assert (found["tta"], found["images"], found["threshold"]["positive"]) == ("flips", 24, "1")
    flips = regard.load(mine, calibrated=False, flips=True)
    _, validation, _ = predictions_of(mine, split="val", flips=True, calibrated=False)
    assert found["temperature"] == pytest.approx(fit_temperature(validation), rel=1e-4)

    out, err = call("evaluate", mine, "--tta", "flips", "--json", capsys=capsys)
    fitted = json.loads(out)["diagnostics"]  # used, without a word
    assert fitted["temperature"] == found["temperature"]
    assert fitted["threshold"] == found["threshold"]
    assert "fitted" not in err
    out, err = call("predict", mine, picture, "--tta", "flips", "--json", capsys=capsys)
    assert json.loads(out)["decision"] in ("1", "not 1")
    assert "alone" not in err
    p = flips.predict(picture, top=3)[0].probabilities
    scaled = torch.tensor(p).log().div(found["temperature"]).softmax(dim=0)
    answer = {c["class"]: c["probability"] for c in json.loads(out)["classes"]}
    assert [answer[name] for name in "012"] == pytest.approx(scaled.tolist(), abs=1e-5)
    out, err = call(
        "evaluate", mine, "--size", "24", "--tta", "flips", "--json", capsys=capsys
    )  # of another size
    assert not {"temperature", "threshold"} & json.loads(out)["diagnostics"].keys()
    assert err.count("regard:") == err.count("not used") == 1


@pytest.mark.parametrize(
    ("how", "used"),
    [
        ({"size": (16, 16)}, True), ({"size": (24, 24)}, False), ({"ten_crop": True}, False),
        ({"crop_pct": 1.0}, True), ({"crop_pct": 0.8}, False),
        ({"flips": True}, False), ({"size": (24, 24), "calibrated": False}, None),
    ],
)  # fmt: skip
def test_a_calibration_is_used_for_the_images_as_it_was_fitted(how, used, mine, caplog):
    found, seen = regard.calibrate(mine, positive="1", rule="youden"), []
    caplog.clear()
    predictions_of(mine, prepare=lambda classifier, _: seen.append(classifier.calibration), **how)
    assert seen == [found if used else None]
    assert ("not used" in caplog.text) == (used is False)


@pytest.mark.parametrize(
    ("words", "how"),
    [(["--size", "24"], {"size": (24, 24)}), (["--crop-pct", "0.6"], {"crop_pct": 0.6})],
)
def test_a_threshold_is_chosen_anew_for_other_input(mine, words, how, capsys):
    regard.calibrate(mine, positive="1", rule="sensitivity=1")
    flags = [*words, "--positive", "1", "--at", "youden", "--json"]
    out, err = call("evaluate", mine, *flags, capsys=capsys)
    threshold = json.loads(out)["diagnostics"]["threshold"]
    _, validation, _ = predictions_of(mine, split="val", calibrated=False, **how)
    assert threshold["value"] == pytest.approx(
        choose_threshold(validation, "1", "youden").value, rel=1e-4
    )
    assert err.count("not used") == 1
    _, err = call("evaluate", mine, "--ten-crop", "--tta", "flips", code=2, capsys=capsys)
    assert "--ten-crop" in err
    assert "--tta" in err


def test_other_doors_say_that_a_calibration_for_flips_is_not_used(mine, scans, tmp_path, caplog):
    from regard.report.source import RunSource

    regard.calibrate(mine, positive="1", rule="youden", tta="flips")
    for door in (RunSource, regard.load):
        caplog.clear()
        assert door(mine).calibration is None
        assert [r for r in caplog.records if "alone" in r.getMessage()]


@pytest.mark.native
def test_flips_are_averaged_by_an_engine_too(mine, scans, capsys):
    pictures = [scans / "1" / "03.png", scans / "2" / "07.png"]
    answers = []
    for each in ("eager", "onnxruntime"):
        flags = ["--tta", "flips", "--engine", each, "--precision", "fp32", "--json"]
        out, _ = call("predict", mine, *pictures, *flags, capsys=capsys)
        rows = [json.loads(line)["classes"] for line in out.splitlines()]
        answers.append([sorted((c["class"], c["probability"]) for c in row) for row in rows])
    for one, other in zip(*answers, strict=True):
        assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-4)


@pytest.mark.slow
def test_evaluate_reports_what_is_stored_unless_told_otherwise(mine, capsys):
    def study(*flags: str) -> dict:
        out, _ = call("evaluate", mine, "--json", *flags, capsys=capsys)
        content = json.loads(out)
        return {**content["diagnostics"], "nll": content["metrics"]["nll"]["value"]}

    before = study()
    found = regard.calibrate(mine, positive="1", rule="specificity=0.9")
    stored = study()
    assert stored["temperature"] == found.temperature
    assert stored["threshold"] == found.threshold.to_dict()
    assert stored["one_class"]["positive"] == "1"
    assert stored["nll"] != before["nll"] == study("--no-calibrate")["nll"]
    assert "threshold" not in study("--no-calibrate", "--positive", "1")
    anew = study("--positive", "1", "--at", "youden")  # with the stored temperature
    assert anew["threshold"]["rule"] == "youden"
    assert anew["temperature"] == found.temperature
    other = study("--positive", "2")
    assert "threshold" not in other
    assert other["one_class"]["positive"] == "2"


def test_evaluate_writes_the_probabilities_that_predict_gives(mine, tmp_path, capsys):
    """Of which the printed metrics are made; without the temperature where these are."""
    assert regard.calibrate(mine, positive="1", rule="specificity=0.9").temperature != 1.0
    for flags in ([], ["--no-calibrate"]):
        file = tmp_path / f"said{len(flags)}.npz"
        out, _ = call("evaluate", mine, "--json", "--predictions", file, *flags, capsys=capsys)
        with np.load(file) as stored:
            said, labels, paths = (stored[k] for k in ("probabilities", "labels", "paths"))
        nll = -np.log(said[np.arange(len(said)), labels].astype(float)).mean()
        assert json.loads(out)["metrics"]["nll"]["value"] == pytest.approx(nll, rel=1e-5)
        network = regard.load(mine, calibrated=not flags)
        expected = [p.probabilities for p in network.predict_each(paths.tolist())]
        assert np.abs(said - np.array(expected)).max() < 1e-6


def test_older_runs_compute_their_validation_probabilities(mine, capsys):
    out, _ = call("calibrate", mine, "--json", capsys=capsys)
    (mine / "validation.npz").unlink()
    again, _ = call("calibrate", mine, "--json", capsys=capsys)
    first, second = json.loads(out), json.loads(again)
    assert second["temperature"] == pytest.approx(first["temperature"], rel=1e-3)
    assert second["images"] == first["images"] == 24
    call("calibrate", mine, "--remove", capsys=capsys)
    assert not (mine / "calibration.json").exists()
    assert "no calibration" in call("calibrate", mine, "--remove", capsys=capsys)[0]


def test_other_images_calibrate_but_never_those_of_training_and_test(mine, scans, tmp_path, capsys):
    folder = shutil.copytree(scans, tmp_path / "all")
    Image.new("L", (24, 24), 200).save(folder / "1" / "new.png")
    out, err = call("calibrate", mine, folder, "--json", capsys=capsys)
    assert json.loads(out)["images"] == 25  # 72 of training and 24 of the test left out
    assert "left out 96 images of 121" in err
    rows = rows_of(mine / "splits.csv")
    for row in rows:
        if row["split"] == "val":
            (folder / row["path"]).unlink()
    (folder / "1" / "new.png").unlink()
    _, err = call("calibrate", mine, folder, code=2, capsys=capsys)
    assert "none for validation" in err
    _, err = call("calibrate", mine, folder, "--split", "all", code=2, capsys=capsys)
    assert "96 images were used to train or test" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--at", "youden"], "--positive CLASS"),
        (["--positive", "1"], "--at"),
        (["--positive", "1", "--at", "best"], "--at 'best'"),
        (["--positive", "x", "--at", "youden"], "--positive 'x': choose one of 0, 1, 2"),
        (["--no-temperature"], "nothing is left to do"),
        (["--split", "val"], "only with DATA"),
        (["no/such/data"], "no such folder"),
        (["--remove", "--positive", "1"], "RUN alone"),
    ],
)
def test_wrong_calls_are_one_line_and_store_nothing(whole, capsys, flags, message):
    _, err = call("calibrate", whole, *flags, code=2, capsys=capsys)
    assert message in err
    assert err.count("\n") == 1
    assert not (whole / "calibration.json").exists()


def test_a_run_without_validation_images_asks_for_others(mine, capsys):
    run = json.loads((mine / "run.json").read_text())
    del run["facts"]["counts"]["val"]
    (mine / "run.json").write_text(json.dumps(run))
    assert "without validation images" in call("calibrate", mine, code=2, capsys=capsys)[1]


def test_a_damaged_or_foreign_calibration_is_named(mine, scans, capsys):
    picture = scans / "1" / "03.png"
    regard.calibrate(mine)
    stored = json.loads((mine / "calibration.json").read_text())
    for damaged in ("", "{}", "[]", json.dumps({**stored, "temperature": 0})):
        (mine / "calibration.json").write_text(damaged)
        assert "calibration.json" in call("predict", mine, picture, code=2, capsys=capsys)[1]
        with pytest.raises(UsageError, match=r"calibration\.json"):
            regard.load(mine)
    (mine / "calibration.json").write_text(json.dumps({**stored, "network": "0123"}))
    assert "not used" in call("predict", mine, picture, capsys=capsys)[1]
    call("calibrate", mine, capsys=capsys)  # replaces it
    assert regard.load(mine).calibration is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(mine, capsys):
    mine.chmod(0o500)
    assert "can't be written" in call("calibrate", mine, code=1, capsys=capsys)[1]
    mine.chmod(0o700)


@pytest.mark.native
def test_an_export_answers_and_decides_as_predict_does(mine, scans, tmp_path, capsys):
    found = regard.calibrate(mine, positive="1", rule="sensitivity=1")
    said, _ = call("export", mine, "--to", "onnx", "--out", tmp_path / "net.onnx", capsys=capsys)
    assert regard.load(mine).calibration.sentence() in said
    done = subprocess.run(
        [sys.executable, tmp_path / "net.py", scans / "1"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, _ = call("predict", mine, scans / "1", "--json", capsys=capsys)
    pairs = list(zip(done.stdout.splitlines(), out.splitlines(), strict=True))
    assert len(pairs) == 40
    for a, b in (map(json.loads, pair) for pair in pairs):
        assert a["decision"] == b["decision"]
        assert a["classes"][0]["probability"] == pytest.approx(
            b["classes"][0]["probability"], abs=1e-4
        )
    from regard.engines.formats import FORMATS

    facts = FORMATS["onnx"].metadata(tmp_path / "net.onnx")
    assert facts["calibration"]["temperature"] == found.temperature


@pytest.mark.parametrize(("count", "sure"), [(20, 0.8), (500, 0.8), (20, 1 - 2e-30)])
def test_a_network_that_has_all_images_right_is_made_no_surer_than_they_show(count, sure):
    """n images of n right, and one of each class alike: (n + 1/3) / (n + 1) in three classes."""
    said = np.full((count, 3), (1 - sure) / 2 or 1e-30)
    said[:, 0] = sure
    p = Predictions(said, np.zeros(count, np.int64), ["a", "b", "c"])
    scaled = with_temperature(p, fit_temperature(p)).probabilities[:, 0]
    assert scaled == pytest.approx(np.full(count, (count + 1 / 3) / (count + 1)), abs=1e-4)
