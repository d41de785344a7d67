"""The weights that come with Regard, and the script that ships them."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import regard
from regard import weights
from regard.cli import run_command
from regard.errors import CheckpointError, UsageError
from regard.evaluation.familiarity import FILE as FAMILIARITY
from regard.models.io import check_loadable, save_model
from regard.predict import network_hash
from regard.trained_on import known_images

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(weights.shipped())
DIGITS = "ag_sononet8.digits"

spec = importlib.util.spec_from_file_location("ship_weights", ROOT / "scripts/ship_weights.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder of weights in place of the shipped ones, which it holds copies of."""
    folder = tmp_path / "weights"
    shutil.copytree(weights.FOLDER, folder)
    monkeypatch.setattr(weights, "FOLDER", folder)
    monkeypatch.setattr(weights, "LARGEST", weights.LARGEST + 2_000_000)  # room for the tests' own
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_each_gives_its_stored_answer(name):
    found = weights.find_shipped(name)
    classifier = regard.load(name)
    size = classifier.preprocess.input_size
    answers = dict(classifier.predict([script.test_image(*size)], top=1000)[0].classes)
    np.testing.assert_allclose(
        [answers[c] for c in classifier.class_names], found.answer, atol=2e-3
    )
    made = regard.create_model(name, pretrained=True).eval()
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made(x), classifier.model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_each_card_says_what_it_must(name):
    found = weights.find_shipped(name)
    text = (found.folder / "README.md").read_text(encoding="utf-8")
    facts = script.facts_of(name)
    for key in script.NEEDED:
        assert facts[key] in text
    assert weights.sha256_of(found.folder / "model.safetensors") in text
    assert f"**{found.accuracy:.2%}**" in text
    assert found.low <= found.accuracy <= found.high
    for row in ("command", "seed", "hours", "machine", "license", "origin"):
        assert row in text
    own = json.loads((found.folder / "evaluation.json").read_text())
    assert own["metrics"]["top1"]["value"] == found.accuracy


def test_all_together_are_small_and_half_precision():
    files = [p for p in weights.FOLDER.rglob("*") if p.is_file() and p.suffix != ".py"]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert {p.name for p in weights.FOLDER.iterdir() if p.is_dir()} - {"__pycache__"} == {*SHIPPED}
    for name in SHIPPED:
        for key, tensor in load_file(weights.FOLDER / name / "model.safetensors").items():
            assert tensor.ndim < 2 or tensor.dtype == torch.float16, key


def test_timm_knows_them_by_name_and_tag_and_the_papers_networks_stay():
    assert DIGITS in timm.list_models("*sononet*", pretrained=True)
    assert timm.is_model_pretrained("ag_sononet8")
    assert regard.list_models("ag_*", pretrained=True) == [n for n in SHIPPED if n[:3] == "ag_"]
    plain = timm.create_model("ag_sononet8")
    assert (plain.num_classes, plain.pretrained_cfg["input_size"]) == (14, (1, 208, 272))
    for name in ("ag_sononet8", DIGITS):
        model = timm.create_model(name, pretrained=True)
        assert (model.num_classes, model.pretrained_cfg["input_size"]) == (10, (1, 48, 48))


def test_other_classes_get_a_new_classifier_and_other_channels_fit():
    model = regard.create_model("ag_sononet8", pretrained=True)
    other = regard.create_model("ag_sononet8", pretrained=True, num_classes=3, in_chans=3)
    ours, theirs = model.state_dict(), other.state_dict()
    differ = {k for k in ours if ours[k].shape != theirs[k].shape}
    assert {k.split(".")[0] for k in differ} == {"heads", "block1"}
    assert all(torch.equal(ours[k], theirs[k]) for k in ours.keys() - differ if "heads" not in k)
    first = theirs["block1.0.0.weight"]
    close = {"atol": 1e-3, "rtol": 1e-3}  # timm sums them in half precision
    torch.testing.assert_close(first.sum(dim=1), ours["block1.0.0.weight"].sum(dim=1), **close)


def add(folder: Path, name: str, **arguments) -> torch.nn.Module:
    """Random weights among the shipped ones."""
    architecture = name.partition(".")[0]
    model = regard.create_model(architecture, **arguments).eval()
    save_model(model, folder / name)
    index = json.loads((folder / weights.INDEX).read_text())
    sums = {f: weights.sha256_of(folder / name / f) for f in ("config.json", "model.safetensors")}
    index[name] = {**index[DIGITS], "sha256": sums}
    (folder / weights.INDEX).write_text(json.dumps(index))
    return model


def test_weights_bring_the_arguments_that_they_were_trained_with(elsewhere, tmp_path):
    arguments = {"stem": "cifar", "channels": [8, 8, 16, 16], "reduction": 4}
    model = add(elsewhere, "cbam_resnet34.small", num_classes=5, in_chans=1, **arguments)
    again = regard.create_model("cbam_resnet34", pretrained=True).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    few = regard.create_model("cbam_resnet34.small", pretrained=True, num_classes=2)
    save_model(few, tmp_path / "few")
    assert regard.load(tmp_path / "few").model.num_classes == 2
    as_tuple = {"channels": (8, 8, 16, 16)}  # config.json has a list
    assert regard.create_model("cbam_resnet34", pretrained=True, **as_tuple).num_classes == 5
    with pytest.raises(UsageError, match="reduction=16: the weights cbam"):
        regard.create_model("cbam_resnet34", pretrained=True, reduction=16)


@pytest.mark.parametrize(
    ("name", "others", "same"),
    [
        ("cbam_resnet18.imagenette", {"channel_pool": "max"}, {"channel_pool": "both"}),
        ("cbam_resnet18.imagenette", {"order": "parallel"}, {"drop_path_rate": 0.1}),
        ("cbam_resnet18.imagenette", {"act_layer": "gelu"}, {"order": "channel_spatial"}),
        ("attention56_cifar.cifar10", {"attention": "naive"}, {"attention": "residual"}),
        ("attention56_cifar.cifar10", {"mask_activation": "channel"}, {"drop_rate": 0.2}),
        ("ag_sononet16.imagenette", {"normalize": "range"}, {"normalize": "mean_flow"}),
    ],
)
def test_arguments_that_the_weights_were_not_trained_with_are_refused(name, others, same):
    """Each fits the shapes, and would answer something else."""
    with pytest.raises(UsageError, match=f"{next(iter(others))}='.*the weights {name} are for "):
        regard.create_model(name, pretrained=True, **others)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = regard.create_model(name, pretrained=True).eval()(x)
        assert torch.equal(regard.create_model(name, pretrained=True, **same).eval()(x), plain)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_changed_weights_are_an_error(elsewhere, capsys, file):
    path = elsewhere / DIGITS / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for call in (regard.load, lambda n: regard.create_model(n, pretrained=True)):
        with pytest.raises(CheckpointError, match="checksum"):
            call("ag_sononet8")
    assert run_command(["predict", "ag_sononet8", "x.png"]) == 2
    assert str(path) in capsys.readouterr().err


def test_commands_take_the_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(script.test_image(1, 48, 48)).save("a b.png")
    assert run_command(["predict", "ag_sononet8", "a b.png", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["classes"][0]
    assert best["probability"] == pytest.approx(max(weights.find_shipped(DIGITS).answer), abs=2e-3)
    assert run_command(["explain", DIGITS, "a b.png", "--out", "e", "--method", "attention"]) == 0
    assert (tmp_path / "e/a b.png.explained.png").is_file()
    assert run_command(["models", "ag_sononet8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.partition("\n")[2])["weights"]
    assert [w["name"] for w in shown] == [DIGITS]
    assert run_command(["models", DIGITS]) == 0
    assert "arguments of ag_sononet8" in capsys.readouterr().out
    for name, word in (("ag_sononet8.other", DIGITS), ("resnet18", DIGITS), ("x", "no such")):
        assert run_command(["predict", name, "a b.png"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert word in lines[0]


def test_names_of_weights_make_an_ensemble(tmp_path, capsys):
    image = tmp_path / "x.png"
    Image.fromarray(script.test_image(3, 64, 64)).save(image)
    names = [n for n in SHIPPED if n.endswith(".imagenette")]
    each = [regard.load(name).predict(image, top=10)[0].classes for name in names]
    mean = {c: np.mean([dict(classes)[c] for classes in each]) for c, _ in each[0]}
    call = ["predict", names[0], f"local-dir:{weights.FOLDER / names[1]}", *names[2:]]
    for networks in (call, ["predict", *names]):
        assert run_command([*networks, str(image), "--top", "10", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)["classes"]
        assert {c["class"]: c["probability"] for c in answer} == pytest.approx(mean, abs=1e-5)
    assert run_command(["predict", names[0], names[0].partition(".")[0], str(image)]) == 2
    assert "twice" in capsys.readouterr().err
    assert run_command(["evaluate", DIGITS, "ag_sononet8", "digits"]) == 2
    assert "twice" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["cut", "empty", "text", "other"])
def test_damaged_hashes_of_the_training_images_are_named(elsewhere, capsys, fault):
    path = elsewhere / DIGITS / "images.npz"
    content = path.read_bytes()
    if fault == "other":
        np.savez(path, contents=np.zeros(3), splits=np.zeros(3, np.uint8))
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"x\0"}[fault])
    for call in (["predict", DIGITS, str(path)], ["evaluate", DIGITS]):
        assert run_command(call) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert str(path) in lines[0]


def entries_of(folder: Path, **changes) -> Path:
    """Changes entries of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_classes": 7}, "num_classes"), ({"num_classes": "x"}, "num_classes"),
     ({"model_args": [1]}, "model_args"), ({"architecture": None}, "architecture"),
     ({"architecture": 3}, "architecture"), ({"pretrained_cfg": "x"}, "pretrained_cfg")],
)  # fmt: skip
def test_a_folder_that_would_answer_at_random_is_refused(tmp_path, changes, word):
    folder = Path(shutil.copytree(weights.FOLDER / DIGITS, tmp_path / "ü x"))
    path = entries_of(folder, **changes)
    with pytest.raises(UsageError, match=word) as caught:
        regard.load(folder)
    assert str(path) in str(caught.value)


def test_a_folder_without_weights_says_so(tmp_path):
    folder = Path(shutil.copytree(weights.FOLDER / DIGITS, tmp_path / "x"))
    (folder / "model.safetensors").unlink()  # familiarity.safetensors stays, which timm would take
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        regard.load(folder)


def test_images_that_trained_them_are_no_test(capsys):
    found = weights.find_shipped(DIGITS)
    for data in ([], ["digits"]):
        assert run_command(["evaluate", "ag_sononet8", *data, "--json"]) == 0
        tested = json.loads(capsys.readouterr().out)
        assert (tested["n"], tested["split"]) == (found.images, "test")
        assert tested["metrics"]["top1"]["value"] == pytest.approx(found.accuracy)
    known = known_images(found.folder)
    assert len(known) > 1700


@pytest.mark.parametrize("name", [n for n in SHIPPED if n.endswith(".digits")])
def test_a_photograph_is_no_digit_without_a_word(name):
    from sklearn.datasets import load_digits, load_sample_images

    classifier = regard.load(name)
    pictures = [*load_sample_images().images, np.full((48, 48), 255, np.uint8)]
    assert [p.unlike_training for p in classifier.predict(pictures)] == [True] * 3
    scans = (load_digits().images[:200] * 15.9375).astype(np.uint8)
    assert sum(p.unlike_training for p in classifier.predict([*scans])) <= 6


def test_a_run_is_shipped(whole, elsewhere, monkeypatch, capsys):
    facts = elsewhere / "facts.toml"
    facts.write_text('[x]\ndata = "d"\norigin = "o"\nlicense = "l"\nnot_for = "n"\n')
    folder = script.ship(whole, "ag_sononet8.x", root=elsewhere, facts_file=facts)
    run = json.loads((whole / "evaluation.json").read_text())["metrics"]["top1"]["value"]
    assert weights.find_shipped("ag_sononet8.x").accuracy == pytest.approx(run, abs=0.05)
    ours = load_file(folder / "model.safetensors")
    theirs = load_file(whole / "model.safetensors")
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key].to(tensor.dtype), tensor, atol=1e-4, rtol=1e-3)
    assert regard.load("ag_sononet8.x").class_names == ["0", "1", "2"]
    for text in folder.glob("*.[jmt]*[!s]"):
        if text.suffix in (".json", ".md", ".toml"):
            assert str(whole.parent) not in text.read_text(), text
    classifier = regard.load("ag_sononet8.x")  # knows what it was trained on, as the run does
    theirs = regard.load(whole).familiarity
    assert classifier.familiarity.images == theirs.images
    assert classifier.familiarity.threshold == pytest.approx(theirs.threshold, rel=0.05)
    assert weights.find_shipped("ag_sononet8.x").sha256.keys() >= {FAMILIARITY}
    for name, word in (("ag_sononet8.y", "neither a table"), ("cbam_resnet18.x", "ag_sononet8")):
        with pytest.raises(UsageError, match=word):
            script.ship(whole, name, root=elsewhere, facts_file=facts)
    assert run_command(["evaluate", "ag_sononet8.x"]) == 2  # its images do not come with it
    assert "give DATA" in capsys.readouterr().err
    monkeypatch.setattr(weights, "LARGEST", 500_000)
    with pytest.raises(OSError, match="bytes of weights"):
        script.ship(whole, "ag_sononet8.x", root=elsewhere, facts_file=facts)
    assert weights.find_shipped("ag_sononet8.x").verify() is None  # the ones before stay


def test_the_results_are_checked_against_the_cards(elsewhere, capsys):
    path = ROOT / "benchmarks/check_results.py"
    checker_spec = importlib.util.spec_from_file_location("check_results", path)
    checker = importlib.util.module_from_spec(checker_spec)
    checker_spec.loader.exec_module(checker)
    assert checker.main([DIGITS]) == 0
    index = json.loads((elsewhere / weights.INDEX).read_text())
    index[DIGITS]["accuracy"] -= 0.002
    (elsewhere / weights.INDEX).write_text(json.dumps(index))
    assert checker.main([DIGITS]) == 1
    assert "99." in capsys.readouterr().out
    shutil.copytree(elsewhere / DIGITS, elsewhere / "ag_sononet8.cifar10")
    index["ag_sononet8.cifar10"] = index[DIGITS]
    (elsewhere / weights.INDEX).write_text(json.dumps(index))
    assert checker.main(["ag_sononet8.cifar10"]) == 1
    assert "its images are not in" in capsys.readouterr().out


def test_a_runs_calibration_is_shipped_with_it_but_none_of_other_weights(
    whole, elsewhere, tmp_path, scans, caplog
):
    facts = elsewhere / "facts.toml"
    facts.write_text('[x]\ndata = "d"\norigin = "o"\nlicense = "l"\nnot_for = "n"\n')
    mine = Path(shutil.copytree(whole, tmp_path / "mine"))
    found = regard.calibrate(mine, scans, positive="1", rule="sensitivity=0.9", split="val")
    assert str(scans) in found.source
    folder = script.ship(mine, "ag_sononet8.x", root=elsewhere, facts_file=facts)
    caplog.clear()
    shipped = regard.load("ag_sononet8.x").calibration  # it is of the stored weights
    assert not caplog.records
    assert (shipped.temperature, shipped.threshold) == (found.temperature, found.threshold)
    assert shipped.network == network_hash(folder) != found.network
    assert str(scans.parent) not in (folder / "calibration.json").read_text()
    assert f"{found.threshold.value:.4g}" in (folder / "README.md").read_text()
    stored = json.loads((mine / "calibration.json").read_text())
    (mine / "calibration.json").write_text(json.dumps({**stored, "network": "0123"}))
    folder = script.ship(mine, "ag_sononet8.x", root=elsewhere, facts_file=facts)
    assert not (folder / "calibration.json").exists()
    assert regard.load("ag_sononet8.x").calibration is None


# -------------------------------------------------------------------- networks that were changed
def _with_another_activation(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.SiLU())


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        (_with_another_activation, r"\(act1, layer1.0.act1, layer1.0.act2 and 14 more differ\)"),
        (lambda model: setattr(model, "maxpool", torch.nn.Identity()), r"\(maxpool differ\)"),
        (lambda model: setattr(model, "layer4", torch.nn.Identity()), "layer4.0.bn1.bias"),
    ],
)
def test_a_network_that_is_not_what_its_name_makes_is_refused(tmp_path, change, differ):
    model = timm.create_model("plain_resnet18", num_classes=5)
    change(model)
    with pytest.raises(UsageError, match=differ):
        save_model(model, tmp_path / "run", class_names=list("abcde"))
    assert not (tmp_path / "run").exists()


def test_an_argument_that_no_folder_can_keep_is_refused(tmp_path):
    model = timm.create_model("cbam_resnet18", num_classes=5, act_layer=torch.nn.SiLU)
    with pytest.raises(UsageError, match=r"act_layer=.*SiLU.*: a folder keeps only numbers, words"):
        save_model(model, tmp_path / "run")


@pytest.mark.parametrize("name", ["cbam_resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_a_network_without_a_head_is_what_its_name_makes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    model.reset_classifier(0, global_pool="")
    check_loadable(model)


def test_another_global_pooling_is_kept(tmp_path):
    model = timm.create_model("cbam_resnet18", num_classes=5).eval()
    model.reset_classifier(4, "max")
    save_model(model, tmp_path / "run", class_names=list("abcd"))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(regard.load(tmp_path / "run").model(x), model(x))
