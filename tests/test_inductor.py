"""The gate's convolution as Inductor calls it for training on CUDA: the operator, on a CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.models import _inductor, cbam
from regard.models.cbam import CBAM


def operands(layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(3, 2, 9, 8), torch.randn(1, 2, 7, 7), torch.randn(3, 1, 9, 8)
    x, weight = (t.double().contiguous(memory_format=layout) for t in (x, weight))
    return x.requires_grad_(), weight.requires_grad_(), gradient.double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_gradients_and_layouts_are_those_that_are_promised(layout):
    x, weight, gradient = operands(layout)
    out = _inductor.convolution(x, weight, 3)
    assert torch.equal(out, F.conv2d(x, weight, padding=3))
    found = torch.autograd.grad(out, (x, weight), gradient)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=3), (x, weight), gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_inductor.convolution, (x, weight, 3), test_utils=checks)
    of_gradient = (gradient, x.detach(), weight.detach(), 3)
    torch.library.opcheck(_inductor._backward, of_gradient, test_utils=checks)


def test_compiled_for_training_the_gates_are_the_eager_ones(monkeypatch):
    """As on CUDA, where alone the operator is taken."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return _inductor.convolution(*arguments)

    monkeypatch.setattr(cbam, "convolution", counted)
    monkeypatch.setattr(
        cbam, "compiled_for_training",
        lambda x: torch.compiler.is_compiling() and x.requires_grad,
    )  # fmt: skip
    gates = CBAM(32).to(memory_format=torch.channels_last).train()
    torch.nn.init.ones_(gates.spatial.bn.weight)
    torch.manual_seed(0)
    x = torch.randn(4, 32, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for module in (copy.deepcopy(gates), torch.compile(gates, backend="aot_eager")):
        out = module(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    assert calls  # traced once
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_scripted_network_asks_for_no_operator_of_regards():
    model = regard.create_model("cbam_resnet18", channels=(8, 8, 8, 8), num_classes=2).eval()
    with pytest.warns(FutureWarning, match="deprecated"):
        gate = torch.jit.script(model.layer1[0].se.spatial)
    assert "regard::" not in str(gate.inlined_graph)
