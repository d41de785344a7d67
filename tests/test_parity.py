"""The networks are the authors' own: same weights, same input, same answer."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from tests.golden import authors_networks, authors_outputs, fill

NETWORKS = authors_networks()
OUTPUTS = authors_outputs()


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """'ag_sononet8_mean' -> the network and its aggregation."""
    if name.startswith("ag_sononet8_"):
        return "ag_sononet8", {"aggregation": name.removeprefix("ag_sononet8_")}
    return name, {}


@pytest.fixture(scope="module")
def loaded(request) -> tuple[str, nn.Module, Tensor]:
    """A network's name, the network with the authors' weights, in float32, and its input.

    Filling tens of millions of weights takes longer than a pass: once for a network's tests.
    """
    network, arguments = split_name(request.param)
    model = regard.create_model(network, **arguments)
    entry = NETWORKS[request.param]
    regard.load_authors_weights(model, {n: fill(n, shape) for n, shape in entry["tensors"]})
    return request.param, model, torch.from_numpy(fill("input", entry["input"]))


@pytest.fixture
def in_float64(loaded) -> tuple[str, nn.Module, Tensor]:
    """In evaluation mode, as `in_float32`, from which it differs in no weight."""
    name, model, x = loaded
    return name, model.double().eval(), x.double()


@pytest.fixture
def in_float32(loaded) -> tuple[str, nn.Module, Tensor]:
    name, model, x = loaded
    return name, model.float().eval(), x


def heads(model: nn.Module, x: Tensor) -> Tensor:
    """The heads as in training, with the running statistics of evaluation."""
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return model(x)


def error(ours: Tensor, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.numpy() - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("loaded", NETWORKS, indirect=True)
@torch.no_grad()
def test_float64_equals_the_authors_to_the_last_bit_kept(in_float64):
    name, model, x = in_float64
    theirs = [OUTPUTS[f"{name}/{i}"] for i in range(NETWORKS[name]["outputs"])]
    ours = heads(model, x) if len(theirs) > 1 else model(x)[:, None]
    for i, answer in enumerate(theirs):  # theirs is float64 rounded to float32
        assert error(ours[:, i].float(), answer) < 1e-9


@pytest.mark.parametrize("loaded", NETWORKS, indirect=True)
@torch.no_grad()
def test_float32_is_within_1e_5(in_float32):
    name, model, x = in_float32
    theirs = [OUTPUTS[f"{name}/{i}"] for i in range(NETWORKS[name]["outputs"])]
    if name.endswith("_mean"):
        probabilities = [torch.from_numpy(t).softmax(dim=1) for t in theirs]
        assert error(model(x).softmax(dim=1), torch.stack(probabilities).mean(dim=0).numpy()) < 1e-5
    else:  # for deep_sup the prediction is the first head, the concat layer's
        assert error(model(x), theirs[0]) < 1e-5


@pytest.mark.parametrize("loaded", ["attention56", "attention92", "attentionnext56"], indirect=True)
@torch.no_grad()
def test_soft_masks_are_the_authors(in_float64):
    name, model, x = in_float64
    with regard.record(model) as maps:
        model(x)
    layers = [key for key in OUTPUTS if key.startswith(f"{name}/map/")]
    assert len(maps) == len(layers)
    for layer in layers:  # 'attention92/map/AttentionB_2/mask' is layer2.2.mask
        stage, n = layer.split("/")[2].removeprefix("Attention").split("_")
        ours = maps[f"layer{'_ABC'.index(stage)}.{n}.mask"].spatial()
        assert error(ours.float(), OUTPUTS[layer]) < 1e-9
