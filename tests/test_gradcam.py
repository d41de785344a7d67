"""Grad-CAM against a computation by hand, and on networks of every kind."""

import pytest
import timm
import torch
from torch import nn

import regard
from regard.explanations.gradcam import default_layer, gradcam


class Cam(nn.Module):
    """Convolution, global average, linear: here Grad-CAM is ReLU(CAM) / positions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean(dim=(2, 3)))


def test_it_is_the_class_activation_map_where_that_is_defined():
    torch.manual_seed(0)
    model, x = Cam(), torch.randn(3, 3, 8, 9)
    target = torch.tensor([0, 3, 1])
    features = model.conv(x).detach()
    slopes = (features > 0).float().mean(dim=(2, 3)) / 1  # d mean(relu) / d feature, averaged
    weights = model.fc.weight[target].detach() * slopes / (8 * 9)
    expected = (weights[:, :, None, None] * features).sum(dim=1).relu()
    torch.testing.assert_close(gradcam(model, x, target, layer="conv"), expected)
    assert expected.max() > 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (2, 2)), ("cbam_resnet18", (2, 2)), ("attention56_cifar", (16, 16)),
        ("ag_sononet8", (4, 4)), ("sononet8", (4, 4)), ("vit_tiny_patch16_224", (4, 4)),
        ("convnext_atto", (2, 2)),
    ],
)  # fmt: skip
def test_on_networks_of_every_kind_it_leaves_nothing_behind(name, shape):
    torch.manual_seed(0)
    more = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=5, **more).train()
    x = torch.randn(2, model.default_cfg["input_size"][0], 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = gradcam(model, x, layer=default_layer(model, x))
    assert found.shape == (2, *shape)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert not found.requires_grad
    assert model.training
    assert all(m._forward_hooks == {} for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # another class is another map
    maps = [gradcam(model, x, target) for target in range(5)]
    assert any(not torch.equal(maps[0], m) for m in maps[1:])


@pytest.mark.parametrize(
    ("name", "more", "shape"),
    [
        ("cait_xxs24_224", {"img_size": 64, "depth": 2}, (4, 4)),  # no class token in its blocks
        ("xcit_nano_12_p16_224", {"depth": 2}, (4, 4)),
        ("hrnet_w18_small", {}, (2, 2)),  # its last stage gives a list of maps
        ("crossvit_9_240", {}, (20, 20)),  # two branches of tokens
    ],
)
def test_on_networks_whose_last_layer_is_no_single_map(name, more, shape):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **more).eval()
    x = torch.randn(1, 3, *((240, 240) if "240" in name else (64, 64)))
    maps = [gradcam(model, x, target) for target in range(3)]
    assert {m.shape for m in maps} == {(1, *shape)}
    assert all(m.isfinite().all() for m in maps)
    assert any(m.max() > 0 for m in maps)
    assert any(not torch.equal(maps[0], m) for m in maps[1:])


@pytest.mark.parametrize(
    ("name", "more", "size", "layer", "grid"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, (64, 256), None, (4, 16)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, (48, 80), None, (3, 5)),
        ("xcit_nano_12_p16_224", {"depth": 2}, (64, 256), None, (4, 16)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, (64, 64),
         "patch_embed.proj", (16, 16)),
        ("convnext_tiny", {"depths": (1, 1, 1, 1)}, (64, 96), "stages.2.blocks.0.norm", (4, 6)),
    ],
)  # fmt: skip
def test_positions_are_those_of_the_input_whatever_its_shape_and_the_layers(
    name, more, size, layer, grid
):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **more).eval()
    x = torch.randn(1, 3, *size)
    where = layer or default_layer(model, x)
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = model.get_submodule(where).register_forward_hook(keep)
    model(x)[0, 1].backward()
    handle.remove()
    features, slopes = kept[0].detach()[0], kept[0].grad[0]
    if where == "patch_embed.proj":  # channels first
        expected = (slopes.mean(dim=(1, 2))[:, None, None] * features).sum(dim=0)
    else:  # channels last, or tokens
        flat, each = features.flatten(0, -2), slopes.flatten(0, -2)
        skip = len(flat) - grid[0] * grid[1]
        expected = (each[skip:].mean(dim=0) * flat[skip:]).sum(dim=1).view(grid)
    found = gradcam(model, x, 1, layer=layer)[0]
    assert found.shape == grid
    torch.testing.assert_close(found, expected.relu(), rtol=1e-4, atol=1e-8)


def test_wrong_layers_and_classes_are_named():
    model, x = regard.create_model("ag_sononet8"), torch.randn(1, 1, 32, 32)
    with pytest.raises(ValueError, match="layer='block9': no such layer"):
        gradcam(model, x, layer="block9")
    with pytest.raises(ValueError, match="classes are 0 to 13"):
        gradcam(model, x, 14)


def test_a_sure_answer_has_the_map_of_its_log_odds():
    """The gradient of log p itself is a difference of almost equal numbers there."""
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    x = torch.randn(4, 1, 64, 64)
    for linear in (m for m in model.heads.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.1)
        linear.bias.data[1] = 25.0
    layer = default_layer(model, x)
    target = 1
    with torch.no_grad():
        assert (1 - model.double()(x.double()).softmax(dim=1)[:, 1]).max() < 1e-5
    wanted = gradcam(model, x.double(), target, layer=layer)
    found = gradcam(model.float(), x, target, layer=layer)
    assert wanted.amax(dim=(1, 2)).min() > 0
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-3 * b.max()
