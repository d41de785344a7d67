"""Channel gates that are the same for every image: found, told, and not made by Muon."""

import json

import numpy as np
import pytest
import timm
import torch

import regard
from regard.attention import channel_gate_names
from regard.explanations.channel_gates import channel_gates, compare_gates, verdict
from regard.models.cbam import ChannelGate
from regard.models.io import save_model
from regard.training.config import Recipe
from regard.training.optim import channel_gate_parameters, make_optimizer
from tests.helpers import run

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
    assert verdict(gates, 6) == (
        "2 of 8 channel gates have the same values for each of 6 images, so they do not attend to "
        "anything: layer2.0.se.channel (channels: 75% closed, 25% open), "
        "layer4.1.se.channel."
    )


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


def test_explain_tells_of_gates_that_do_not_attend(scans, tmp_path):
    save_model(
        network(dead=DEAD), tmp_path / "net", class_names=["0", "1", "2"],
        data_config={"input_size": (3, 32, 32)},
    )  # fmt: skip
    images = sorted(scans.glob("*/0[01].png"))
    for _ in range(2):  # the second call reads what the first one wrote
        said = run("explain", tmp_path / "net", *images, "--score", "--out", tmp_path / "out")
        assert "2 of 8 channel gates have the same values for each of 6 images" in said
        text = (tmp_path / "out" / "scores.json").read_text(encoding="utf-8")
        gates = json.loads(text)["channel_gates"]
        assert [name for name, gate in gates.items() if gate["same"]] == list(DEAD)
        assert gates[DEAD[0]]["channels"] == 8
    assert "6 images unchanged" in said


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


# ---------------------------------------------------------------------------- the optimizer
GATED = [
    ("cbam_resnet18", NETWORK, ".se.channel."),
    ("se_resnet18", {}, ".se.channel."),
    ("seresnet18", {}, ".se."),  # timm's
    ("efficientnet_b0", {}, ".se."),  # timm's, by another class
]


@pytest.mark.parametrize(("name", "arguments", "part"), GATED)
def test_with_muon_channel_gates_learn_by_adamw_at_a_part_of_the_rate(name, arguments, part):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments)
    gates = {n for n, _ in model.named_parameters() if part in n}
    assert gates == channel_gate_parameters(model)
    assert len(gates) == 4 * len(channel_gate_names(model)) > 0  # two layers with biases
    recipe = Recipe(
        optimizer="muon", lr=0.02, weight_decay=0.0, nesterov=False, decay_norm_and_bias=False
    )
    for scale in (0.01, 0.5):
        optimizer = make_optimizer(model, recipe.changed(gate_lr_scale=scale))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p).sign()
        optimizer.step()
        for n, p in model.named_parameters():
            moved = (p.detach() - before[n]).abs()
            if n in gates:  # AdamW's first step: the rate, for each value
                assert moved.numpy() == pytest.approx(0.02 * scale, rel=0.01), n
            elif p.ndim == 1:
                assert moved.numpy() == pytest.approx(0.02, rel=0.01), n
            else:
                assert moved.mean() > 0.0025, n  # 0.2 of the rate, in the root of the mean square


def test_other_optimizers_and_networks_have_no_such_groups():
    cbam = regard.create_model("cbam_resnet18", num_classes=3, **NETWORK)
    for recipe in (Recipe(), Recipe(optimizer="adamw", lr=1e-3)):
        groups = make_optimizer(cbam, recipe).param_groups
        assert {g["lr_scale"] for g in groups} == {1.0}
        assert not any("use_fallback" in g for g in groups)
    for name in ("attention56_cifar", "ag_sononet8", "resnet18"):
        model = regard.create_model(name, num_classes=3)
        assert channel_gate_parameters(model) == set()
        groups = make_optimizer(model, Recipe(optimizer="muon")).param_groups
        assert {g["lr_scale"] for g in groups} == {1.0}
