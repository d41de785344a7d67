"""Channel gates that are the same for every image: found, told, and not made by Muon."""

import json
import time

import numpy as np
import pytest
import timm
import torch

import regard
from regard.attention import channel_gate_names
from regard.cli import run_command
from regard.explanations.channel_gates import channel_gates, compare_gates, verdict
from regard.models.cbam import ChannelGate
from regard.models.io import save_model
from regard.training.config import Recipe
from regard.training.optim import channel_gate_parameters, make_optimizer
from regard.training.recipe_files import load_recipe
from tests.helpers import run, same_network, start

NETWORK = {"channels": (8, 8, 16, 16)}


def network(seed: int = 0, dead: tuple[str, ...] = ()) -> torch.nn.Module:
    """A small CBAM network whose gates depend on the image, except those named."""
    torch.manual_seed(seed)
    model = regard.create_model("cbam_resnet18", num_classes=3, **NETWORK)
    for name, gate in model.named_modules():
        if isinstance(gate, ChannelGate):
            torch.nn.init.normal_(gate.mlp[2].weight, std=2.0)
            torch.nn.init.constant_(gate.mlp[0].bias, -1e6 if name in dead else 1.0)
    return model.eval()


DEAD = ("layer2.0.se.channel", "layer4.1.se.channel")


# ------------------------------------------------------------------------------ the check
def test_a_gate_whose_relus_are_dead_is_the_same_for_every_image():
    model = network(dead=DEAD)
    with torch.no_grad():
        model.get_submodule(DEAD[0]).mlp[2].bias.copy_(torch.tensor([9.0] * 2 + [-9.0] * 6))
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    values = channel_gates(model, x)
    assert {name: each.shape for name, each in values.items()} == {
        f"layer{i}.{k}.se.channel": (6, 16 if i > 2 else 8) for i in range(1, 5) for k in range(2)
    }
    expected = torch.sigmoid(2 * model.get_submodule(DEAD[0]).mlp[2].bias).detach().numpy()
    assert values[DEAD[0]] == pytest.approx(np.tile(expected, (6, 1)), abs=1e-6)
    gates = compare_gates(values)
    assert [gate.name for gate in gates if gate.same] == list(DEAD)
    found = {gate.name: gate for gate in gates}
    assert (found[DEAD[0]].closed, found[DEAD[0]].opened) == (0.75, 0.25)
    assert (found[DEAD[1]].closed, found[DEAD[1]].opened) == (0.0, 0.0)
    assert found["layer1.0.se.channel"].variation > 0.01
    which = "layer2.0.se.channel (channels: 75% closed, 25% open), layer4.1.se.channel."
    said = "2 of 8 channel gates have the same values for each of"
    assert verdict(gates, 32) == f"{said} 32 images, so they do not attend to anything: {which}"
    assert verdict(gates, 6) == f"{said} 6 images: {which}"  # from few, no conclusion


def test_gates_that_depend_on_the_image_are_said_to():
    values = channel_gates(network(), torch.randn(4, 3, 64, 64))
    assert verdict(compare_gates(values), 4) == (
        "All 8 channel gates depend on the image (4 images)."
    )
    one = compare_gates({"gate": np.array([[0.2, 0.9], [0.2, 0.89]], np.float32)})
    assert not one[0].same  # by more than a hundredth of its largest value
    assert verdict(one, 2) == "The channel gate depends on the image (2 images)."
    near = compare_gates({"gate": np.array([[0.2, 0.9], [0.2, 0.892]], np.float32)})
    assert near[0].same
    assert verdict(near, 2).startswith("1 of 1 channel gate has the same values")


def test_one_image_says_nothing_about_gates():
    assert compare_gates(channel_gates(network(), torch.randn(1, 3, 64, 64))) == []
    assert verdict([], 1) == ""
    assert channel_gates(timm.create_model("resnet10t").eval(), torch.randn(2, 3, 64, 64)) == {}


def test_many_dead_gates_are_counted():
    same = {f"gate{i}": np.ones((3, 4), np.float32) for i in range(9)}
    said = verdict(compare_gates(same), 3)
    assert said.startswith("9 of 9 channel gates have")
    assert said.endswith("gate5 (channels: 100% open) and 3 more.")


def test_explain_tells_of_gates_that_do_not_attend(scans, tmp_path, capsys):
    save_model(
        network(dead=DEAD), tmp_path / "net", class_names=["0", "1", "2"],
        data_config={"input_size": (3, 32, 32)},
    )  # fmt: skip
    images = sorted(scans.glob("[01]/00.png"))
    for _ in range(2):  # the second call reads what the first one wrote
        call = ["explain", tmp_path / "net", *images, "--score", "--out", tmp_path / "out"]
        assert run_command([str(argument) for argument in call]) == 0
        said = capsys.readouterr().out
        assert "2 of 8 channel gates have the same values for each of 2 images" in said
        text = (tmp_path / "out" / "scores.json").read_text(encoding="utf-8")
        gates = json.loads(text)["channel_gates"]
        assert [name for name, gate in gates.items() if gate["same"]] == list(DEAD)
        assert gates[DEAD[0]]["channels"] == 8
    assert "2 images unchanged" in said


@pytest.mark.report
def test_a_run_tells_at_its_end_which_gates_do_not_attend(scans, tmp_path):
    save_model(
        network(dead=DEAD), tmp_path / "net", class_names=["0", "1", "2"],
        data_config={"input_size": (3, 32, 32)},
    )  # fmt: skip
    said = run(
        "train", scans, "--weights", tmp_path / "net", "--size", "32", "--steps", "2",
        "--lr", "1e-6", "--faithfulness-images", "0", "--log", "none", "--out", tmp_path / "run",
    )  # fmt: skip
    sentence = "2 of 8 channel gates have the same values for each of 24 images"
    assert said.count(sentence) == 1
    for name in ("README.md", "report.html"):
        assert sentence in (tmp_path / "run" / name).read_text(encoding="utf-8")
    found = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["facts"]
    assert found["channel_gates"]["images"] == 24
    assert [n for n, g in found["channel_gates"]["gates"].items() if g["same"]] == list(DEAD)


@pytest.mark.report
def test_a_run_without_channel_gates_says_nothing_of_them(whole):
    found = json.loads((whole / "run.json").read_text(encoding="utf-8"))["facts"]
    assert found["channel_gates"] == {}
    for name in ("README.md", "report.html"):
        assert "channel gate" not in (whole / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- the optimizer
GATED = [
    ("cbam_resnet18", {"channels": (32, 64, 128, 256)}, ".se.channel."),
    ("se_resnet18", {"channels": (32, 64, 128, 256)}, ".se.channel."),
    # timm's, of four classes
    ("seresnet18", {"channels": (32, 64, 128, 256)}, ".se."),
    ("mobilenetv3_small_050", {}, ".se."),
    ("legacy_seresnet18", {}, ".se_module."),
    (
        "resnet18",
        {"block_args": {"attn_layer": "cbam"}, "channels": (32, 64, 128, 256)},
        ".se.channel.",
    ),
]
MUON = Recipe(
    optimizer="muon", lr=0.02, weight_decay=0.0, nesterov=False, decay_norm_and_bias=False
)


def moved(model: torch.nn.Module, recipe: Recipe) -> dict[str, np.ndarray]:
    """How far the first step moves each value, with gradients of 1 or -1."""
    optimizer = make_optimizer(model, recipe)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p).sign()
    optimizer.step()
    return {n: (p.detach() - before[n]).abs().numpy() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "arguments", "part"), GATED)
def test_with_muon_channel_gates_learn_by_adamw_at_a_part_of_the_rate(name, arguments, part):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments)
    gates = {n for n, _ in model.named_parameters() if part in n}
    assert gates == channel_gate_parameters(model)
    layers = len({n.rpartition(".")[0] for n in gates})
    assert layers == 2 * len(channel_gate_names(model)) > 0
    for scale in (0.01, 0.5):
        for n, steps in moved(model, MUON.changed(gate_lr_scale=scale)).items():
            if n in gates:  # AdamW's first step: the rate, for each value
                assert steps == pytest.approx(0.02 * scale, rel=0.01), n
            elif steps.ndim == 1:
                assert steps == pytest.approx(0.02, rel=0.01), n
            else:  # 0.2 of the rate, in the root of the mean square
                assert steps.mean() > 0.0025, n


def test_the_gates_factor_multiplies_that_of_the_backbone():
    """timm's gates count as backbone, Regard's do not."""
    torch.manual_seed(0)
    recipe = MUON.changed(gate_lr_scale=0.5, backbone_lr_scale=0.1)
    theirs = moved(timm.create_model("seresnet18", num_classes=3), recipe)
    assert theirs["layer1.0.se.fc1.weight"] == pytest.approx(0.02 * 0.05, rel=0.01)
    ours = regard.create_model("cbam_resnet18", num_classes=3, **NETWORK)
    name = "layer1.0.se.channel.mlp.0.weight"
    assert moved(ours, recipe)[name] == pytest.approx(0.02 * 0.5, rel=0.01)
    frozen = moved(ours, recipe.changed(optimizer="adamw", gate_lr_scale=0.25))
    assert frozen[name] == pytest.approx(0.02 * 0.25, rel=0.01)
    assert frozen["conv1.weight"] == pytest.approx(0.02 * 0.1, rel=0.01)


def test_the_factor_is_decided_when_a_run_is_planned():
    """A run that began without it goes on without it."""
    assert Recipe(optimizer="muon").for_start(random=True).gate_lr_scale == 0.01
    assert Recipe(optimizer="muon", gate_lr_scale=1.0).for_start(random=True).gate_lr_scale == 1
    quick = load_recipe("quick")
    assert quick.for_start(random=True).gate_lr_scale == 0.01
    assert quick.for_start(random=False).gate_lr_scale is None  # SGD
    ran = quick.for_start(random=True)  # as a run's recipe.toml, which the next run may change
    assert ran.changed(lr=0.01).gate_lr_scale == 0.01
    assert ran.changed(optimizer="sgd", lr=0.05).gate_lr_scale is None
    assert ran.changed(optimizer="adamw", gate_lr_scale=0.01).gate_lr_scale == 0.01
    assert ran.changed(gate_lr_scale=0.2).changed(optimizer="sgd").gate_lr_scale == 0.2
    own = quick.changed(gate_lr_scale=0.2)
    assert [own.for_start(random=r).gate_lr_scale for r in (True, False)] == [0.2, 0.2]
    cbam = regard.create_model("cbam_resnet18", num_classes=3, **NETWORK)
    for recipe in (Recipe(), Recipe(optimizer="adamw", lr=1e-3), Recipe(optimizer="muon")):
        groups = make_optimizer(cbam, recipe).param_groups
        assert {g["lr_scale"] for g in groups} == {1.0}
        assert not any("use_fallback" in g for g in groups)


def test_networks_without_channel_gates_have_no_such_groups():
    for name in ("attention56_cifar", "ag_sononet8", "resnet18"):
        model = regard.create_model(name, num_classes=3)
        assert channel_gate_parameters(model) == set()
        groups = make_optimizer(model, MUON.for_start(random=True)).param_groups
        assert {g["lr_scale"] for g in groups} == {1.0}


@pytest.mark.slow
def test_a_stopped_run_with_muon_and_gates_goes_on_as_it_would_have(scans, tmp_path):
    save_model(
        network(), tmp_path / "net", class_names=["0", "1", "2"],
        data_config={"input_size": (3, 32, 32)},
    )  # fmt: skip
    settings = [
        "train", scans, "--weights", tmp_path / "net", "--size", "32", "--optimizer", "muon",
        "--lr", "0.01", "--epochs", "2", "--faithfulness-images", "0", "--log", "none",
    ]  # fmt: skip
    run(*settings, "--out", tmp_path / "whole")
    state = tmp_path / "part" / "state"
    process = start(*settings, "--out", tmp_path / "part")
    while process.poll() is None and not any(state.glob("step-*.pt")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert any(state.glob("step-*.pt"))  # killed after the first epoch
    run(*settings, "--out", tmp_path / "part", "--resume")
    assert same_network(tmp_path / "whole", tmp_path / "part")
