"""The fused end of CBAM's ResNet blocks: the modules' numbers, and only in training."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.errors import UsageError
from regard.models import fused, fused_torch
from regard.models.cbam import CBAM
from regard.models.fused import FusedBasicBlock, FusedBottleneck, fused_end, set_fused
from regard.training import build

LAST = torch.channels_last
CPU = torch.device("cpu")


def end_of_a_block(channels: int, dtype: torch.dtype, *, zero: bool = False):
    """BN and CBAM with weights of both signs."""
    torch.manual_seed(0)
    norm, gates = nn.BatchNorm2d(channels, dtype=dtype), CBAM(channels, reduction=4, dtype=dtype)
    for each in (norm, gates.spatial.bn):
        nn.init.normal_(each.weight)
        nn.init.normal_(each.bias)
    if zero:
        nn.init.zeros_(norm.weight)
    return norm, gates


def step(norm, gates, y, k, t, passes=None):
    """Output, gradients and running statistics of a block's end; passes: None for the modules."""
    norm, gates = copy.deepcopy(norm), copy.deepcopy(gates)
    y, k = (x.clone(memory_format=LAST).requires_grad_() for x in (y, k))
    modules = passes is None
    out = torch.relu(gates(norm(y)) + k) if modules else fused_end(y, k, norm, gates, passes)
    out.backward(t.to(out.dtype))
    gradients = [p.grad for p in (*norm.parameters(), *gates.parameters())]
    return [out.detach(), y.grad, k.grad, *gradients, *norm.buffers(), *gates.buffers()]


def apart(found, expected) -> float:
    """The largest distance of two steps' tensors, relative to their norms."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def maps(shape, dtype):
    """A block's map, whose mean is far from 0, its shortcut and the output's gradient."""
    return torch.randn(shape, dtype=dtype) + 7, torch.randn(shape, dtype=dtype), torch.randn(shape)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("chunk", [2**18, 500])  # whole images; parts of one
def test_output_gradients_and_statistics_are_the_modules_in_float64(zero, chunk, monkeypatch):
    monkeypatch.setattr(fused_torch, "CHUNK", chunk)
    norm, gates = end_of_a_block(32, torch.float64, zero=zero)
    y, k, t = maps((5, 32, 7, 6), torch.float64)
    expected = step(norm, gates, y, k, t)
    assert apart(step(norm, gates, y, k, t, fused_torch), expected) < 1e-12


def test_equal_largest_values_share_the_gradient_as_amax_has_it():
    norm, gates = end_of_a_block(8, torch.float64)
    y, k, t = maps((3, 8, 6, 6), torch.float64)
    y = y.mul(2).round().div(2)  # most values are there several times
    expected = step(norm, gates, y, k, t)
    assert apart(step(norm, gates, y, k, t, fused_torch), expected) < 1e-12


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("of_gates", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_map", [torch.float32, torch.bfloat16])
def test_what_a_call_shares_is_freed_with_its_graph(of_map, of_gates, backward):
    """A gate kept as it is belongs to the graph, whose nodes keep it: memory grew by each step."""
    norm, gates = end_of_a_block(8, torch.float32)
    gates = gates.to(of_gates)
    for module in (gates.channel.mlp, gates.spatial.conv):  # as autocast converts what they take
        module.register_forward_pre_hook(lambda _, x: x[0].to(of_gates))
    y, k, _ = maps((2, 8, 5, 4), of_map)
    y = y.contiguous(memory_format=LAST).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is looked at may be deprecated
        gc.collect()
        gc.freeze()  # what is here before need not be looked at
        out = fused_end(y, k.contiguous(memory_format=LAST), norm, gates, fused_torch)
        assert sum(type(each) is fused._Shared for each in gc.get_objects()) == 1
        if backward:
            out.float().sum().backward()
        del out
        gc.collect()
        assert not any(type(each) is fused._Shared for each in gc.get_objects())


def test_a_mean_far_from_zero_costs_no_digits_of_the_deviation():
    norm, gates = end_of_a_block(8, torch.float32)
    y, k, t = maps((4, 8, 16, 16), torch.float32)
    wide = [m.double() for m in (copy.deepcopy(norm), copy.deepcopy(gates))]
    y = y + 300
    expected = step(*wide, y.double(), k.double(), t)
    assert apart(step(norm, gates, y, k, t, fused_torch), expected) < 1e-4


def test_in_bf16_it_is_nearer_to_float64_than_the_modules_are():
    norm, gates = end_of_a_block(64, torch.float32)
    y, k, t = (x.bfloat16() for x in maps((4, 64, 20, 20), torch.float32))
    wide = [m.double() for m in (copy.deepcopy(norm), copy.deepcopy(gates))]
    expected = step(*wide, y.double(), k.double(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        modules = step(norm, gates, y, k, t)
        found = step(norm, gates, y, k, t, fused_torch)
    for a, b, c in zip(found[:3], modules[:3], expected[:3], strict=True):
        assert apart([a], [c]) < 0.03
        assert apart([a], [c]) <= apart([b], [c])


def backward_twice(passes, dtype):
    """Gradients are added up, as for modules."""
    norm, gates = end_of_a_block(16, dtype)
    y, k, t = (x.contiguous(memory_format=LAST) for x in maps((2, 16, 5, 4), dtype))
    out = fused_end(y.requires_grad_(), k, norm, gates, passes)
    out.backward(t.to(dtype), retain_graph=True)
    once = [p.grad.clone() for p in (y, *norm.parameters(), *gates.parameters())]
    out.backward(t.to(dtype))
    for p, one in zip((y, *norm.parameters(), *gates.parameters()), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * one)


def test_a_graph_that_is_kept_gives_its_gradients_again():
    backward_twice(fused_torch, torch.float64)


def make_channels_equal(norm, gates):
    """All channels have a position's largest z, as they may in a network that starts neutral."""
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, 0.5)
    nn.init.zeros_(gates.channel.mlp[2].weight)
    nn.init.zeros_(gates.channel.mlp[2].bias)


def test_where_all_channels_are_the_largest_they_share_the_gradient():
    norm, gates = end_of_a_block(24, torch.float64)
    make_channels_equal(norm, gates)
    y, k, t = maps((3, 24, 6, 6), torch.float64)
    expected = step(norm, gates, y, k, t)
    assert apart(step(norm, gates, y, k, t, fused_torch), expected) < 1e-12


PARTS = ("y", "k", "norm", "channel", "spatial")


@pytest.mark.parametrize(
    "learning", [("y",), ("k",), ("norm",), ("channel",), ("spatial",), ("y", "channel"), PARTS]
)
def test_parts_that_are_frozen_change_no_other_gradient(learning):
    norm, gates = end_of_a_block(16, torch.float64)
    maps_ = dict(zip("ykt", maps((3, 16, 5, 6), torch.float64), strict=True))
    modules = {"norm": norm, "channel": gates.channel, "spatial": gates.spatial}
    leaves = [
        leaf for part in learning
        for leaf in (modules[part].parameters() if part in modules else [maps_[part]])
    ]  # fmt: skip
    for module in modules.values():
        module.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_()
    y, k = (maps_[name].to(memory_format=LAST) for name in "yk")
    found = torch.autograd.grad(fused_end(y, k, norm, gates, fused_torch), leaves, maps_["t"])
    expected = torch.autograd.grad(torch.relu(gates(norm(y)) + k), leaves, maps_["t"])
    assert apart(found, expected) < 1e-12


class Asked(TorchDispatchMode):
    """Counts the operators that compute something, outside of the passes over the map."""

    FREE = ("detach", "_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.count += not (self.inside or operator.is_view or name in self.FREE)
        return operator(*args, **(kwargs or {}))


class UncountedPasses:
    """The passes over the map, whose own operators are none of what is `Asked` for."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __getattr__(self, name):
        def run_pass(*arguments):
            self.asked.inside = True
            try:
                return getattr(fused_torch, name)(*arguments)
            finally:
                self.asked.inside = False

        return run_pass


def test_little_is_asked_for_between_the_passes():
    """On a GPU each is a kernel of microseconds, whatever it computes: there were 147, then 84."""
    norm, gates = end_of_a_block(32, torch.float32)
    y, k, t = (x.bfloat16().to(memory_format=LAST) for x in maps((4, 32, 8, 8), torch.float32))
    y.requires_grad_(), k.requires_grad_()
    with Asked() as asked:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            out = fused_end(y, k, norm, gates, UncountedPasses(asked))
        out.backward(t)
    assert y.grad is not None
    assert asked.count <= 46


# ------------------------------------------------------------------------------- networks
@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setitem(fused.LEAST, "cpu", 0)


def network(name: str = "cbam_resnet18", **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = regard.create_model(name, num_classes=3, layers=(1, 1, 1, 1), **arguments)
    return model.to(memory_format=LAST)


def gradients_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def pictures(dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 64, 64, dtype=dtype, generator=generator).contiguous(memory_format=LAST)


class Calls:
    """Counts the calls of `fused_end`."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        monkeypatch.setattr(fused, "fused_end", self)

    def __call__(self, *arguments):
        self.count += 1
        return fused_end(*arguments)


@pytest.mark.parametrize("name", ["cbam_resnet18", "cbam_resnet50"])
def test_a_network_has_the_same_step_names_and_copies(name, monkeypatch):
    calls = Calls(monkeypatch)
    plain = network(name).double()
    model = copy.deepcopy(plain)
    assert set_fused(model) == 4
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, found = gradients_of(plain, pictures()), gradients_of(model, pictures())
    assert calls.count == 4
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9)
    for a, b in zip(plain.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    again = pickle.loads(pickle.dumps(model))
    gradients_of(copy.deepcopy(again), pictures())
    assert calls.count == 8
    set_fused(model, False)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}


def test_it_is_off_in_evaluation_under_hooks_and_in_other_orders(monkeypatch):
    calls = Calls(monkeypatch)
    model, x = network(), pictures(torch.float32)
    set_fused(model)
    with regard.record(model) as found:
        model(x)
    assert (len(found), calls.count) == (8, 0)
    hook = model.layer1[0].bn2.register_forward_hook(lambda *_: None)
    model(x)
    assert calls.count == 3
    hook.remove()
    model.eval()(x)
    assert calls.count == 3
    model.train()(x.contiguous())
    assert calls.count == 7  # the first convolution's weights make the map channels_last
    model.layer1[0].se.eval()
    model(x)
    assert calls.count == 10
    for order in ("spatial_channel", "parallel", "channel", "spatial"):
        assert set_fused(network(order=order)) == 0
    assert set_fused(network(channel_pool="avg")) == 0
    assert set_fused(network(spatial_pool="conv")) == 0
    assert set_fused(network("se_resnet18")) == 0
    assert set_fused(network(drop_path_rate=0.1)) == 1  # the first block drops nothing


def test_traced_scripted_exported_and_compiled_networks_are_the_modules(monkeypatch):
    calls = Calls(monkeypatch)
    model, x = network(), pictures(torch.float32)
    set_fused(model)
    torch.fx.symbolic_trace(model)
    torch.export.export(model, (x,))
    torch.compile(model, backend="eager")(x)
    model.eval()
    expected = model(x)
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # torch.jit is deprecated, by its release
            warnings.simplefilter("ignore", kind)
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected)
    assert calls.count == 0
    # scripting leaves plain blocks with the same weights in the network; it can be fused again
    assert set_fused(model.train()) == 4
    torch.testing.assert_close(model.eval()(x), expected)


def test_small_maps_and_other_layouts_are_the_modules_own(monkeypatch):
    calls = Calls(monkeypatch)
    model = network()
    set_fused(model)
    model.to(memory_format=torch.contiguous_format)(pictures(torch.float32).contiguous())
    monkeypatch.setitem(fused.LEAST, "cpu", 2**15)
    model.to(memory_format=LAST)(pictures(torch.float32))
    assert calls.count == 1  # only the first stage's map, (2, 64, 16, 16), has as many values


def test_what_a_step_holds_for_the_backward_pass_is_less():
    def held(model) -> int:
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pictures(torch.float32))
        return sum(storages.values())

    model = network("cbam_resnet50")
    weights = sum(p.nbytes for p in model.parameters())
    before = held(model) - weights
    set_fused(model)
    assert held(model) - weights < 0.8 * before


def test_gradient_checkpointing_gives_the_same_gradients():
    model = network().double()
    set_fused(model)
    expected = gradients_of(model, pictures())
    model.set_grad_checkpointing()
    for key, value in gradients_of(model, pictures()).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------- runs
def test_a_run_fuses_where_it_was_measured_or_on_request(monkeypatch):
    gpu = torch.device("cuda")

    def fuse(model, choice, device=CPU):
        build.fuse(model, choice, device, "this one")
        return sum(isinstance(m, FusedBasicBlock | FusedBottleneck) for m in model.modules())

    assert fuse(network(), "auto") == 4
    assert fuse(network(), "yes") == 4
    assert fuse(network(), "no") == 0
    monkeypatch.setattr(build, "can_fuse", lambda device: device.type in ("cpu", "cuda"))
    assert fuse(network(), "auto", gpu) == 4
    assert fuse(network(), "auto", torch.device("mps")) == 0
    assert fuse(network("se_resnet18"), "auto") == 0
    with pytest.raises(UsageError, match="fuse=yes: this one has no"):
        fuse(network("se_resnet18"), "yes")
    with pytest.raises(UsageError, match="fuse=yes: not available on mps"):
        fuse(network(), "yes", torch.device("mps"))


def test_bench_measures_it_and_refuses_it_where_nothing_is_trained(capsys):
    from regard.cli import run_command

    flags = ["cbam_resnet18", "--engine", "eager", "fused", "--precision", "fp32"]
    small = ["--batch-size", "2", "--size", "32", "32", "--rounds", "1"]
    assert run_command(["bench", *flags, *small, "--train"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [["cbam_resnet18", "eager"], ["cbam_resnet18", "fused"]]
    assert run_command(["bench", *flags]) == 2
    assert "only with --train" in capsys.readouterr().err


# --------------------------------------------------------------------------------- Triton
INTERPRETED = """
import torch
from regard.models import fused_torch, fused_triton
from tests.test_fused import (
    apart, backward_twice, end_of_a_block, make_channels_equal, maps, step
)
for shape, dtype, bound, programs, case in (
    ((2, 32, 7, 6), torch.float32, 1e-5, 2048, ""), ((2, 136, 3, 5), torch.float32, 1e-5, 2048, ""),
    ((1, 200, 9, 9), torch.float32, 1e-5, 1, ""),  # one span of 81 positions
    ((2, 24, 9, 9), torch.float32, 1e-5, 6, ""),  # three of 27
    ((3, 24, 6, 6), torch.float32, 1e-5, 2048, "equal values"),
    ((2, 136, 6, 6), torch.float32, 1e-5, 2048, "equal channels"),
    ((2, 32, 7, 6), torch.bfloat16, 1e-2, 2048, ""),
):
    fused_triton.PROGRAMS = programs
    norm, gates = end_of_a_block(shape[1], torch.float32)
    y, k, t = (x.to(dtype) for x in maps(shape, torch.float32))
    if case == "equal values":  # several positions of a channel have its largest
        torch.nn.init.zeros_(norm.weight[:3])
        y = y.mul(2).round().div(2)
    if case == "equal channels":
        make_channels_equal(norm, gates)
    expected = step(norm.double(), gates.double(), y.double(), k.double(), t)
    found = step(norm.float(), gates.float(), y, k, t, fused_triton)
    print(shape, dtype, case, apart(found, expected))
    assert apart(found, expected) < bound
    sums = slice(3, None)  # parameters' gradients and statistics, which stay in float32
    assert apart(found[sums], expected[sums]) < 1e-5
backward_twice(fused_triton, torch.float32)
"""


@pytest.mark.slow
def test_tritons_kernels_are_the_modules_under_its_interpreter():
    """In a process of its own, as the interpreter is chosen where kernels are defined."""
    pytest.importorskip("triton", reason="Triton comes with torch on CUDA; pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("torch.") == 7


COMPILED = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.models import fused_triton
MAPS, NUMBERS = {"y", "k", "q", "go", "out"}, {"P", "C", "S", "span", "positions"}
SIZES = {"T": fused_triton.ROWS, "B": fused_triton.COLUMNS, "SP": 8}
TILES = {"T": fused_triton.TILE, "B": fused_triton.BLOCK}
ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
by_tiles = {"_pooled": fused_triton.POOLED_TILE, "_output": 0, "_input_backward": 0}
kernels = ["_statistics", "_moments", *by_tiles, "_output_backward", "_pooled_backward",
           "_gate_backward", "_by_norm", "_by_statistics"]
for name in kernels:
    kernel, signature, constants = getattr(fused_triton, name), {}, {}
    sizes = {**TILES, "T": by_tiles[name] or fused_triton.TILE} if name in by_tiles else SIZES
    for word in kernel.arg_names:
        constant = word in sizes
        of_maps = word in MAPS and not (name == "_pooled" and word == "out")
        signature[word] = ("constexpr" if constant else "i32" if word in NUMBERS else
                           "fp32" if word == "eps" else "map" if of_maps else "*fp32")
        if constant:
            constants[word] = sizes[word]
    whole = {(k,): [["tt.divisibility", 16]] for k, word in enumerate(kernel.arg_names)
             if signature[word] in ("map", "*fp32") or word == "C"}
    for maps, generation in (("*bf16", 80), ("*bf16", 90), ("*fp32", 90)):
        typed = {word: maps if kind == "map" else kind for word, kind in signature.items()}
        source = ASTSource(kernel, typed, constants, whole)
        compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32),
                                  options={"num_warps": fused_triton.WARPS})
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder, "kernel.ptx")
            ptx.write_text(compiled.asm["ptx"])
            target = f"sm_{generation}" + "a" * (generation == 90)
            done = subprocess.run([ptxas, "-v", f"--gpu-name={target}", ptx, "-o", f"{ptx}.cubin"],
                                  capture_output=True, text=True, check=True)
        spilled = re.search(r"(\\d+) bytes spill stores", done.stderr)
        print(name, maps, target, spilled[0])
        assert spilled[1] == "0", done.stderr
"""


@pytest.mark.slow
def test_tritons_kernels_compile_for_gpus_and_fit_their_registers(tmp_path):
    """Without a GPU: the compiler that comes with Triton, for the A100's and H100's generation."""
    pytest.importorskip("triton", reason="Triton comes with torch on CUDA; pip install triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 bytes spill stores") == 30
