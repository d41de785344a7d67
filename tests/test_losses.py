"""multi_head_cross_entropy: weighted sums of cross-entropies, against numbers by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import regard


def outputs(heads=3, batch=5, classes=4):
    generator = torch.Generator().manual_seed(11)
    return 3 * torch.randn(batch, heads, classes, generator=generator, dtype=torch.float64)


TARGET = torch.tensor([0, 3, 1, 1, 2])


def cross_entropies(logits, probabilities):
    """(B, heads): -sum_k p_k log softmax(z)_k, in numpy."""
    z = logits.detach().numpy()
    top = z.max(axis=2, keepdims=True)
    logs = z - top - np.log(np.exp(z - top).sum(axis=2, keepdims=True))
    return -(probabilities[:, None] * logs).sum(axis=2)


def one_hot(smoothing=0.0):
    return (1 - smoothing) * np.eye(4)[TARGET.numpy()] + smoothing / 4


def test_each_head_counts_once_by_default():
    wanted = cross_entropies(outputs(), one_hot()).mean(axis=0).sum()
    loss = regard.multi_head_cross_entropy(outputs(), TARGET)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["mean", "deep_sup"])
def test_the_networks_own_weights(aggregation):
    model = regard.create_model("ag_sononet8", aggregation=aggregation)
    weights = {"mean": [1, 1, 1], "deep_sup": [1, 0.1, 0.1, 0.1]}[aggregation]
    z = outputs(heads=len(weights))
    wanted = cross_entropies(z, one_hot()).mean(axis=0) @ np.array(weights)
    loss = regard.multi_head_cross_entropy(z, TARGET, model.head_weights)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_one_head_is_cross_entropy():
    z = outputs(heads=1)
    wanted = F.cross_entropy(z[:, 0], TARGET)
    assert torch.equal(regard.multi_head_cross_entropy(z, TARGET), wanted)
    assert torch.equal(regard.multi_head_cross_entropy(z[:, 0], TARGET), wanted)
    assert torch.equal(regard.multi_head_cross_entropy(z[:, 0], TARGET, [1.0]), wanted)
    assert torch.equal(regard.multi_head_cross_entropy(z[:, 0], TARGET, (0.5,)), 0.5 * wanted)


def test_label_smoothing_reaches_every_head():
    wanted = cross_entropies(outputs(), one_hot(0.2)).mean(axis=0) @ np.array([1.0, 0.5, 2.0])
    loss = regard.multi_head_cross_entropy(outputs(), TARGET, [1.0, 0.5, 2.0], label_smoothing=0.2)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert loss.item() != pytest.approx(
        regard.multi_head_cross_entropy(outputs(), TARGET, [1, 0.5, 2]).item()
    )


def test_probabilities_as_target():
    mixed = 0.3 * one_hot() + 0.7 * one_hot()[::-1]
    wanted = cross_entropies(outputs(), mixed).mean(axis=0).sum()
    loss = regard.multi_head_cross_entropy(outputs(), torch.from_numpy(mixed.copy()))
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_class_weights_and_no_reduction():
    each = cross_entropies(outputs(), one_hot())
    loss = regard.multi_head_cross_entropy(outputs(), TARGET, [2.0, 0.0, 1.0], reduction="none")
    np.testing.assert_allclose(loss.numpy(), each @ np.array([2.0, 0.0, 1.0]), rtol=1e-12)
    classes = np.array([0.5, 2.0, 1.0, 3.0])
    of_images = classes[TARGET.numpy()]
    wanted = (each * of_images[:, None]).sum() / of_images.sum()
    loss = regard.multi_head_cross_entropy(outputs(), TARGET, weight=torch.from_numpy(classes))
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_gradients_are_the_weighted_differences():
    z = outputs().requires_grad_()
    weights = np.array([1.0, 0.1, 0.0])
    regard.multi_head_cross_entropy(z, TARGET, list(weights)).backward()
    softmax = np.exp(z.detach().numpy())
    softmax /= softmax.sum(axis=2, keepdims=True)
    wanted = (softmax - one_hot()[:, None]) * weights[:, None] / len(TARGET)
    np.testing.assert_allclose(z.grad.numpy(), wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0,) * 4, ()])
def test_weights_that_are_not_as_many_as_the_heads(weights):
    with pytest.raises(ValueError, match="the network has 3 heads") as caught:
        regard.multi_head_cross_entropy(outputs(), TARGET, weights)
    assert str(caught.value) == f"weights={weights}: the network has 3 heads"
    with pytest.raises(ValueError, match="1 heads"):
        regard.multi_head_cross_entropy(outputs()[:, 0], TARGET, (1.0, 0.1))
