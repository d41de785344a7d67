"""Grafting: attention under a trained ResNet that changes no bit, and is free to learn."""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import regard
from regard.engines.conversion import fold_batch_norms
from regard.errors import UsageError

PLAIN = ["resnet18", "resnet50", "resnext50_32x4d"]
ATTENTION = {
    "cbam": regard.CBAM,
    "se": regard.SE,
    "spatial_channel": partial(regard.CBAM, order="spatial_channel"),
    "parallel_k3": partial(regard.CBAM, order="parallel", kernel_size=3),
    "spatial": partial(regard.CBAM, order="spatial", spatial_pool="conv"),
}
GATES = {"cbam": 2, "se": 1, "spatial_channel": 2, "parallel_k3": 2, "spatial": 1}


NARROW = (16, 32, 64, 128)  # channels: a quarter of the usual, of which the gates know nothing


def trained(name="resnet18", num_classes=5, **arguments):
    """A plain network as training leaves one: weights and statistics of every sign and size."""
    return copy.deepcopy(_trained(name, num_classes, **arguments))


@functools.cache
def _trained(name, num_classes, **arguments):
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 0.8, 0.6)
            nn.init.normal_(m.bias, 0.0, 0.5)
            nn.init.normal_(m.running_mean, 0.0, 0.3)
            nn.init.uniform_(m.running_var, 0.3, 3.0)
    return model.eval()


def images(batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 32, 48, generator=generator)


def gates(model):
    return {n: m for n, m in model.named_modules() if getattr(m, "attention_kind", None)}


def assert_same_answers(plain, grafted, x):
    """Bit for bit, in evaluation and in training, the running statistics included.

    Trains both networks' running statistics.
    """
    with torch.no_grad():
        wanted = plain.eval()(x)
        assert wanted.isfinite().all()
        assert wanted.std() > 0
        assert torch.equal(grafted.eval()(x), wanted)
        for _ in range(2):  # the second sees the gates' own running statistics moved
            assert torch.equal(grafted.train()(x), plain.train()(x))
        assert torch.equal(grafted.eval()(x), plain.eval()(x))
    buffers = grafted.state_dict()
    for name, wanted in plain.named_buffers():
        assert torch.equal(buffers[name], wanted), name


# each block with CBAM, and every attention on one of them
FP32 = [
    (name, attention)
    for name in PLAIN for attention in ATTENTION
    if name == "resnet18" or attention == "cbam"
]  # fmt: skip
# CPUs without bf16 take ten times as long in it
BF16 = [("resnet18", "cbam"), ("resnet18", "spatial")]


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [
        pytest.param(
            name, attention, dtype, marks=[pytest.mark.slow] * ((name, attention) not in of_dtype)
        )
        for dtype, of_dtype in ((torch.float32, FP32), (torch.bfloat16, BF16))
        for name in PLAIN for attention in ATTENTION
    ],
)  # fmt: skip
def test_the_graft_answers_bit_for_bit_as_the_plain_network(name, attention, dtype):
    plain = trained(name, channels=NARROW).to(dtype)
    assert min(m.weight.min() for m in plain.modules() if isinstance(m, nn.BatchNorm2d)) < 0
    grafted = regard.graft(plain, ATTENTION[attention])
    blocks = [m for m in grafted.modules() if hasattr(m, "se")]
    assert len(gates(grafted)) == GATES[attention] * len(blocks) > 0
    assert {p.dtype for p in grafted.parameters()} == {dtype}
    assert_same_answers(plain, grafted, images().to(dtype))


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_gate_starts_at_exactly_one_half(attention):
    grafted = regard.graft(trained(channels=NARROW), ATTENTION[attention])
    for mode in (False, True):
        with torch.no_grad(), regard.record(grafted.train(mode)) as maps:
            grafted(images())
        assert len(maps) == GATES[attention] * 8
        for recorded in maps.values():
            assert torch.equal(recorded.values, torch.full_like(recorded.values, 0.5))


def test_gates_laid_over_without_grafting_change_the_answer():
    plain = trained()
    naive = regard.create_model("cbam_resnet18", num_classes=5).eval()
    naive.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        answer, wanted = naive(images()), plain(images())
    assert (answer - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("attention", ["cbam", "se", "parallel_k3"])
def test_training_moves_every_gate(attention):
    plain = trained()
    torch.manual_seed(1)  # of other first weights, all of a gate's few ReLUs may be dead
    grafted = regard.graft(plain, ATTENTION[attention]).train()
    before = {n: p.detach().clone() for n, p in grafted.named_parameters()}
    optimizer = torch.optim.SGD(grafted.parameters(), lr=0.01)
    target = torch.arange(4) % 5
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(grafted(images(batch=4)), target).backward()
        optimizer.step()
    for name, gate in gates(grafted).items():
        channel = gate.attention_kind == "channel"
        # the first step moves the last layer, and through it the second moves the first one
        layers = ("mlp.2.weight", "mlp.2.bias", "mlp.0.weight") if channel else ("bn.weight",
                  "bn.bias", "conv.weight")  # fmt: skip
        for layer in layers:
            parameter = gate.get_parameter(layer)
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, before[f"{name}.{layer}"]), f"{name}.{layer}"
    with torch.no_grad(), regard.record(grafted) as maps:
        grafted(images())
    assert all((m.values != 0.5).any() for m in maps.values())


def test_the_plain_network_is_left_as_it_was():
    plain = trained().train()
    plain.layer2.eval()
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    cfg = copy.deepcopy(plain.pretrained_cfg)
    grafted = regard.graft(plain)
    with torch.no_grad():
        for p in grafted.parameters():
            p.add_(1.0)
    after = plain.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert plain.pretrained_cfg == cfg
    assert grafted.layer1[0].se.spatial.bn.training
    assert not grafted.layer2[0].se.spatial.bn.training


SMALL_DENSENET = {"growth_rate": 8, "block_config": (2, 2, 2, 2)}


def without_stages():
    plain = timm.create_model("densenet121", **SMALL_DENSENET)
    plain.feature_info = []
    return plain


@pytest.mark.parametrize(
    ("make", "attention", "message"),
    [
        (lambda: timm.create_model("seresnet50"), regard.CBAM, "attention already: SEModule"),
        (lambda: regard.create_model("cbam_resnet18"), regard.CBAM, "attention already: CBAM"),
        (lambda: regard.graft(trained()), regard.SE, "attention already: CBAM"),
        (
            without_stages,
            regard.CBAM,
            "no residual branches in DenseNet, as nothing is added to a map, nor stages",
        ),
        (lambda: nn.Linear(2, 2), regard.CBAM, "takes a timm network, not Linear"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32),
            regard.CBAM,
            r"branch 1 of VisionTransformer \(blocks\.0\.attn\.proj\) ends in \(2, 5, 192\)",
        ),
        (trained, lambda channels: nn.Identity(), "give CBAM, SE or a partial of CBAM"),
    ],
    ids=["seresnet", "cbam", "twice", "densenet", "linear", "vit", "identity"],
)
def test_what_can_not_be_grafted_is_refused_in_one_line(make, attention, message):
    model = make()
    with pytest.raises(ValueError, match=message) as caught:
        regard.graft(model, attention)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cbam", "se"])
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_grafted_network_is_saved_under_its_own_name(tmp_path, name, kind):
    plain = trained(name)
    grafted = regard.graft(plain, ATTENTION[kind])
    regard.save_model(grafted, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert config["architecture"] == regard.twins(name)[kind] == f"{kind}_{name}"
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert again.num_classes == 5
    assert_same_answers(plain, again, images())


PRETRAINED = """
import json, sys, timm, torch, regard

def failure(name, **arguments):
    try:
        regard.create_model(name, pretrained_plain=True, **arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]

x = torch.load(sys.argv[1], weights_only=True)
answers = {"absent": failure("cbam_resnet34"), "wrong": failure("cbam_resnet50")}
for name in ("cbam_resnet18", "se_resnet18"):
    model = regard.create_model(name, pretrained_plain=True).eval()
    with torch.no_grad():
        answers[name] = model(x)
    answers[name + " cfg"] = [model.pretrained_cfg[k] for k in ("architecture", "interpolation")]
few = regard.create_model("cbam_resnet18", pretrained_plain=True, num_classes=3, in_chans=1)
answers["few"] = few.eval().forward_features(x.mean(dim=1, keepdim=True)).detach()
regard.save_model(few, sys.argv[3])
again = timm.create_model("local-dir:" + sys.argv[3], pretrained=True).eval()
answers["again"] = torch.equal(again(x[:, :1]), few(x[:, :1]))
answers["cifar"] = failure("cbam_resnet18", stem="cifar")
answers["features"] = failure("cbam_resnet18", features_only=True)
torch.save(answers, sys.argv[2])
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What a process answers that has no network, and in its hub's cache resnet18's weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    plain = trained(num_classes=1000)
    for name in ("resnet18", "resnet50"):  # resnet50's file is not resnet50's weights
        hub_id = timm.get_pretrained_cfg(name).hf_hub_id
        repository = folder / "hub" / ("models--" + hub_id.replace("/", "--"))
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        save_file(plain.state_dict(), snapshot / "model.safetensors")
    torch.save(images(), folder / "x.pt")
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", PRETRAINED, *(str(folder / n) for n in ("x.pt", "out.pt", "few"))],
        env=os.environ | hub | {"TORCH_HOME": str(folder / "torch")},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return plain, torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize(("case", "name"), [("absent", "resnet34"), ("wrong", "resnet50")])
def test_without_pretrained_weights_one_line_says_so(pretrained, case, name):
    kind, message = pretrained[1][case]
    assert kind == "FileError"
    start = f"timm's pretrained weights of {name} can't be loaded: "
    assert message.startswith(start)
    assert "\n" not in message
    assert len(message) > len(start) + 10


@torch.no_grad()
def test_over_pretrained_weights_the_answer_is_the_plain_networks(pretrained):
    plain, answers = pretrained
    for name in ("cbam_resnet18", "se_resnet18"):
        assert torch.equal(answers[name], plain(images()))
        interpolation = plain.pretrained_cfg["interpolation"]
        assert answers[f"{name} cfg"] == [name, interpolation] == [name, "bicubic"]


@torch.no_grad()
def test_pretrained_weights_fit_other_classes_and_channels(pretrained):
    plain, answers = pretrained
    gray = images().mean(dim=1, keepdim=True)
    # timm sums the first convolution over its channels for one channel
    wanted = plain.forward_features(gray.expand(-1, 3, -1, -1))
    assert torch.allclose(answers["few"], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())
    assert answers["again"], "the folder of such a network loads without fetching weights again"


def test_pretrained_weights_do_not_fit_other_stems(pretrained):
    for case in ("cifar", "features"):
        kind, message = pretrained[1][case]
        assert kind == "UsageError"
        assert "timm's weights only fit the complete ImageNet network" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "attention", [partial(regard.CBAM, order="spatial", kernel_size=3), regard.SE]
)
@torch.no_grad()
def test_a_grafted_partial_is_saved_with_its_arguments(tmp_path, attention):
    plain = timm.create_model("resnet18", num_classes=5).eval()
    regard.save_model(regard.graft(plain, attention), tmp_path / "grafted")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'grafted'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), plain(x))


# network, arguments that make it small, and the branches of two or three blocks, or the stages
FAMILIES = {
    "resnet26d": ({"layers": (1, 1, 1, 1)}, 4),  # no twin by name
    "resnet18": ({"norm_layer": "groupnorm"}, 8),
    "res2net50_26w_4s": ({"layers": (1, 2, 1, 1)}, 5),
    "skresnet18": ({"layers": (1, 1, 1, 1)}, 4),
    "resnest14d": ({}, 4),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 4),  # layer scale, not a norm, ends a branch
    "convnextv2_atto": ({"depths": (1, 1, 1, 1)}, 4),  # GRN adds within itself
    "mobilenetv2_035": ({}, 10),
    "densenet121": (SMALL_DENSENET, 5),  # nothing is added: its stages
    "selecsls42": ({}, 6),  # its blocks give lists
    "dpn68": ({"k_sec": (1, 1, 1, 1)}, 5),  # timm looks up its first convolution by name
    "sononet8": ({"in_chans": 3}, 5),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_networks_answer_bit_for_bit_and_are_saved(tmp_path, name):
    arguments, branches = FAMILIES[name]
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=3, **arguments).eval()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(m.weight, 0.8, 0.6)
            nn.init.normal_(m.bias, 0.0, 0.5)
    grafted = regard.graft(plain, regard.CBAM)
    assert len(gates(grafted)) == 2 * branches
    assert list(plain.state_dict()) == [k for k in grafted.state_dict() if k in plain.state_dict()]
    with torch.no_grad(), regard.record(grafted) as maps:
        assert torch.equal(grafted(images()), plain(images()))
    assert len(maps) == 2 * branches  # each gate was asked
    regard.save_model(grafted, tmp_path / "run")
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert_same_answers(plain, again, images())


def test_gates_of_a_stage_see_its_last_map():
    """After the ReLU that ends it, and before the pooling that follows; checkpoints pass them."""
    grafted = regard.graft(regard.create_model("sononet8", num_classes=3, convs=(2, 1, 1, 1, 1)))
    places = [name for name, m in grafted.named_modules() if isinstance(m, regard.CBAM)]
    assert places == [f"block{n}.1.2.attention" for n in range(1, 6)]
    sizes = []
    for name in places:
        gate = grafted.get_submodule(name)
        gate.register_forward_pre_hook(lambda _, x: sizes.append((x[0].shape[-1], x[0].min() >= 0)))
    x = torch.randn(4, 1, 32, 32)
    recomputed = copy.deepcopy(grafted)
    recomputed.set_grad_checkpointing()
    found = []
    for model in (grafted, recomputed):
        torch.manual_seed(0)
        model.train()(x).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert sizes[:5] == [(32, True), (16, True), (8, True), (4, True), (2, True)]
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def hidden_units(model, x):
    """Of each channel gate, by name: whether each hidden unit is above 0 for some image."""
    found = {}

    def look(name):
        return lambda _, units: found.__setitem__(name, (units[0] > 0).any(0))

    hooks = [
        m.mlp[2].register_forward_pre_hook(look(name))
        for name, m in model.named_modules()
        if isinstance(m, regard.models.cbam.ChannelGate)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("attention", ["cbam", "se"])
def test_no_gate_behind_a_relu_is_dead_from_the_start(attention):
    """A map that is never negative leaves a unit whose weights sum to less than 0 at 0 for good."""
    alone = 0
    for seed in range(8):
        torch.manual_seed(seed)
        plain = regard.create_model("sononet8", num_classes=3, convs=(1, 1, 1, 1, 1))
        grafted = regard.graft(plain, ATTENTION[attention]).train()
        units = hidden_units(grafted, torch.rand(8, 1, 32, 32))
        assert len(units) == 5
        assert all(seen.any() for seen in units.values()), units
        alone += sum(len(seen) == 1 for seen in units.values())
    assert alone == 16  # of 8 and 16 channels: half of them were dead


@pytest.mark.parametrize("plain", [trained, timm.create_model])  # timm starts with BNs of 0
def test_gates_behind_a_norm_start_as_the_authors_do(plain):
    plain = plain("resnet18")
    torch.manual_seed(0)
    grafted = regard.graft(plain)
    torch.manual_seed(0)
    for name in ("layer1.0", "layer1.1", "layer2.0"):
        expected = regard.CBAM(128 if name == "layer2.0" else 64)
        found = grafted.get_submodule(name).se
        assert torch.equal(found.channel.mlp[0].weight, expected.channel.mlp[0].weight)


def test_checkpoints_of_a_stage_that_ends_in_a_gate():
    """Gates are within the stages, so that what sets a stage up for checkpoints finds it."""
    grafted = regard.graft(timm.create_model("ese_vovnet19b_slim_dw", num_classes=3)).train()
    places = [name for name, m in grafted.named_modules() if isinstance(m, regard.CBAM)]
    assert places == ["stem.1.bn.attention"] + [
        f"stages.{n}.blocks.0.attn.attention" for n in range(4)
    ]
    calls = dict.fromkeys(places, 0)

    def count(name):
        calls[name] += 1

    for name in places:
        grafted.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name))
    grafted.set_grad_checkpointing()
    grafted(images()).sum().backward()
    assert list(calls.values()) == [1, 2, 2, 2, 2]  # forward, and again for the gradient


@torch.no_grad()
def test_a_saved_grafted_sononet_takes_other_classes(tmp_path):
    grafted = regard.graft(regard.create_model("sononet8", num_classes=3)).eval()
    regard.save_model(grafted, tmp_path / "run")
    saved = f"local-dir:{tmp_path / 'run'}"
    other = timm.create_model(saved, pretrained=True, num_classes=5).eval()
    x = torch.randn(2, 1, 32, 32)
    assert other(x).shape == (2, 5)
    assert torch.equal(other.forward_features(x), grafted.forward_features(x))


def test_vgg_has_no_gate_after_a_pooling():
    grafted = regard.graft(timm.create_model("vgg11_bn", num_classes=3, mlp_ratio=0.01))
    names = [n.rpartition(".attention")[0] for n in gates(grafted) if n.endswith("channel")]
    assert names == [f"features.{k}" for k in (2, 6, 13, 20, 27)]
    assert all(type(grafted.get_submodule(n).module) is nn.ReLU for n in names)


def test_a_gate_of_another_network_learns():
    torch.manual_seed(1)
    plain = timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1))
    nn.init.constant_(plain.stages[3].blocks[0].gamma, 1.0)
    grafted = regard.graft(plain, regard.SE).train()
    optimizer = torch.optim.SGD(grafted.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(grafted(images(2)), torch.tensor([0, 1])).backward()
        optimizer.step()
    with torch.no_grad(), regard.record(grafted) as maps:
        grafted(images())
    assert all((m.values != 0.5).any() for m in maps.values())


def test_a_block_that_passes_by_its_norm_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return x + y + 0.5 * self.bn.weight[:, None, None]

    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.pretrained_cfg = {"input_size": (3, 32, 32), "architecture": "own"}
    with pytest.raises(ValueError, match=r"does more with its modules than call them"):
        regard.graft(model)


def test_a_resnet_whose_block_never_calls_its_attention():
    class Block(timm.models.resnet.BasicBlock):
        def forward(self, x):
            y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
            return self.act2(y + (x if self.downsample is None else self.downsample(x)))

    torch.manual_seed(0)
    plain = timm.models.resnet.ResNet(Block, (1, 1, 1, 1), num_classes=3).eval()
    plain.pretrained_cfg = {"input_size": (3, 64, 64), "architecture": "own"}
    grafted = regard.graft(plain)
    assert len(gates(grafted)) == 8
    assert_same_answers(plain, grafted, images())


# ------------------------------------------------- what replaces modules, and leaves the gates
REPLACED = {
    "mobilenetv2_035": {},
    "hrnet_w18_small": {},
    "dla46_c": {},
    "res2net50_26w_4s": {"layers": (1, 1, 1, 1)},
    "efficientnet_lite0": {},
    "resnest14d": {},
}


def moved(name: str, **arguments) -> nn.Module:
    """A grafted network whose gates are anywhere but at their start, in float64."""
    torch.manual_seed(2)
    plain = timm.create_model(name, num_classes=5, **arguments)
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    grafted = regard.graft(plain)
    for module in grafted.modules():
        if isinstance(module, regard.CBAM):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.0, 0.5)
    return grafted.double().eval()


def apart(a: nn.Module, *others: nn.Module) -> float:
    """The largest difference of a network's answers from those of others, of their size."""
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = a(x)
        apart = torch.stack([(b(x) - wanted).abs().max() for b in others]).max()
        return float(apart / wanted.abs().max())


@pytest.mark.parametrize("name", REPLACED)
def test_replacing_bns_leaves_the_gates(name):
    grafted = moved(name, **REPLACED[name])
    count = len(gates(grafted))
    assert count > 0
    folded = fold_batch_norms(grafted)
    frozen = copy.deepcopy(grafted)
    timm.utils.freeze(frozen)
    synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(grafted))
    split = timm.layers.convert_splitbn_model(copy.deepcopy(grafted), 2)
    replaced = (folded, frozen, synced.eval(), split.eval())
    assert [len(gates(other)) for other in replaced] == [count] * 4
    assert apart(grafted, *replaced) < 1e-9


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("repvit_m0_9", 26), ("repghostnet_050", 16), ("efficientvit_m0", 38), ("shvit_s1", 24)],
)
def test_merging_layers_for_prediction_leaves_the_gates(name, blocks):
    grafted = moved(name).float()
    assert len(gates(grafted)) == 2 * blocks
    merged = timm.utils.reparameterize_model(grafted)
    assert len(gates(merged)) == 2 * blocks
    # a transformer's biases are of its own size
    side = 224 if name == "efficientvit_m0" else 64
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        wanted = grafted(x)
        assert (merged(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_branches_that_are_merged_for_prediction_are_none(name):
    with pytest.raises(UsageError, match="blocks merge their layers"):
        regard.graft(timm.create_model(name, num_classes=5))


def test_a_network_of_before_loads(tmp_path):
    """Gates hung on the module itself then; the names in the file are the same."""
    grafted = moved("mobilenetv2_035")
    plain = set(timm.create_model("mobilenetv2_035").state_dict())
    names = grafted.state_dict()
    assert plain <= set(names)
    assert {n for n in names if n not in plain} == {n for n in names if ".attention." in n}
    other = regard.graft(timm.create_model("mobilenetv2_035", num_classes=5)).double().eval()
    assert other.load_state_dict(names).missing_keys == []
    assert apart(grafted, other) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in names.items() if "bn3.weight" not in k})


def test_functional_call_uses_the_tensors_that_it_is_given_or_refuses_them():
    """Those that a state dict calls otherwise than named_parameters() were passed over."""
    grafted = moved("lcnet_050")
    before = {name: t.clone() for name, t in grafted.state_dict().items()}
    other = copy.deepcopy(grafted)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        given = dict(other.named_parameters())
        assert torch.equal(torch.func.functional_call(grafted, given, x), other(x))
        with pytest.raises(UsageError, match="has no weight of its own: functional_call takes"):
            torch.func.functional_call(grafted, other.state_dict(), x)
    assert all(torch.equal(t, before[name]) for name, t in grafted.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("convnext_atto", {"depths": (1, 1, 1, 1)}), ("efficientnet_lite0", {})],
)
def test_a_grafted_network_is_scripted(name, arguments):
    grafted = moved(name, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit
        scripted = torch.jit.script(grafted)
    assert apart(grafted, scripted) < 1e-9


@pytest.mark.parametrize(
    "name", ["convnext_atto", "dla46_c", "efficientnet_lite0", "hrnet_w18_small", "xception41"]
)
@torch.no_grad()
def test_a_saved_graft_has_the_features_of_its_plain_network(name, tmp_path):
    """Which levels, under a rewritten, hooked or own network of features."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).eval()
    regard.save_model(regard.graft(plain), tmp_path / "run")
    saved = f"local-dir:{tmp_path / 'run'}"
    x = torch.rand(2, 3, 64, 64)
    for wanted in ({}, {"out_indices": (0, 2)}):
        features = timm.create_model(saved, pretrained=True, features_only=True, **wanted).eval()
        with torch.device("meta"):
            of_plain = timm.create_model(name, features_only=True, **wanted).eval()
        with regard.record(features) as maps:
            found = features(x)
        indices = features.feature_info.out_indices
        whole = plain.forward_intermediates(x, indices=list(indices), intermediates_only=True)
        assert [f.shape for f in found] == [f.shape for f in of_plain(x.to("meta"))]
        assert len(found) == len(whole)
        for a, b in zip(found, whole, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
        assert features.feature_info.reduction() == of_plain.feature_info.reduction()
        assert maps


def test_each_part_stays_in_the_mode_that_it_is_in():
    plain = timm.create_model("efficientvit_m0", num_classes=5).train()
    plain.stages[0].blocks[0].dw0.m.bn.eval()  # within what the gates follow
    grafted = regard.graft(plain)
    gated = grafted.get_submodule("stages.0.blocks.0.dw0.m")
    assert gated.training
    assert gated.module.training
    assert not gated.module.bn.training
