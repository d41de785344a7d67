"""What a training step leaves behind: nothing, whatever the network and the precision."""

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.models import fused_torch
from regard.models.fused import fused_at_every_size, set_fused


@pytest.fixture
def without_collection():
    """What lives on only until a collection is alive: on a GPU nothing asks for one in time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> int:
    """Tensors that Python knows of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is looked at may be deprecated
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def network(name: str) -> nn.Module:
    model = regard.create_model(name, num_classes=3).to(memory_format=torch.channels_last)
    set_fused(model)
    return model.train()


def after_steps(
    model: nn.Module, backward: Callable[[Tensor], object], precision: str = "fp32"
) -> list[int]:
    """The tensors that are alive after each of four steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.pretrained_cfg["input_size"][0], 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    counts = []
    for _ in range(4):
        with fused_at_every_size(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            outputs = model(images)
        backward(regard.multi_head_cross_entropy(outputs.float(), torch.tensor([0, 1])))
        model.zero_grad(set_to_none=True)
        del outputs
        counts.append(alive())
    return counts


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["cbam_resnet18", "se_resnet18", "cbam_mobilenet_070", "attention56_cifar", "ag_sononet8"],
)
def test_no_step_leaves_tensors_behind(name, precision):
    counts = after_steps(network(name), lambda loss: loss.backward(), precision)
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_no_step_of_gates_on_a_frozen_network_leaves_tensors_behind():
    model = network("cbam_resnet18")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".se." in name or "fc" in name)
    counts = after_steps(model, lambda loss: loss.backward())
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_a_backward_pass_for_one_gate_leaves_no_graph_behind():
    model = network("cbam_resnet18")
    gate = [*model.layer4[1].se.parameters()]
    counts = after_steps(model, lambda loss: torch.autograd.grad(loss, gate))
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_a_backward_pass_that_runs_out_of_memory_leaves_no_graph_behind(monkeypatch):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def backward(loss: Tensor) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()

    monkeypatch.setattr(fused_torch, "input_backward", run_out)
    counts = after_steps(network("cbam_resnet18"), backward)
    assert counts[1] == counts[2] == counts[3]
