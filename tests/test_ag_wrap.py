"""Attention gates on networks of timm's."""

import pytest
import timm
import torch

import regard

SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}


@pytest.mark.parametrize(
    ("aggregation", "heads"), [("concat", 0), ("mean", 3), ("deep_sup", 4), ("ft", 0)]
)
def test_gates_train_and_are_recorded(aggregation, heads):
    torch.manual_seed(0)
    model = regard.ag_wrap("resnet18", num_classes=5, aggregation=aggregation, **SMALL)
    x = torch.randn(2, 3, 64, 96)
    outputs = model.train()(x)
    assert outputs.shape == ((2, heads, 5) if heads else (2, 5))
    assert len(model.head_weights) == max(heads, 1)
    if heads:
        assert model.join_heads(outputs).shape == (2, 5)
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad(), regard.record(model.eval()) as maps:
        assert model(x).shape == (2, 5)
    assert [tuple(m.values.shape) for m in maps.values()] == [(2, 1, 8, 12), (2, 1, 4, 6)]


@torch.no_grad()
def test_the_prediction_is_the_gates_of_the_backbones_own_maps():
    torch.manual_seed(0)
    model = regard.ag_wrap("resnet18", taps=(1,), num_classes=5, aggregation="concat", **SMALL)
    plain = timm.create_model("resnet18", features_only=True, **SMALL).eval()
    plain.load_state_dict(model.eval().backbone.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    maps = plain(x)
    vectors = [model.gates[0](maps[1], maps[4]), maps[4].mean(dim=(2, 3))]
    assert torch.allclose(model(x), model.classifier(torch.cat(vectors, dim=1)), atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "taps", "message"),
    [
        ("resnet18", (4,), "choose from 0 to 3"),
        ("resnet18", (), "choose from 0 to 3"),
        ("resnet1", (1,), "no such network"),
        ("swin_tiny_patch4_window7_224", (1,), "B, H, W, C"),
    ],
)
def test_what_can_not_be_gated_is_refused(backbone, taps, message):
    with pytest.raises(ValueError, match=message):
        regard.ag_wrap(backbone, taps=taps, num_classes=2)
