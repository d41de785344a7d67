"""record(): the maps that the network used, each recomputed from what went into it."""

import gc
import re
import weakref
from contextlib import contextmanager
from threading import Event, Thread, Timer

import numpy as np
import pytest
import timm
import torch
from torch import nn

import regard
from regard.attention import (
    attention_kinds,
    attention_stages,
    evaluating,
    own_maps,
    record,
)
from regard.explanations.explanation import explain_batch
from regard.explanations.gradcam import gradcam
from regard.explanations.overlay import overlay
from regard.features import inputs_of
from tests.golden import filled_model

FAMILIES = {
    "attention56_cifar": (3, 24, 32),
    "cbam_resnet18": (3, 48, 64),
    "se_resnet18": (3, 48, 64),
    "ag_sononet8": (1, 48, 64),
}


def images(name, batch=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *FAMILIES[name], generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def networks():
    """In float64, on weights that give every gate something to say."""
    return {name: filled_model(name, num_classes=4) for name in FAMILIES}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(networks):
    yield
    for model in networks.values():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        model.zero_grad()
        assert not model.eval().training


def inputs_and_outputs(model, kind):
    """(name, inputs, output) of every submodule of a type, and hooks to remove."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, kind):

            def keep(m, inputs, output, name=name):
                seen.append((name, [i.detach().clone() for i in inputs], output.detach().clone()))

            handles.append(module.register_forward_hook(keep))
    return seen, handles


@torch.no_grad()
def recorded(model, x, kind):
    """The maps, and what went into and came out of the submodules of a type."""
    seen, handles = inputs_and_outputs(model, kind)
    try:
        with regard.record(model) as maps:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return maps, seen


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def channel_gate(gate, x, pools):
    w1, b1 = gate.mlp[0].weight.detach().numpy(), gate.mlp[0].bias.detach().numpy()
    w2, b2 = gate.mlp[2].weight.detach().numpy(), gate.mlp[2].bias.detach().numpy()
    total = sum(np.maximum(pool(x, axis=(2, 3)) @ w1.T + b1, 0) @ w2.T + b2 for pool in pools)
    return sigmoid(total)[:, :, None, None]


def spatial_gate(gate, x):
    weight, side = gate.conv.weight.detach().numpy()[0], 7
    pooled = np.stack([x.max(axis=1), x.mean(axis=1)], axis=1)
    padded = np.pad(pooled, ((0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(2, 3))
    y = np.einsum("bchwij,cij->bhw", windows, weight)[:, None]
    mean, var = gate.bn.running_mean.item(), gate.bn.running_var.item()
    scaled = (y - mean) / np.sqrt(var + 1e-5)
    return sigmoid(scaled * gate.bn.weight.item() + gate.bn.bias.item())


def test_residual_attention_masks(networks):
    model, x = networks["attention56_cifar"], images("attention56_cifar")
    maps, modules = recorded(model, x, type(model.layer1[1]))
    assert list(maps) == ["layer1.1.mask", "layer2.1.mask", "layer3.1.mask"]
    assert [m.kind for m in maps.values()] == ["mixed"] * 3
    shapes = [(2, 64, 24, 32), (2, 128, 12, 16), (2, 256, 6, 8)]
    assert [tuple(m.values.shape) for m in maps.values()] == shapes
    assert len(modules) == 3
    for name, (module_input,), output in modules:
        mask, module = maps[f"{name}.mask"].values, model.get_submodule(name)
        assert 0 < mask.min() < 0.2 < 0.8 < mask.max() < 1
        with torch.no_grad():  # (1 + M) * T, and the mask's own tail
            shared = module.pre(module_input)
            wanted = module.post((1 + mask) * module.trunk(shared))
        assert torch.allclose(output, wanted, rtol=1e-12)
        assert torch.equal(maps[f"{name}.mask"].spatial(), mask.mean(dim=1))


def test_the_mask_without_pooling_is_recomputed_from_its_units(networks):
    model, x = networks["attention56_cifar"], images("attention56_cifar")
    mask = model.layer3[1].mask
    maps, seen = recorded(model, x, type(mask))
    (name, (mask_input,), _) = seen[-1]
    with torch.no_grad():
        logits = mask.tail(mask.bottom(mask_input)).numpy()
    np.testing.assert_allclose(maps[name].values.numpy(), sigmoid(logits), rtol=1e-12)


@pytest.mark.parametrize("name", ["cbam_resnet18", "se_resnet18"])
def test_gates_of_cbam_and_se(networks, name):
    from regard.models.cbam import ChannelGate, SpatialGate

    model = networks[name]
    maps, seen = recorded(model, images(name), (ChannelGate, SpatialGate))
    cbam = name.startswith("cbam")
    blocks = [f"layer{i}.{j}.se" for i in (1, 2, 3, 4) for j in (0, 1)]
    wanted = [f"{b}.{k}" for b in blocks for k in (("channel", "spatial") if cbam else ["channel"])]
    assert list(maps) == wanted == [name for name, _, _ in seen]
    for gate_name, (x,), _ in seen:
        gate, found = model.get_submodule(gate_name), maps[gate_name]
        x = x.numpy()
        if gate_name.endswith("channel"):
            pools = (np.mean, np.max) if cbam else (np.mean,)
            expected = channel_gate(gate, x, pools)
            assert found.values.shape == (2, x.shape[1], 1, 1)
            assert found.spatial() is None
        else:
            expected = spatial_gate(gate, x)
            assert found.values.shape == (2, 1, *x.shape[2:])
            assert torch.equal(found.spatial(), found.values[:, 0])
        assert found.kind == gate_name.rpartition(".")[2]
        assert found.name == gate_name
        np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-10)
        assert np.ptp(expected) > 1e-3 or expected[0].size == 1


def test_maps_of_attention_gates(networks):
    from regard.models.attention_gate import GateMap

    model = networks["ag_sononet8"]
    maps, seen = recorded(model, images("ag_sononet8"), (GateMap, regard.AttentionGate))
    assert list(maps) == ["gate3.map", "gate4.map"]
    assert {m.kind for m in maps.values()} == {"spatial"}
    assert [tuple(m.values.shape) for m in maps.values()] == [(2, 1, 12, 16), (2, 1, 6, 8)]
    vectors = {name: output.numpy() for name, _, output in seen if not name.endswith("map")}
    for name, (x, g), _ in seen:
        if not name.endswith("map"):
            continue
        gate, alpha = model.get_submodule(name), maps[name].values.numpy()
        np.testing.assert_allclose(alpha.sum(axis=(1, 2, 3)), 1.0, rtol=1e-12)
        theta, phi, psi = (c.weight.detach().numpy()[:, :, 0, 0] for c in gate.children())
        up = aligned(np.einsum("bchw,oc->bohw", g.numpy(), phi), x.shape[-2:])
        f = np.maximum(np.einsum("bchw,oc->bohw", x.numpy(), theta) + up, 0)
        score = np.einsum("bchw,oc->bohw", f, psi) + gate.psi.bias.item()
        score -= score.min(axis=(2, 3), keepdims=True)
        expected = score / score.sum(axis=(2, 3), keepdims=True)
        np.testing.assert_allclose(alpha, expected, rtol=1e-9, atol=1e-15)
        attended = np.einsum("bchw,bhw->bc", x.numpy(), expected[:, 0])
        np.testing.assert_allclose(vectors[name.removesuffix(".map")], attended, rtol=1e-9)


def aligned(g, size):
    """Bilinear interpolation to `size` with aligned corners, one axis after the other."""
    for axis, n in zip((2, 3), size, strict=True):
        old = g.shape[axis]
        at = np.arange(n) * (old - 1) / (n - 1)
        low = np.minimum(at.astype(int), old - 2)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        g = np.take(g, low, axis) * (1 - part) + np.take(g, low + 1, axis) * part
    return g


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train", [False, True])
def test_recording_changes_no_bit(networks, name, train):
    model, x = networks[name], images(name, batch=3)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.train(train)

    def answer():
        model.load_state_dict(state)
        model.zero_grad()
        outputs = model(x)
        outputs.square().sum().backward()
        after = {n: t.clone() for n, t in model.state_dict().items()}
        return outputs.detach(), [p.grad.clone() for p in model.parameters()], after

    wanted, gradients, statistics = answer()
    with regard.record(model):
        outputs, found, after = answer()
    model.load_state_dict(state)
    assert torch.equal(outputs, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    assert all(torch.equal(after[n], statistics[n]) for n in statistics)


def test_the_maps_are_those_of_the_last_call(networks):
    model = networks["ag_sononet8"]
    first, second = images("ag_sononet8", seed=1), images("ag_sononet8", batch=3, seed=2)
    with torch.no_grad(), regard.record(model) as maps:
        assert dict(maps) == {}
        with pytest.raises(KeyError, match=r"gate3\.map: nothing recorded yet"):
            maps["gate3.map"]
        model(first)
        kept = maps["gate3.map"]
        model(second)
    with torch.no_grad(), regard.record(model) as alone:
        model(second)
    assert torch.equal(maps["gate3.map"].values, alone["gate3.map"].values)
    assert kept.values.shape[0] == 2  # what was taken out earlier stays as it was
    with torch.no_grad():
        model(first)
    assert torch.equal(maps["gate3.map"].values, alone["gate3.map"].values)
    with pytest.raises(KeyError, match=r"^'gate5\.map'$"):
        maps["gate5.map"]
    assert repr(maps["gate3.map"]) == "AttentionMap('gate3.map', spatial, (3, 1, 12, 16))"


def test_nested_records_both_see_the_maps(networks):
    model, x = networks["cbam_resnet18"], images("cbam_resnet18")
    other = images("cbam_resnet18", seed=9)
    with torch.no_grad(), regard.record(model) as outer:
        with regard.record(model) as inner:
            model(x)
        assert list(inner) == list(outer)
        assert all(torch.equal(inner[n].values, outer[n].values) for n in outer)
        model(other)  # the inner one has ended, the outer one has not
    assert any(not torch.equal(inner[n].values, outer[n].values) for n in outer)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_hook_is_left_after_an_exception(networks, name):
    model = networks[name]

    def fail():
        assert any(m._forward_hooks for m in model.modules())
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"), regard.record(model) as maps:
        fail()
    assert len(maps) == 0
    with pytest.raises(RuntimeError, match="channels"), regard.record(model):
        model(torch.zeros(1, 7, 48, 64, dtype=torch.float64))  # the forward's own error
    assert not any(m._forward_hooks for m in model.modules())


class Halfway(nn.Module):
    """Its first map is made, and then it fails."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sigmoid(), nn.Sigmoid()
        self.first.attention_kind = "spatial"

    def forward(self, x):
        x = x * self.first(x)
        if x.shape[0] == 3:
            raise RuntimeError("no batch of three")
        return self.second(x)


def test_no_hook_is_left_after_an_exception_between_two_maps():
    model = Halfway()
    with pytest.raises(RuntimeError, match="no batch of three"), regard.record(model) as maps:
        model(torch.zeros(3, 1, 2, 2))
    assert list(maps) == ["first"]
    assert not any(m._forward_hooks for m in model.modules())


def test_modules_of_ones_own_are_recorded_when_they_say_so():
    class Where(nn.Module):
        attention_kind = "spatial"

        def forward(self, x):
            return x.mean(dim=1, keepdim=True).sigmoid()

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.where = Where()
            self.lists = nn.ModuleList([Where(), nn.ReLU()])

        def forward(self, x):
            return self.lists[1](x * self.where(x)) * self.lists[0](x)

    model, x = Mine(), torch.arange(24.0).view(2, 3, 2, 2)
    assert attention_kinds(model) == {"where": "spatial", "lists.0": "spatial"}
    with regard.record(model) as maps:
        model(x)
    assert torch.equal(maps["where"].values, x.mean(dim=1, keepdim=True).sigmoid())
    assert torch.equal(maps["lists.0"].spatial(), x.mean(dim=1).sigmoid())
    # alone, a map is called by the empty name
    with regard.record(model.where) as alone:
        model.where(x)
    assert torch.equal(alone[""].values, maps["where"].values)


class Scored(nn.Module):
    """A network of one's own: what `score` makes of its map is its attention."""

    def __init__(self, score, kind):
        super().__init__()
        self.gate = Called(score)
        self.gate.attention_kind = kind

    def forward(self, x):
        return self.gate(x)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_the_map_is_kept_when_the_network_goes_on_in_place():
    class InPlace(Scored):
        def forward(self, x):
            return self.gate(x).add_(1).mul_(x)

    x = torch.randn(2, 3, 4, 4)
    model = InPlace(torch.sigmoid, "mixed")
    for inference in (False, True):
        with torch.inference_mode(inference), regard.record(model) as maps:
            out = model(x)
        assert torch.equal(maps["gate"].values, x.sigmoid())
        assert torch.equal(out, (1 + x.sigmoid()) * x)


@pytest.mark.parametrize(
    ("kind", "score", "told"),
    [
        ("spatial", lambda x: x.mean(1), "gate returns (2, 4, 5): a spatial map is (B, 1, H, W)"),
        ("spatial", lambda x: x.mean(1)[..., None],
         "gate returns (2, 4, 5, 1): a spatial map is (B, 1, H, W)"),
        ("mixed", lambda x: x.flatten(2),
         "gate returns (2, 3, 20): a mixed map is (B, C, H, W)"),
        ("channel", lambda x: x.mean((2, 3))[:, None, None],
         "gate returns (2, 1, 1, 3): a channel map is (B, C, 1, 1)"),
        ("spatial", lambda x: (x, x.mean(1, keepdim=True)),
         "gate returns a tuple: give the attention_kind to a submodule that returns its map alone"),
        ("pixels", lambda x: x, "gate.attention_kind='pixels': choose one of mixed, channel, "
         "spatial"),
    ],
)  # fmt: skip
def test_what_is_no_map_of_its_kind_is_refused(kind, score, told):
    model = Scored(score, kind)
    with pytest.raises(ValueError, match=re.escape(told)), regard.record(model):
        model(torch.randn(2, 3, 4, 5))
    assert not model.gate._forward_hooks


def test_a_channel_gate_may_give_a_vector():
    model, x = Scored(lambda x: x.mean((2, 3)), "channel"), torch.randn(2, 3, 4, 5)
    with regard.record(model) as maps:
        model(x)
    assert maps["gate"].spatial() is None
    assert torch.equal(maps["gate"].values, x.mean((2, 3)))


def test_a_grafted_network_is_recorded():
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=3).eval()
    with pytest.raises(ValueError, match="ResNet has no attention maps to record") as caught:
        regard.record(plain).__enter__()
    assert "\n" not in str(caught.value)
    with torch.no_grad(), regard.record(regard.graft(plain)) as maps:
        pass
    assert maps.kinds["layer4.1.se.spatial"] == "spatial"
    assert len(maps.kinds) == 16


def refused(model):
    with pytest.raises(ValueError, match="record\\(\\) needs the uncompiled model") as caught:
        regard.record(model).__enter__()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_compiled_networks_are_refused():
    torch._dynamo.reset()
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    compiled = torch.compile(model, backend="eager")
    assert "_orig_mod" in refused(compiled)
    refused(nn.Sequential(compiled, nn.ReLU()))
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad(), regard.record(compiled._orig_mod) as maps:
        model(x)
    assert len(maps) == 2

    in_place = regard.create_model("ag_sononet8", num_classes=3).eval()
    in_place.compile(backend="eager")
    refused(in_place)
    part = regard.create_model("ag_sononet8", num_classes=3).eval()
    part.gate3.compile(backend="eager")
    refused(part)


def test_compiling_while_recording_is_refused_and_works_afterwards():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        # dynamo wraps the hook's RuntimeError in its own, which is one as well
        with pytest.raises(RuntimeError, match="needs the uncompiled model"), regard.record(model):
            compiled(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)


def test_maps_hold_no_graph_and_no_activations(networks):
    model, x = networks["cbam_resnet18"], images("cbam_resnet18")
    activations = []

    def watch(module, inputs, output):
        activations.append(weakref.ref(output))

    handles = [m.register_forward_hook(watch) for m in (model.conv1, model.layer2[0].conv1)]
    with regard.record(model) as maps:
        logits = model(x)
    for handle in handles:
        handle.remove()
    assert logits.requires_grad
    for recorded_map in maps.values():
        assert not recorded_map.values.requires_grad
        assert recorded_map.values.grad_fn is None
    assert len(activations) == 2
    del logits
    gc.collect()
    assert [ref() for ref in activations] == [None, None]
    assert len(maps) == 16


@torch.no_grad()
def test_maps_keep_the_networks_precision():
    model = regard.create_model("cbam_resnet18", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), regard.record(model) as maps:
        model(x)
    assert maps["layer1.0.se.channel"].values.dtype == torch.bfloat16
    with regard.record(model.bfloat16()) as maps:
        model(x.bfloat16())
    assert {m.values.dtype for m in maps.values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------- threads
@contextmanager
def another_thread_within(module, call):
    """Has another thread do something as soon as the module runs the next time."""
    others = []

    def between(module, inputs):
        if not others:
            others.append(Thread(target=call))
            others[0].start()
            others[0].join()

    with module.register_forward_pre_hook(between):
        yield
    assert others


def test_what_another_thread_computes_meanwhile_is_not_recorded():
    torch.manual_seed(0)
    model = regard.create_model("cbam_resnet18", num_classes=3).eval()
    x, other = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), regard.record(model) as alone:
        model(x)
    wanted, cam = {n: m.values for n, m in alone.items()}, gradcam(model, x, 0)

    def call():
        with torch.no_grad():
            model(other)

    within, recording = another_thread_within(model.fc, call), record(model, this_thread=True)
    with within, torch.no_grad(), recording as maps:
        model(x)
    assert all(torch.equal(maps[name].values, values) for name, values in wanted.items())
    with another_thread_within(model.fc, call):
        assert torch.equal(gradcam(model, x, 0), cam)
    with another_thread_within(model.fc, call), inputs_of([model.fc]) as given, torch.no_grad():
        model(x)
    assert [len(features) for features in given] == [1]


class Gate(nn.Module):
    attention_kind = "spatial"

    def forward(self, x):
        return x.mean(dim=1, keepdim=True).sigmoid()


class Block(nn.Module):
    """A convolution, and a gate on its output."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(channels, 4, 3, stride, 1), Gate()

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x)


class Flat(nn.Module):
    """Blocks of two sizes in one sequence, as in many networks of users."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 1), Block(4, 1), Block(4, 2), Block(4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def test_blocks_of_several_sizes_in_one_sequence_have_a_name_for_each_size():
    torch.manual_seed(0)
    model, x = Flat().eval(), torch.randn(2, 3, 16, 24)
    with torch.no_grad(), record(model) as maps:
        model(x)
    each = [m.values[:, 0] for m in maps.values()]
    wanted = {"blocks 16×24": (each[0] + each[1]) / 2, "blocks 8×12": (each[2] + each[3]) / 2}
    assert [m.name for m in attention_stages(maps, 1)] == list(wanted)
    found = own_maps(model, x)
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values)
    pictures = [np.zeros((16, 24), np.uint8)] * 2
    shown = explain_batch(model, x, pictures, classes=["a", "b"], methods=["attention"])[0]
    for name, values in wanted.items():
        drawn = overlay(pictures[0], values[0].numpy(), box=(0, 0, 24, 16))
        np.testing.assert_array_equal(shown.overlay(name), drawn)


def test_two_threads_do_not_restore_each_others_modes():
    model = regard.create_model("ag_sononet8").train()
    entered, leave, modes = Event(), Event(), []

    def first():
        with evaluating(model):
            entered.set()
            leave.wait(5)
            modes.append(model.training)

    def second():
        entered.wait(5)
        Timer(0.1, leave.set).start()
        with evaluating(model):
            threads[0].join()
            modes.append(model.training)

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modes == [False, False]
    assert all(module.training for module in model.modules())


def test_grad_cam_works_within_inference_mode():
    torch.manual_seed(0)
    model, x = regard.create_model("ag_sononet8", num_classes=3).eval(), torch.randn(2, 1, 32, 32)
    wanted = gradcam(model, x)
    with torch.inference_mode():
        assert torch.equal(gradcam(model, x, model(x).argmax(dim=1)), wanted)
