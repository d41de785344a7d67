"""Ensembles and test-time augmentation: the mean of several answers, and how far they differ."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import regard
from regard.attention import StageMap
from regard.cli import run_command
from regard.data.preprocess import Flips, Preprocess
from regard.ensemble import Ensemble
from regard.evaluation import Predictions, average
from regard.evaluation.familiarity import FILE
from regard.explanations.averaging import average_explanations
from regard.explanations.explanation import Explanation
from regard.run_data import with_common_paths
from tests.helpers import rows_of


def predictions(p, labels, paths, classes=("a", "b")):
    return Predictions(np.array(p), np.array(labels), list(classes), None, list(paths))


def test_members_answer_for_the_images_that_they_have():
    one = predictions([[0.8, 0.2], [0.4, 0.6]], [0, 1], ["x", "y"])
    two = predictions([[0.7, 0.3], [0.1, 0.9]], [0, 0], ["z", "y"], ("b", "a"))  # another order
    found = average([one, two], ["one", "two"])
    assert found.predictions.paths == ["x", "y", "z"]
    assert found.predictions.probabilities == pytest.approx(
        np.array([[0.8, 0.2], [0.65, 0.35], [0.3, 0.7]])
    )
    assert found.predictions.labels.tolist() == [0, 1, 1]
    assert found.answered == {1: 2, 2: 1}


def test_the_spread_is_that_of_numpy():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], size=(4, 50))
    labels, paths = rng.integers(0, 3, 50), [str(i) for i in range(50)]
    each = [Predictions(p, labels, ["a", "b", "c"], None, paths) for p in shares]
    found = average(each, list("wxyz"))
    assert found.predictions.probabilities == pytest.approx(shares.mean(axis=0))
    assert found.sd == pytest.approx(
        shares.std(axis=0, ddof=1)[np.arange(50), labels].mean(), rel=1e-9
    )
    votes = shares.argmax(axis=2)
    assert found.disagreement == pytest.approx((votes != votes[0]).any(axis=0).mean())
    wrong = Predictions(shares[1], (labels + 1) % 3, ["a", "b", "c"], None, paths)
    with pytest.raises(ValueError, match="different label"):
        average([each[0], wrong], ["w", "x"])
    with pytest.raises(ValueError, match="x has other classes than w: c, d"):
        average([each[0], Predictions(shares[1], labels, ["a", "b", "d"], None, paths)], ["w", "x"])


@pytest.fixture(scope="module")
def folds(whole, tmp_path_factory) -> list[Path]:
    """Two runs that differ in their weights, and whose test images the other validated with."""
    found = []
    for k in range(2):
        run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("folds") / f"fold {k}"))
        (run / FILE).unlink()
        weights = load_file(run / "model.safetensors")
        generator = torch.Generator().manual_seed(k)
        for name, tensor in weights.items():
            if tensor.is_floating_point() and name.endswith("weight"):
                tensor += 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        save_file(weights, run / "model.safetensors")
        found.append(run)
    rows = rows_of(found[1] / "splits.csv")
    with (found[1] / "splits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        swapped = {"train": "train", "val": "test", "test": "val"}
        writer.writerows({**row, "split": swapped[row["split"]]} for row in rows)
    return found


def test_predict_averages_networks_and_says_how_far_they_differ(folds, scans, tmp_path, capsys):
    a, b = folds
    picture = scans / "1" / "03.png"
    shares = []
    for run in folds:
        classifier = regard.load(run)
        shares.append(classifier.probabilities(classifier.decode(picture)[None])[0])
    expected = torch.stack(shares)
    assert run_command(["predict", str(a), str(b), str(picture), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    k = int(answer["classes"][0]["class"])
    assert answer["classes"][0]["probability"] == pytest.approx(
        float(expected.mean(0)[k]), abs=1e-5
    )
    assert answer["classes"][0]["sd"] == pytest.approx(float(expected.std(0)[k]), abs=1e-5)
    assert answer["disagreement"] in (0.0, 0.5)
    out = tmp_path / "x.csv"
    call = ["predict", str(a), str(b), str(picture), "--csv", str(out)]
    capsys.readouterr()
    assert run_command([*call, "--tta", "flips"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "new images" in line]
    assert [line.partition(": the image ")[0] for line in warned] == [f"regard: {b}"]
    (row,) = rows_of(out)
    assert row["tta"] == "flips"
    assert float(row["sd1"]) >= 0
    assert run_command(["predict", str(a), str(a), str(picture)]) == 2
    assert "named twice" in capsys.readouterr().err


def test_networks_of_different_sizes_are_averaged_and_other_classes_refused(scans):
    torch.manual_seed(0)

    def network(name, size, classes):
        model = regard.create_model(name, num_classes=3, in_chans=1)
        preprocess = Preprocess((1, size, size), (0.5,), (0.25,), "squash")
        return regard.Classifier(model, classes, preprocess)

    one, two = network("ag_sononet8", 16, ["0", "1", "2"]), network("sononet8", 32, ["2", "0", "1"])
    both = Ensemble([one, two], ["one", "two"])
    pictures = sorted((scans / "2").iterdir())[:5]
    found = both.predict(pictures, top=3)
    for path, p in zip(pictures, found, strict=True):
        each = [dict(m.predict(path, top=3)[0].classes) for m in (one, two)]
        for name, share in p.classes:
            assert share == pytest.approx((each[0][name] + each[1][name]) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="three has other classes than one: 2, cat"):
        Ensemble([one, network("sononet8", 32, ["0", "1", "cat"])], ["one", "three"])


def small(size=16, classes=("0", "1", "2"), resize="squash", mean=0.5) -> regard.Classifier:
    model = regard.create_model("ag_sononet8", num_classes=3, in_chans=1)
    return regard.Classifier(
        model, list(classes), Preprocess((1, size, size), (mean,), (0.25,), resize)
    )


def test_each_answer_of_an_ensemble_is_that_of_all_its_networks(folds, scans, tmp_path):
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in folds]
    for run in runs:
        regard.calibrate(run)
    both, alone = Ensemble.load(runs), [regard.load(run) for run in runs]
    assert all(m.temperature != 1 for m in alone)
    for each in (both.members[1], alone[1]):  # whose classes come in another order
        head = each.model.get_classifier()
        layers = head if isinstance(head, torch.nn.ModuleList) else [head]
        for layer in layers:
            order = [2, 0, 1]
            layer.weight.data, layer.bias.data = layer.weight.data[order], layer.bias.data[order]
        each.class_names = [each.class_names[i] for i in order]
    both = Ensemble(both.members, ["a", "b"])
    pictures = sorted((scans / "2").iterdir())[:4]
    x = torch.stack([both.decode(p) for p in pictures])
    parts = [
        torch.tensor([[dict(p.classes)[c] for c in both.class_names] for p in m.predict(pictures)])
        for m in alone
    ]
    expected = torch.stack(parts).mean(dim=0).numpy()
    assert np.abs(parts[0].numpy() - expected).max() > 1e-4
    assert both.probabilities(x).numpy() == pytest.approx(expected, abs=1e-5)
    assert both.answers(x).numpy() == pytest.approx(expected, abs=1e-5)
    shares, distances = both.with_distances(x)
    assert shares.numpy() == pytest.approx(expected, abs=1e-5)
    assert distances == pytest.approx([p.distance for p in both.predict(pictures)], abs=1e-4)
    assert [p.probabilities for p in both.predict(pictures)] == [
        pytest.approx(row, abs=1e-5) for row in expected.tolist()
    ]
    both.drop_calibration()
    assert [m.temperature for m in both.members] == [1, 1]
    both.use_flips()
    assert both.mirrors
    again = both.probabilities(torch.stack([both.decode(p) for p in pictures]))
    assert again.numpy() == pytest.approx(
        np.array([p.probabilities for p in both.predict(pictures)]), abs=1e-5
    )


def test_distances_of_an_ensemble_are_relative_to_the_thresholds(whole, scans, capsys, tmp_path):
    members = [regard.load(whole), regard.load(whole)]
    limits = [m.familiarity.threshold for m in members]
    members[1].familiarity = replace(members[1].familiarity, threshold=limits[1] / 2)
    both, picture = Ensemble(members, ["a", "b"]), scans / "2" / "05.png"
    (_, (distance,)) = both.with_distances(both.decode(picture)[None])
    own = members[0].predict(picture)[0].distance
    (p,) = both.predict(picture)
    assert distance == pytest.approx((own / limits[0] + 2 * own / limits[0]) / 2, rel=1e-4)
    assert (p.distance, p.unlike_training) == (pytest.approx(distance, rel=1e-4), distance > 1)
    members[0].engine = members[1].probabilities  # which gives no features
    assert not both.measures_distances
    assert both.predict(picture)[0].distance is None
    copy = shutil.copytree(whole, tmp_path / "copy")
    call = ["predict", str(whole), str(copy), str(picture), "--csv", str(tmp_path / "x.csv")]
    assert run_command(call) == 0
    assert "false alarm rate" not in capsys.readouterr().err  # the first one's alone


def test_what_one_network_has_for_itself_is_refused(scans):
    alike = Ensemble([small(), small(mean=0.4)], ["a", "b"])
    x = alike.decode(scans / "2" / "05.png")[None]
    assert alike.probabilities(x).shape == (1, 3)
    for name in ("model", "temperature", "preprocess"):
        with pytest.raises(ValueError, match=name):
            getattr(alike, name)
    for name in ("engine", "calibration", "familiarity", "flipped_calibration"):
        assert getattr(alike, name) is None
        with pytest.raises(ValueError, match=name):
            setattr(alike, name, None)
    with pytest.raises(ValueError, match="features"):
        alike.features(x)
    assert Ensemble([small(), small()], ["a", "b"]).preprocess == small().preprocess
    sizes = Ensemble([small(), small(32)], ["a", "b"])
    for call in (sizes.probabilities, sizes.answers, sizes.with_distances, sizes.decode):
        with pytest.raises(ValueError, match="differently"):
            call(x)
    assert len(sizes.predict(scans / "2" / "05.png")) == 1
    with pytest.raises(ValueError, match="b is an ensemble"):
        Ensemble([small(), sizes], ["a", "b"])


def test_every_public_name_of_a_classifier_has_an_answer_of_an_ensemble():
    """A name that is new in Classifier has to be decided on here."""
    one = small()
    names = {n for n in {*dir(one), *vars(one)} if not n.startswith("_")}
    own = {n for n in vars(Ensemble) if not n.startswith("_")} | {
        "class_names",
        "config",
        "members",
    }
    # they call what the ensemble has
    assert names - own == {"predict", "prediction", "decision", "explain"}


def test_an_ensemble_shows_the_mean_of_its_networks_maps(scans):
    torch.manual_seed(0)

    def network(size, classes, resize="squash"):
        model = regard.create_model("ag_sononet8", num_classes=3, in_chans=1)
        return regard.Classifier(
            model, classes, Preprocess((1, size, size), (0.5,), (0.25,), resize)
        )

    one, two = network(32, ["0", "1", "2"]), network(48, ["2", "0", "1"])
    both, picture = Ensemble([one, two], ["one", "two"]), scans / "2" / "03.png"
    shown = both.explain(picture)
    (said,) = both.predict(picture, top=3)
    assert shown.classes == said.classes
    assert shown.target == said.classes[0]
    assert [m.target[0] for m in shown.members] == [shown.target[0]] * 2
    assert [m.name for m in shown.spatial()] == [m.name for m in one.explain(picture).spatial()]
    for m in shown.spatial():
        a, b = (next(x for x in e.spatial() if x.name == m.name).values for e in shown.members)
        large = torch.nn.functional.interpolate(
            torch.from_numpy(a / a.max())[None, None], b.shape, mode="bilinear"
        )[0, 0].numpy()
        assert m.values == pytest.approx((large + b / b.max()) / 2, abs=1e-5)
    (again,) = regard.explain(both, picture.read_bytes(), target="1", methods=["gradcam"])
    assert again.target[0] == "1"
    assert [m.name for m in again.maps] == ["Grad-CAM"]
    wide = np.zeros((40, 80), np.uint8)
    wide[10:20] = np.arange(80)
    cropped = Ensemble([one, network(32, ["0", "1", "2"], "crop")], ["one", "two"])
    with pytest.raises(ValueError, match="different parts of the image"):
        cropped.explain(wide)


def test_each_map_of_a_mean_counts_equally_whatever_its_sign():
    def shown(values):
        maps = [StageMap("gate", "spatial", np.array(values, np.float32), "", "gate")]
        return Explanation(
            path="x", image=np.zeros((4, 4), np.uint8), box=(0, 0, 4, 4), classes=[("a", 1.0)],
            target=("a", 1.0), maps=maps,
        )  # fmt: skip

    both = average_explanations([shown([[-1, -4], [-2, -3]]), shown([[0, 5], [0, 0]])], [("a", 1)])
    assert both.maps[0].values.tolist() == [[-0.125, 0.0], [-0.25, -0.375]]


def test_a_mirrored_network_is_explained_on_the_image_as_it_is(whole, scans):
    picture, flipped = scans / "2" / "05.png", regard.load(whole)
    flipped.use_flips()
    shown, plain = flipped.explain(picture), regard.load(whole).explain(picture)
    assert shown.classes == flipped.predict(picture, top=3)[0].classes
    for a, b in zip(shown.spatial(), plain.spatial(), strict=True):
        assert a.values == pytest.approx(b.values)


def test_explain_refuses_a_second_network_instead_of_taking_its_folder_for_images(
    whole, scans, tmp_path, capsys
):
    call = ["explain", str(whole), str(whole), str(scans / "1"), "--out", str(tmp_path / "out")]
    assert run_command(call) == 2
    err = capsys.readouterr().err
    assert "one network" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evaluate_pools_folds_so_that_no_network_tests_its_own_images(folds, capsys):
    a, b = map(str, folds)
    assert run_command(["evaluate", a, b, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["n"] == 48  # 24 that each one was neither trained nor validated on
    assert content["ensemble"]["members_per_image"] == {"1": 48}
    assert content["ensemble"]["disagreement"] is None
    assert [m["images"] for m in content["ensemble"]["members"]] == [24, 24]
    assert run_command(["evaluate", a, b, "--split", "all"]) == 0
    out, err = capsys.readouterr()
    assert "120 images" in out
    assert "differ in the top-1 class" in out
    assert "trained this network" in err
    assert run_command(["evaluate", a, b, "--positive", "1", "--at", "youden"]) == 2
    assert "--at" in capsys.readouterr().err
    assert run_command(["evaluate", a, b, "digits", "digits"]) == 2
    assert "one DATA" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["linked", "copied", "renamed"])
def test_runs_on_the_same_images_in_two_places_are_averaged(whole, scans, tmp_path, capsys, how):
    place, run = tmp_path / how, Path(shutil.copytree(whole, tmp_path / "run"))
    if how == "linked":
        place.symlink_to(scans)
    else:
        shutil.copytree(scans, place)
    if how == "renamed":
        for file in place.glob("*/*.png"):
            file.rename(file.with_stem(f"scan {file.stem}"))
        listed = (run / "splits.csv").read_text(encoding="utf-8")
        (run / "splits.csv").write_text(listed.replace("/", "/scan "), encoding="utf-8")
    stored = json.loads((run / "run.json").read_text(encoding="utf-8"))
    stored["plan"] |= {"data": str(place), "location": str(place)}
    (run / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    assert run_command(["evaluate", str(whole), str(run), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["n"] == 24
    assert content["ensemble"]["members_per_image"] == {"2": 24}
    assert content["ensemble"]["sd"] == pytest.approx(0, abs=1e-6)


def test_copies_of_one_image_in_the_folds_of_a_run_stay_two_images(tmp_path):
    lines = ("a/1,a,{},,01", "a/2,a,{},,01", "b/1,b,{},,02", "b/2,b,{},,")
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, splits in zip(folders, (["test", "train"] * 2, ["train", "test"] * 2), strict=True):
        folder.mkdir()
        listed = "\n".join(map(str.format, lines, splits))
        text = f"path,label,split,group,content\n{listed}\n"
        (folder / "splits.csv").write_text(text, encoding="utf-8")
    each = [predictions([[1, 0], [0, 1]], [0, 1], [f"/x/a/{k}", f"/x/b/{k}"]) for k in (1, 2)]
    found = with_common_paths(folders, each)
    assert [p.paths for p in found] == [["/x/a/1", "/x/b/1"], ["/x/a/2", "/x/b/2"]]
    moved = [each[0], replace(each[0], paths=["/y/a/1", "/y/b/1"])]
    again = with_common_paths([folders[0], folders[0]], moved)
    assert [p.paths for p in again] == [["/x/a/1", "/x/b/1"]] * 2
    (folders[1] / "splits.csv").unlink()
    assert with_common_paths(folders, moved)[1].paths == ["/y/a/1", "/y/b/1"]


def test_flips_average_each_image_and_its_mirror_image(whole, scans, capsys):
    picture = scans / "2" / "05.png"
    plain, flipped = regard.load(whole), regard.load(whole)
    flipped.use_flips()
    x = plain.decode(picture)
    assert flipped.decode(picture).shape == Flips.of(plain.preprocess).shape == (2, 1, 16, 16)
    expected = plain.probabilities(torch.stack([x, x.flip(-1)])).mean(dim=0)
    (p,) = flipped.predict(picture, top=3)
    assert p.probabilities == pytest.approx(expected.tolist(), abs=1e-6)
    assert run_command(["predict", str(whole), str(picture), "--json", "--tta", "flips"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tta"] == "flips"
    assert answer["classes"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert run_command(["evaluate", str(whole), "--tta", "flips", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["tta"], content["n"]) == ("flips", 24)
    assert run_command(["evaluate", str(whole), "--tta", "flips", "--ten-crop"]) == 2
    assert "ten crops" in capsys.readouterr().err
