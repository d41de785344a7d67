"""save_model(): what timm loads is the network that was saved, or nothing is written."""

import copy
import json
import resource
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from timm.data import resolve_data_config

import regard

SMALL = [
    ("ag_sononet8", {"num_classes": 4, "in_chans": 3, "aggregation": "deep_sup"}),
    ("sononet8", {"num_classes": 3, "convs": [2, 2, 3, 3, 3]}),
    ("cbam_resnet18", {"num_classes": 5, "in_chans": 1, "reduction": 8, "stem": "cifar"}),
    ("attention56_cifar", {"num_classes": 7, "attention": "naive", "r": 2}),
    ("resnet10t", {"num_classes": 2}),  # timm's own
]


def network(name: str, **arguments):
    torch.manual_seed(1)
    model = regard.create_model(name, **arguments)
    for module in model.modules():  # running statistics that are not those of a new network
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize(("name", "arguments"), SMALL)
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(tmp_path, name, arguments):
    model = network(name, **arguments).to(memory_format=torch.channels_last)
    made_with = copy.deepcopy(model._model_args)
    assert regard.save_model(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    loaded = timm.create_model(f"local-dir:{tmp_path}/a/b", pretrained=True).eval()
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    x = torch.randn(2, model.in_chans if hasattr(model, "in_chans") else 3, 48, 48)
    assert torch.equal(loaded(x), model.to(memory_format=torch.contiguous_format)(x))
    assert model._model_args == made_with
    assert not [p for p in (tmp_path / "a/b").iterdir() if p.name.startswith(".")]
    with safe_open(tmp_path / "a/b/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # others' readers ask for it


def test_the_configuration_tells_classes_preprocessing_and_more(tmp_path):
    told = {
        "input_size": (1, 40, 56), "mean": (0.25,), "std": (0.5,), "interpolation": "bicubic",
        "crop_pct": 0.9, "crop_mode": "border",
    }  # fmt: skip
    regard.save_model(
        network("sononet8", num_classes=2), tmp_path, class_names=["Kopf", "Bauch ✓"],
        data_config=told, extra={"note": "mine"},
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "sononet8"
    assert config["label_names"] == ["Kopf", "Bauch ✓"]
    assert config["note"] == "mine"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    again = resolve_data_config(model=loaded)
    assert {k: tuple(again[k]) if isinstance(told[k], tuple) else again[k] for k in told} == told
    assert regard.load(tmp_path).class_names == ["Kopf", "Bauch ✓"]


def test_classes_that_were_changed_afterwards(tmp_path):
    model = network("ag_sononet8", num_classes=14)
    model.reset_classifier(3)
    regard.save_model(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_classes == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )  # fmt: skip


@torch.no_grad()
def test_half_precision_is_kept_in_the_file(tmp_path):
    model = network("sononet8", num_classes=3).bfloat16()
    regard.save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys() if "num_b" not in k} == {  # noqa: SIM118
            torch.bfloat16
        }
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)  # in float32
    assert torch.equal(loaded.block1[0][0].weight.bfloat16(), model.block1[0][0].weight)


def test_everybody_who_may_read_the_configuration_may_read_the_weights(tmp_path):
    regard.save_model(network("sononet8"), tmp_path)
    modes = {(tmp_path / n).stat().st_mode for n in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_what_could_not_be_loaded_again_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        regard.save_model(network("sononet8", num_classes=3), tmp_path / "o", class_names="ab")
    nameless = torch.nn.Linear(2, 2)
    nameless.num_classes = 2
    with pytest.raises(ValueError, match=r"Linear was not made by create_model"):
        regard.save_model(nameless, tmp_path / "o")
    changed = network("cbam_resnet18", num_classes=3)
    changed.layer4[1].se = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"longer .*cbam_resnet18 .*layer4\.1\.se\..* and \d+ more diff"
    ):
        regard.save_model(changed, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


SAVE = """
import sys, torch, regard
torch.manual_seed(2)
try:
    regard.save_model(regard.create_model("sononet8"), sys.argv[1])
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.slow
def test_a_save_that_fails_leaves_the_network_that_was_there(tmp_path):
    """A process that may write no more than 100 kB a file, over a folder that is there."""
    regard.save_model(network("sononet8"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", SAVE, tmp_path], capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert "OSError: " in done.stdout, done.stderr
    assert str(tmp_path) in done.stdout
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_cifar_stem_is_loaded_with_the_input_it_was_saved_with(tmp_path):
    model = regard.create_model("cbam_resnet18", stem="cifar", in_chans=1, num_classes=2)
    config = {"input_size": (1, 48, 48), "mean": (0.3,), "std": (0.2,), "crop_pct": 0.9}
    regard.save_model(model, tmp_path, class_names=["a", "b"], data_config=config)
    found = regard.load(tmp_path)
    assert found.preprocess.input_size == (1, 48, 48)
    assert found.preprocess.crop_pct == 0.9
    assert found.probabilities(torch.zeros(1, 1, 48, 48)).shape == (1, 2)
