"""Strided 1x1 convolutions of few channels, whose gradients oneDNN writes past a buffer's end."""

import copy

import pytest
import torch
from torch import nn

from regard.data.preprocess import Preprocess
from regard.models._onednn import without_strided_pointwise
from regard.training import bench
from regard.training.build import build_model
from regard.training.config import Recipe
from regard.training.run_plan import Request, new_plan


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "stride"), [((4, 8), 1, 2), ((6, 12), 1, (2, 3)), ((8, 8), 2, 2)]
)
def test_the_gradients_are_those_of_float64(channels, groups, stride, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, 1, stride, groups=groups, bias=bias)
    x = torch.randn(8, channels[0], 9, 8)
    wide, wide_x = copy.deepcopy(conv).double(), x.double().requires_grad_()
    expected = wide(wide_x)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    found = without_strided_pointwise(nn.Sequential(conv))[0]
    assert type(found) is not nn.Conv2d
    found.to(memory_format=torch.channels_last)
    for _ in range(20):  # what is written past the end is noticed some time
        found.zero_grad()
        x = x.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        out = found(x)
        out.backward(direction.float().contiguous(memory_format=torch.channels_last))
    gradients = [
        (p.grad, q.grad) for p, q in zip(found.parameters(), wide.parameters(), strict=True)
    ]
    for a, b in [(out, expected), (x.grad, wide_x.grad), *gradients]:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_others_stay_as_they_are():
    network = nn.Sequential(
        nn.Conv2d(16, 32, 1, 2), nn.Conv2d(32, 4, 1), nn.Conv2d(4, 4, 3, 2, 1),
        nn.Conv2d(4, 8, 1, 2, padding=1),
    )  # fmt: skip
    assert {type(m) for m in without_strided_pointwise(network)} == {nn.Conv2d}


def test_a_run_on_a_cpu_has_none(scans):
    recipe, narrow = Recipe(size=32), {"channels": [4, 4, 8, 8]}
    asked = Request(
        str(scans), "cbam_resnet18", recipe, None, None, "auto", narrow, recipe, {}, True
    )
    model = build_model(new_plan(asked, 1)[0], torch.device("cpu"), start=True)
    pointwise = [m for m in model.modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    strided = [m for m in pointwise if m.stride == (2, 2)]
    assert len(strided) == 3  # shortcuts
    assert all(type(m) is not nn.Conv2d for m in strided)


def test_a_step_that_is_timed_on_a_cpu_has_none(monkeypatch):
    made = []

    class Noted(bench.Case):
        def __init__(self, model, *arguments):
            made.append(model)
            super().__init__(model, *arguments)

    narrow = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    narrow.num_classes = 8
    monkeypatch.setattr(bench, "Case", Noted)
    preprocess = Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    timing = bench.TrainTiming("eager", "fp32", network="narrow")
    cpu = torch.device("cpu")
    assert bench._prepared(narrow, preprocess, timing, Recipe(), cpu, 2) is not None, timing.fault
    assert all(type(model[0]) is not nn.Conv2d for model in made)
    assert made
