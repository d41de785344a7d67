"""Every network answers timm's verbs, at any size, in half precision, compiled, exported."""

import copy
import functools
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import regard
from regard.models._common import largest_over_channels, largest_over_positions

EVERY = regard.list_models()
# one of each way of building: what holds for it holds for its deeper and wider relatives
KINDS = ["attention56_cifar", "attentionnext56", "cbam_resnet18", "cbam_resnet50", "se_resnet18",
         "se_mobilenet_070", "wide_resnet18_1_5", "plain_attention56_cifar", "sononet8",
         "ag_sononet8"]  # fmt: skip
# as others, but deeper, wider or of another base
_DEEPER = {
    "attention92", "attention92_cifar", "attention128_cifar", "attention164_cifar",
    "attention236_cifar", "attention452_cifar", "attentionnext92", "plain_attention92",
    "plain_attention92_cifar", "plain_attention128_cifar", "plain_attention164_cifar",
    "plain_attention236_cifar", "plain_attention452_cifar", "plain_attentionnext92",
    "cbam_resnet34", "cbam_resnet101", "cbam_resnext101_32x4d", "cbam_wide_resnet18_2",
    "se_resnet34", "se_resnet101", "se_resnext101_32x4d", "se_wide_resnet18_2",
    "plain_resnet34", "plain_resnet101", "plain_resnext101_32x4d", "wide_resnet18_2",
}  # fmt: skip
DEEPER_ONES_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) if name in _DEEPER else name for name in EVERY
]
# and those without attention, which have no module that their twins lack
_LARGE = {
    "attentionnext56", "cbam_resnet50", "se_mobilenet_070", "wide_resnet18_1_5",
    "plain_attention56_cifar",
}  # fmt: skip
LARGE_ONES_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) if name in _LARGE else name for name in KINDS
]
HEADS = {"mean": 3, "deep_sup": 4}


def small_input(model, batch=2, side=None):
    """Images of 64x64 pixels if no other size is asked for, and of 32x32 for CIFAR's networks."""
    channels, *sides = model.default_cfg["input_size"]
    side = side or min(64, *sides)
    return torch.randn(batch, channels, side, side)


@functools.cache
def shared(name):
    """A network of 3 classes in evaluation mode, made once. Whoever changes it takes a copy."""
    return regard.create_model(name, num_classes=3).eval()


def copied(name):
    return copy.deepcopy(shared(name))


@pytest.fixture(autouse=True, scope="module")
def _none_is_kept():
    yield
    shared.cache_clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def each(request):
    """A network of 7 classes. The tests of one follow one another, and each sets its mode."""
    return regard.create_model(request.param, num_classes=7)


@pytest.mark.parametrize("each", DEEPER_ONES_SLOW, indirect=True)
def test_training_reaches_every_parameter(each):
    model, name = each.train(), each.default_cfg["architecture"]
    outputs = model(small_input(model))
    assert outputs.shape == ((2, 3, 7) if name.startswith("ag_") else (2, 7))
    outputs.square().mean().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("each", DEEPER_ONES_SLOW, indirect=True)
@torch.no_grad()
def test_features_head_and_classifier(each):
    model = each.eval()
    x = small_input(model, batch=1)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)
    assert model.num_classes == 3


@pytest.mark.parametrize("name", EVERY)
def test_default_configuration_names_what_is_there(name):
    with torch.device("meta"):
        model = regard.create_model(name)
    parameters = dict(model.named_parameters())
    cfg = model.default_cfg
    classifier = cfg["classifier"]
    for layer in (classifier,) if isinstance(classifier, str) else classifier:
        assert parameters[f"{layer}.weight"].shape[0] == cfg["num_classes"]
    assert parameters[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    named = model.get_submodule(model.get_classifier(name_only=True))
    assert named is model.get_classifier()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_intermediates_features_only_and_checkpointing(name):
    model = copied(name)
    x = small_input(model, batch=1)
    final, maps = model.forward_intermediates(x)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [m.shape[1] for m in maps] == info.channels()
    assert [m.shape[2] for m in maps] == [math.ceil(x.shape[2] / r) for r in info.reduction()]
    assert torch.equal(final, model.forward_features(x))
    (only,) = model.forward_intermediates(x, indices=[2], intermediates_only=True, stop_early=True)
    assert torch.equal(only, maps[2])
    for kind in ("list", "getter"):
        extractor = timm.create_model(name, features_only=True, feature_cls=kind).eval()
        assert [f.shape for f in extractor(x)] == [m.shape for m in maps]
    wanted = model(x)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["attention56_cifar", "cbam_resnet18", "ag_sononet8"])
def test_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(1)
        model = regard.create_model(name, num_classes=3).train()
        model.set_grad_checkpointing(enable)
        model(small_input(model)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*KINDS, "attention92"])
@pytest.mark.parametrize("size", [(65, 97), (33, 48), (127, 64)])
@torch.no_grad()
def test_odd_and_rectangular_sizes(name, size):
    model = shared(name)
    logits = model(torch.randn(1, model.in_chans, *size))
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("attention56", 30, "at least 32x32 pixels"),
        ("attention56_cifar", 3, "at least 4x4 pixels, not about 3x3"),
        ("ag_sononet8", 15, "at least 16x16 pixels, not 15x15"),
    ],
)
def test_too_small_an_image_is_told(name, side, message):
    model = shared(name)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, model.in_chans, side, side))


@pytest.mark.parametrize(
    "name",
    [
        name if name in {"attention56_cifar", "cbam_resnet18", "ag_sononet8"}
        else pytest.param(name, marks=pytest.mark.slow)
        for name in [*KINDS, "attention56"]
    ],
)  # fmt: skip
def test_bfloat16_autocast_trains_without_nan(name):
    model = copied(name).train()
    x = small_input(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x)
    outputs.float().square().mean().backward()
    assert outputs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        exact = model(x).softmax(dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(model(x).float().softmax(dim=1), exact, atol=0.05)


# the others are made of the same modules, and compiling takes seconds each
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("attention56_cifar", {}), ("cbam_resnet50", {"layers": (1, 1, 1, 1)}), ("ag_sononet8", {})],
)
def test_compiles_without_a_graph_break(name, arguments):
    torch._dynamo.reset()
    # in float64: BN over the mask's 2x2 positions makes rounding of float32 large
    model = regard.create_model(name, num_classes=3, **arguments).double()
    x = small_input(model).double()
    for mode in (True, False):
        model.train(mode)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        wanted = model(x)
        model.load_state_dict(state)  # the same running statistics again
        assert torch.allclose(compiled(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("largest", "power"), [(largest_over_channels, 1), (largest_over_positions, 5)]
)
def test_gradients_of_the_largest_survive_compiling_in_half_precision(largest, power):
    """Of amax they don't: Inductor compares rounded values with ones that were not."""
    torch.manual_seed(0)
    torch._dynamo.reset()

    class Gated(torch.nn.Sequential):
        def forward(self, x):
            x = super().forward(x) * 1.7  # what the maximum is of is not stored before
            return x + largest(x)

    net = Gated(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16))
    net.to(memory_format=torch.channels_last)
    # of 256 positions with heavy tails the largest is well above the next, whatever is rounded
    x = torch.randn(8, 3, 16, 16).pow(power)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradient(forward, half):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = forward(x)
        y.float().square().sum().backward()
        return x.grad.clone()

    # in bf16 several values are the largest, which eager torch divides the gradient among
    exact, compiled = gradient(net, half=False), gradient(torch.compile(net), half=True)
    assert (compiled - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", LARGE_ONES_SLOW)
@torch.no_grad()
def test_exports_with_dynamic_batch(name):
    model = shared(name)
    x = small_input(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = small_input(model, batch=5)
    assert torch.allclose(program.module()(more), model(more), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", LARGE_ONES_SLOW)
@torch.no_grad()
def test_torchscript_and_fx(name):
    with timm.layers.set_scriptable(True):
        model = regard.create_model(name, num_classes=3).eval()
    x = small_input(model)
    wanted = model(x)
    assert torch.allclose(torch.jit.script(model)(x), wanted, atol=1e-5)
    tracer = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
    }
    train_nodes, nodes = get_graph_node_names(
        model, tracer_kwargs=tracer, suppress_diff_warning=True
    )
    traced = create_feature_extractor(
        model,
        train_return_nodes=[train_nodes[-1]],
        eval_return_nodes=[nodes[-1]],
        tracer_kwargs=tracer,
        suppress_diff_warning=True,
    ).eval()
    assert torch.equal(traced(x)[nodes[-1]], wanted)


@pytest.mark.parametrize("name", KINDS)
def test_parameter_groups_cover_every_parameter(name):
    from timm.optim import param_groups_layer_decay

    model = shared(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({g["lr_scale"] for g in groups}) > 3


def test_an_unknown_argument_or_value_is_refused():
    wrong = [
        ("attention56", {"attention": "both"}, "residual, naive"),
        ("attention56", {"mask": "unet"}, "encoder_decoder, local"),
        ("attention56", {"mask_activation": "relu"}, "mixed, channel, spatial"),
        ("attention56", {"t": 0}, "t=0"),
        ("cbam_resnet18", {"order": "both"}, "channel_spatial, spatial_channel, parallel"),
        ("cbam_resnet18", {"channel_pool": "min"}, "both, avg, max"),
        ("cbam_resnet18", {"spatial_pool": "min"}, "avg_max, conv"),
        ("cbam_resnet18", {"kernel_size": 4}, "kernel_size=4"),
        ("cbam_resnet18", {"reduction": 0}, "reduction=0"),
        ("cbam_resnet18", {"stem": "mnist"}, "imagenet, cifar"),
        ("ag_sononet8", {"aggregation": "max"}, "concat, mean, deep_sup, ft"),
        ("ag_sononet8", {"normalize": "max"}, "mean_flow, softmax, sigmoid, mean, range"),
        ("sononet8", {"convs": (3, 3)}, "convs="),
    ]
    for name, arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            regard.create_model(name, **arguments)
    with pytest.raises(TypeError, match="attentoin"):
        regard.create_model("cbam_resnet18", attentoin=1)


@pytest.mark.parametrize("name", ["cbam_resnet50", "se_resnet18", "wide_resnet18_1_5"])
def test_every_branch_starts_alive_as_the_authors_have_it(name):
    model = regard.create_model(name)
    last = [getattr(b, "bn3", b.bn2).weight for b in model.modules() if hasattr(b, "drop_path")]
    assert len(last) > 7
    assert all((weight == 1).all() for weight in last)


def test_filters_of_the_first_block_can_be_chosen():
    model = regard.create_model("ag_sononet8", features=16)
    assert model.block1[0][0].out_channels == 16


@pytest.mark.parametrize("name", KINDS)
def test_a_new_classifier_fits_its_network(name):
    model = copied(name).bfloat16()
    model.reset_classifier(5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        assert model(small_input(model, batch=1).bfloat16()).shape == (1, 5)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_new_classifier_keeps_the_pooling_and_tells_its_width(name):
    model = regard.create_model(name, num_classes=3, global_pool="max").eval()
    features = model.forward_features(small_input(model))
    model.reset_classifier(5)
    assert model.global_pool.pool_type == "max"
    pools = ["avg", "avgmax"] if "sononet" in name else ["avg", "catavgmax"]
    for made in (model, regard.create_model(name, num_classes=3, global_pool=pools[1])):
        for pool in pools:
            vectors = made.eval().forward_head(features, pre_logits=True)
            assert vectors.shape[1] == made.head_hidden_size
            made.reset_classifier(4, pool)


@pytest.mark.parametrize(
    "name",
    ["attention56_cifar", "attention56", "cbam_resnet18", "se_mobilenet_070", "sononet8",
     "ag_sononet8"],
)  # fmt: skip
@torch.no_grad()
def test_a_pruned_network_gives_its_last_map(name):
    for index in (0, 2):
        model = copied(name)
        x = small_input(model, batch=1)
        (wanted,) = model.forward_intermediates(x, indices=[index], intermediates_only=True)
        assert model.prune_intermediate_layers([index]) == [index]
        final, (found,) = model.forward_intermediates(x, indices=[index])
        for each in (final, found, model.forward_features(x), model(x)):
            assert torch.equal(each, wanted)
        assert model.num_features == wanted.shape[1]
        model.reset_classifier(4, "max")
        assert torch.equal(model.forward_head(final, pre_logits=True), wanted.amax(dim=(2, 3)))
        assert torch.equal(model(x), model.forward_head(final))
        assert model(x).shape == (1, 4)


@pytest.mark.parametrize("name", KINDS)
def test_device_and_precision_are_arguments(name):
    model = regard.create_model(name, num_classes=3, dtype=torch.float64).eval()
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    assert model(small_input(model).double()).dtype == torch.float64
    model = regard.create_model(name, num_classes=3, device="meta")
    assert all(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_torchvision_and_fx_trace_it_unasked(name):
    model = shared(name)
    x, larger = small_input(model), small_input(model, batch=1, side=96)
    node = model.feature_info[2]["module"]
    extractor = create_feature_extractor(model, [node], suppress_diff_warning=True)
    (wanted,) = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    assert torch.equal(extractor(x)[node], wanted)
    assert torch.equal(torch.fx.symbolic_trace(model)(larger), model(larger))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("sononet8", {}), *(("ag_sononet8", {"aggregation": a}) for a in ("mean", "concat", "deep_sup",
                                                                      "ft"))],
)  # fmt: skip
@torch.no_grad()
def test_a_saved_network_is_loaded_with_other_classes(tmp_path, name, arguments):
    model = regard.create_model(name, num_classes=3, **arguments).eval()
    regard.save_model(model, tmp_path / "run")
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True, num_classes=5)
    x = small_input(model)
    assert again.eval()(x).shape == (2, 5)
    assert torch.equal(again.forward_features(x), model.forward_features(x))


@torch.no_grad()
def test_a_network_with_another_pooling_is_saved_as_it_is_now(tmp_path):
    model = copied("se_mobilenet_070")
    model.reset_classifier(5, "catavgmax")  # a classifier twice as wide
    regard.save_model(model, tmp_path / "run")
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    x = small_input(model)
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_the_cifar_stem_is_as_wide_as_what_follows():
    for arguments, width in (({}, 64), ({"stem_type": "deep", "stem_width": 16}, 32)):
        model = regard.create_model("cbam_resnet18", num_classes=3, stem="cifar", **arguments)
        (first,) = model.eval().forward_intermediates(
            torch.randn(1, 3, 16, 16), [0], intermediates_only=True, stop_early=True
        )
        assert first.shape == (1, width, 16, 16)
