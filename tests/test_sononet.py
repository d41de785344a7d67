"""The gates' five normalizations, the four aggregations, and the heads that training sees."""

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.errors import UsageError
from regard.models.attention_gate import NORMALIZATIONS, normalize_map
from regard.models.sononet import AGGREGATIONS
from tests.golden import filled_model

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative rounding of one value
DTYPES = [torch.float32, torch.float64, *HALF]
HEADS = {"concat": 0, "mean": 3, "deep_sup": 4, "ft": 0}


def names(dtypes):
    return [str(d).removeprefix("torch.") for d in dtypes]


def by_hand(s, how):
    """The five formulas of GateMap in numpy, on a map of (B, 1, H, W)."""
    axes = {"axis": (2, 3), "keepdims": True}
    low, high = s.min(**axes), s.max(**axes)
    return {
        "mean_flow": lambda: (s - low) / (s - low).sum(**axes),
        "softmax": lambda: np.exp(s - high) / np.exp(s - high).sum(**axes),
        "sigmoid": lambda: 1 / (1 + np.exp(-s)),
        "mean": lambda: s / s.sum(**axes),
        "range": lambda: (s - low) / (high - low),
    }[how]()


def scores(seed=0, shape=(4, 1, 5, 7)):
    """Random maps, whose sum is far from nothing."""
    return np.random.default_rng(seed).normal(size=shape) + 0.5


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 50.0])
def test_the_formulas(how, scale):
    s = scale * scores()
    ours = normalize_map(torch.from_numpy(s), how).numpy()
    np.testing.assert_allclose(ours, by_hand(s, how), rtol=1e-11, atol=1e-15)
    if how in ("mean_flow", "softmax", "mean"):
        np.testing.assert_allclose(ours.sum(axis=(1, 2, 3)), 1.0, rtol=1e-12)
    if how == "range":
        assert (ours.min(), ours.max()) == (0.0, 1.0)


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=names(HALF))
def test_half_precision_is_the_formula_rounded_once(how, dtype):
    s = torch.from_numpy(scores(1, (2, 1, 13, 17))).to(dtype)
    ours = normalize_map(s, how)
    assert ours.dtype == dtype
    wanted = by_hand(s.double().numpy(), how)
    # half-precision floats have a smallest step as well, 2^-24 in float16
    tolerance = {"rtol": 1.01 * HALF[dtype], "atol": 2**-24}
    np.testing.assert_allclose(ours.double().numpy(), wanted, **tolerance)


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("value", [0.0, 1.7, -3.3, 1e-6, 3e4])
@pytest.mark.parametrize("size", [(4, 8), (13, 17), (1, 1)])
def test_a_constant_map_looks_everywhere(how, dtype, value, size):
    s = torch.full((2, 1, *size), value, dtype=dtype, requires_grad=True)
    alpha = normalize_map(s, how)
    assert alpha.dtype == dtype
    n = size[0] * size[1]
    if how == "sigmoid":
        wanted = by_hand(s.detach().double().numpy(), how)
    else:
        wanted = np.full(s.shape, 1.0 if how == "range" else 1 / n)
    # a value is rounded once in half precision; a sum of n in float32 has n roundings
    rounding = HALF.get(dtype, n * 2**-23)
    found = alpha.detach().double().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1.01 * rounding, atol=2**-24)
    if how in ("mean_flow", "softmax", "mean"):
        np.testing.assert_allclose(found.sum(axis=(1, 2, 3)), 1.0, rtol=1.01 * rounding)
    weights = torch.linspace(-1, 1, n, dtype=dtype).view(1, 1, *size)
    (alpha * weights).sum().backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("how", ["mean_flow", "range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_rounding_is_no_place_to_look_at(how, dtype):
    s = torch.full((1, 1, 6, 8), 1.7, dtype=dtype)
    s[0, 0, 2, 3] = torch.nextafter(s[0, 0, 2, 3], torch.tensor(2.0, dtype=dtype))
    flat = normalize_map(s, how)
    assert torch.equal(flat, torch.full_like(s, 1.0 if how == "range" else 1 / 48))
    s[0, 0, 2, 3] += 1e-3  # and this is a place
    assert normalize_map(s, how)[0, 0, 2, 3] > 0.9


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_one_flat_map_does_not_touch_its_neighbors(how):
    s = torch.from_numpy(scores(2, (3, 1, 4, 4)))
    s[1] = 0.0
    s.requires_grad_()
    alpha = normalize_map(s, how)
    (alpha * torch.arange(16.0).view(1, 1, 4, 4)).sum().backward()
    alone = s.detach()[[0, 2]].requires_grad_()
    apart = normalize_map(alone, how)
    (apart * torch.arange(16.0).view(1, 1, 4, 4)).sum().backward()
    assert torch.equal(alpha[[0, 2]], apart)
    assert torch.equal(s.grad[[0, 2]], alone.grad)
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_gradients_are_those_of_the_formulas(how):
    s = torch.from_numpy(scores(3, (2, 1, 3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: normalize_map(t, how), (s,))


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gate_on_an_empty_image_trains(how, dtype):
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3, normalize=how).to(dtype).train()
    outputs = model(torch.zeros(2, 1, 32, 48, dtype=dtype))
    regard.multi_head_cross_entropy(
        outputs.float(), torch.tensor([0, 2]), model.head_weights
    ).backward()
    assert outputs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def heads_and_vectors(model, x):
    """Training's outputs with evaluation's running statistics, and the three vectors."""
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    with torch.no_grad():
        heads = model(x)
        vectors = model.forward_head(model.forward_features(x), pre_logits=True)
    model.eval()
    return heads, vectors.split(model.vectors, dim=1)


def image(batch=3):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 1, 48, 64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_training_and_evaluation_give(aggregation):
    model = regard.create_model("ag_sononet8", num_classes=5, aggregation=aggregation)
    x = image().float()
    wanted = (3, HEADS[aggregation], 5) if HEADS[aggregation] else (3, 5)
    outputs = model.train()(x)
    assert outputs.shape == wanted
    assert model.eval()(x).shape == (3, 5)
    weights = {"mean": (1, 1, 1), "deep_sup": (1, 0.1, 0.1, 0.1)}.get(aggregation, (1,))
    assert model.head_weights == weights
    assert len(model.head_weights) == max(1, HEADS[aggregation])
    regard.multi_head_cross_entropy(outputs, torch.tensor([0, 1, 4]), model.head_weights).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@torch.no_grad()
def test_mean_predicts_the_mean_of_the_softmaxes():
    model = filled_model("ag_sononet8", num_classes=5)
    heads, vectors = heads_and_vectors(model, image())
    for i, (layer, vector) in enumerate(zip(model.heads, vectors, strict=True)):
        assert torch.allclose(heads[:, i], layer(vector), rtol=1e-12)
    probabilities = heads.softmax(dim=2)
    assert probabilities.std(dim=1).max() > 0.05  # the heads disagree
    prediction = model(image())
    assert torch.allclose(prediction.softmax(dim=1), probabilities.mean(dim=1), rtol=1e-12)
    assert not torch.allclose(prediction.softmax(1), heads.mean(1).softmax(1), atol=1e-4)


@torch.no_grad()
def test_the_mean_of_certain_heads_is_exact():
    model = filled_model("ag_sononet8", num_classes=3)
    for layer, bias in zip(model.heads, ([800.0, 0, 0], [0, 800.0, 0], [0, 800.0, 0]), strict=True):
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(bias))
    logits = model(image(1))
    assert logits.isfinite().all()
    wanted = torch.tensor([[1 / 3, 2 / 3, 0]], dtype=torch.float64)
    assert torch.allclose(logits.softmax(dim=1), wanted, atol=1e-12)


@torch.no_grad()
def test_deep_supervision_predicts_the_concat_head():
    model = filled_model("ag_sononet8", num_classes=5, aggregation="deep_sup")
    heads, vectors = heads_and_vectors(model, image())
    assert torch.equal(model(image()), heads[:, 0])
    assert torch.allclose(heads[:, 0], model.classifier(torch.cat(vectors, dim=1)), rtol=1e-12)
    for i, (layer, vector) in enumerate(zip(model.heads, vectors, strict=True), start=1):
        assert torch.allclose(heads[:, i], layer(vector), rtol=1e-12)
    concat = filled_model("ag_sononet8", num_classes=5, aggregation="concat")
    assert torch.equal(concat(image()), model(image()))


@torch.no_grad()
def test_fine_tuning_joins_the_logits_of_the_heads_of_mean():
    model = filled_model("ag_sononet8", num_classes=5, aggregation="ft")
    mean = filled_model("ag_sononet8", num_classes=5)
    assert set(model.state_dict()) - set(mean.state_dict()) == {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    heads, _ = heads_and_vectors(mean, image())
    wanted = model.classifier(heads.flatten(1))
    assert torch.allclose(model(image()), wanted, rtol=1e-12)
    assert torch.equal(heads_and_vectors(model, image())[0], model(image()))


@torch.no_grad()
def test_the_third_vector_is_the_average_of_the_last_block():
    model = filled_model("ag_sononet8", num_classes=5)
    _, vectors = heads_and_vectors(model, image())
    block3, block4, block5 = model._maps(image())
    assert [v.shape[1] for v in vectors] == [32, 64, 64]
    assert torch.allclose(vectors[2], block5.mean(dim=(2, 3)), rtol=1e-12)
    assert torch.allclose(vectors[0], model.gate3(block3, block5), rtol=1e-12)
    assert torch.allclose(vectors[1], model.gate4(block4, block5), rtol=1e-12)


@pytest.mark.parametrize(("normalize", "bias"), [("sigmoid", 3.0), ("softmax", 10.0)])
def test_the_authors_biases_of_psi(normalize, bias):
    model = regard.create_model("ag_sononet8", normalize=normalize)
    assert model.gate3.map.psi.bias.item() == model.gate4.map.psi.bias.item() == bias


@torch.no_grad()
def test_a_gate_of_ones_own_size():
    torch.manual_seed(0)
    gate = regard.AttentionGate(6, 10, inner=4, normalize="softmax")
    x, g = torch.randn(2, 6, 9, 11), torch.randn(2, 10, 3, 4)
    assert gate.map.theta.weight.shape == (4, 6, 1, 1)
    assert gate.map.phi.weight.shape == (4, 10, 1, 1)
    assert regard.AttentionGate(6, 10).map.theta.weight.shape == (10, 6, 1, 1)
    assert torch.allclose(gate(x, g), (gate.map(x, g) * x).sum(dim=(2, 3)))
    with pytest.raises(ValueError, match="normalize='max': choose one of mean_flow, softmax"):
        regard.AttentionGate(6, 10, normalize="max")


@pytest.mark.parametrize("name", ["sononet8", "ag_sononet8"])
def test_pooling_gives_one_value_a_channel(name):
    x = torch.rand(2, 1, 48, 48)
    model = regard.create_model(name, num_classes=5, global_pool="avgmax").eval()
    assert model(x).shape == (2, 5)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    for refused in ("catavgmax", "median"):
        with pytest.raises(UsageError, match="choose one of avg, max, avgmax, ''"):
            regard.create_model(name, global_pool=refused)
        with pytest.raises(UsageError, match="global_pool"):
            model.reset_classifier(3, refused)
