"""Twins differ in their attention and in nothing else, starting weights included."""

import itertools
import re

import pytest
import timm
import torch
from torch import nn

import regard

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d"]
WIDE = ["wide_resnet18_1_5", "wide_resnet18_2"]
GATES = {
    "se": re.compile(r"\.se\."),
    "cbam": re.compile(r"\.se\."),
    "attention": re.compile(r"\.mask\."),
    "ag": re.compile(r"^gate[34]\."),
}
# the paper's two heads: SonoNet averages maps of classes, AG-SonoNet classifies vectors
HEADS = re.compile(r"^(heads|classifier|adapt)\.")
# narrow networks of the same layers: names are what decides, not widths
NARROW = {
    "resnet": {"channels": (16, 32, 64, 64)},
    "attention": {"channels": (16, 64, 64, 128, 128)},
}


def narrow(name):
    if name.endswith("_cifar") or "sononet" in name or "mobilenet" in name:
        return {}
    return NARROW["attention" if "attention" in name else "resnet"]


def made(name, seed=3, **arguments):
    torch.manual_seed(seed)
    model = regard.create_model(name, num_classes=3, **arguments)
    return model, torch.random.get_rng_state()


def assert_fair(family, **arguments):
    plain, rng = made(family["plain"], **arguments)
    own = plain.state_dict()
    for kind, name in family.items():
        if kind == "plain":
            continue
        twin, rng_after = made(name, **arguments)
        state = twin.state_dict()
        extra = {k for k in state if GATES[kind].search(k)}
        assert extra
        heads = {k for k in state if kind == "ag" and HEADS.search(k)}
        shared = set(state) - extra - heads
        assert shared == {k for k in own if not (kind == "ag" and HEADS.search(k))}
        assert shared
        for key in shared:
            assert torch.equal(state[key], own[key]), key
        assert torch.equal(rng_after, rng)
        assert twin.default_cfg["input_size"] == plain.default_cfg["input_size"]
        assert twin.default_cfg["mean"] == plain.default_cfg["mean"]


def test_every_network_of_regards_is_in_a_family():
    alone = {"preact_resnet164_cifar"}
    for name in set(regard.list_models()) - alone:
        assert name in regard.twins(name).values(), name


@pytest.mark.parametrize("plain", [n for n in regard.list_models() if n != "preact_resnet164_cifar"
                                   and regard.twins(n)["plain"] == n])  # fmt: skip
def test_twins_share_every_weight_but_the_attention(plain):
    assert_fair(regard.twins(plain), **narrow(plain))


@pytest.mark.parametrize(
    ("plain", "arguments"),
    [
        ("plain_resnet18", {"stem": "cifar", "in_chans": 1, "channels": (8, 16, 32, 32)}),
        ("plain_resnet18", {"zero_init_last": True, "channels": (8, 16, 32, 32)}),
        ("plain_attention56_cifar", {"p": 2, "unit": "preact", "in_chans": 1}),
        ("sononet8", {"features": 4, "convs": (2, 2, 3, 3, 3), "in_chans": 3}),
    ],
)
def test_twins_are_fair_with_arguments_too(plain, arguments):
    assert_fair(regard.twins(plain), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"attention": "naive"}, {"mask": "local"}, {"mask_activation": "spatial"}, {"r": 2}],
)
def test_ablations_share_the_trunk(arguments):
    full, rng = made("attention56_cifar")
    ablation, rng_after = made("attention56_cifar", **arguments)
    own, state = full.state_dict(), ablation.state_dict()
    trunk = {k for k in own if ".mask." not in k}
    assert trunk == {k for k in state if ".mask." not in k}
    assert all(torch.equal(own[k], state[k]) for k in trunk)
    assert torch.equal(rng, rng_after)


def test_gates_draw_their_own_numbers_and_seeds_differ():
    a, b = (made("cbam_resnet18", seed, channels=(8, 16, 32, 32))[0] for seed in (1, 2))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.ndim == 1 or not torch.equal(p, q), name
    weights = [m.weight for m in a.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for p, q in itertools.combinations(weights, 2):  # no two layers start alike
        assert p.shape != q.shape or not torch.equal(p, q)
    mlp = a.layer4[1].se.channel.mlp[0]
    assert mlp.weight.abs().max() <= 32**-0.5  # PyTorch's U(-1 / sqrt(fan-in), ...)
    assert mlp.weight.abs().max() > 0.9 * 32**-0.5


def test_the_authors_initialization():
    model, _ = made("cbam_resnet50")
    conv = model.layer4[0].conv2.weight  # He normal, fan-out
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    block = made("ag_sononet32")[0].block5[2][0]  # He normal, fan-in; PyTorch's bias
    assert block.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert 0 < block.bias.abs().max() <= (256 * 9) ** -0.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_timms_network_of_the_same_weights_answers_the_same(name):
    plain, _ = made(f"plain_{name}")
    theirs = timm.create_model(name, num_classes=3)
    theirs.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 80)
    assert torch.equal(plain.eval()(x), theirs.eval()(x))
    assert torch.equal(plain.train()(x), theirs.train()(x))


def test_names():
    for base in RESNETS + WIDE:
        plain = f"plain_{base}" if base in RESNETS else base
        wanted = {"plain": plain, "se": f"se_{base}", "cbam": f"cbam_{base}"}
        for name in (base, *wanted.values()):
            assert regard.twins(name) == wanted
            assert timm.is_model(name)
    assert timm.models.model_entrypoint("resnet18").__module__ == "timm.models.resnet"
    assert regard.twins("attention92") == {"plain": "plain_attention92", "attention": "attention92"}
    for name in ("vgg11", "cbam_vgg11", "preact_resnet164_cifar"):
        with pytest.raises(ValueError, match=f"{name!r} has no twin; these have: plain_resnet18,"):
            regard.twins(name)
