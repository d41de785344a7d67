"""Engines answer as eager fp32 does, and `auto` takes the one that measuring favors."""

import functools
import gc
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

import regard
from regard.data.preprocess import Preprocess
from regard.engines import (
    ENGINES,
    TOLERANCES,
    Deployed,
    fold_batch_norms,
    open_engine,
)
from regard.engines.backends import Compiled, Eager
from regard.evaluation.familiarity import fit_familiarity
from regard.machine import has_bf16
from regard.predict import Classifier

pytestmark = pytest.mark.native

NETWORKS = ["ag_sononet8", "attention56_cifar", "cbam_resnet18"]
INPUTS = {
    "ag_sononet8": ((1, 32, 40), "image"),
    "attention56_cifar": ((3, 32, 32), "fixed"),
    "cbam_resnet18": ((3, 40, 32), "fixed"),
    "sononet8": ((1, 32, 40), "image"),
}
# one block a stage: converting takes as long as there are layers
SHORT = {"cbam_resnet18": {"layers": (1, 1, 1, 1)}}
QUICK = [("eager", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]


def lively(
    name: str, classes: int = 5, channels: int | None = None, **arguments: object
) -> nn.Module:
    """A network whose BNs are not the identity and whose gates are not one half."""
    torch.manual_seed(0)
    arguments = {**SHORT.get(name, {}), **arguments}
    channels = channels or INPUTS[name][0][0]
    model = regard.create_model(name, num_classes=classes, in_chans=channels, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def classifier(name: str, **arguments: object) -> Classifier:
    size, standardize = INPUTS[name]
    values = (0.5,) * size[0], (0.25,) * size[0]
    preprocess = Preprocess(size, *values, normalization=standardize)
    return Classifier(lively(name, **arguments), list("abcde"), preprocess)


def some_images(name: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, *INPUTS[name][0])
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_leaves_the_function_and_the_original_as_they_were(name):
    model = lively(name).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    had = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # pre-activation units begin with a BN of their own, every other BN follows a convolution
    assert len(left) < len(had)
    assert name == "attention56_cifar" or left == []
    x = torch.randn(2, *INPUTS[name][0], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=1e-9, atol=1e-9)


class Shared(nn.Module):
    """Convolutions whose output is needed without their BN as well, or that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = self.bn(y) + y
        return self.after(self.twice(y)) + self.twice(x)


def test_a_convolution_that_is_needed_by_itself_is_left_alone():
    torch.manual_seed(0)
    model = Shared().eval()
    for bn in (model.bn, model.after):
        nn.init.uniform_(bn.running_var, 2, 3)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(fold_batch_norms(model)(x), model(x))


@pytest.mark.parametrize(("engine", "precision"), QUICK)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if "cifar" in n else n for n in NETWORKS],
)
def test_answers_are_those_of_the_network(name, engine, precision):
    if precision == "bf16" and not has_bf16():
        pytest.skip("this machine has no bf16")
    found = classifier(name)
    images = some_images(name, 11)
    expected = found.probabilities(images)
    ready = ENGINES[engine](found.model, found.preprocess, (2, 4), precision)
    for count in (1, 2, 3, 11):  # filled up, exact, filled up, in parts
        answer = ready(images[:count])
        assert answer.shape == (count, 5)
        assert answer.dtype == torch.float32
        assert (answer - expected[:count]).abs().max() <= TOLERANCES[precision]
    assert torch.equal(ready(images.float()), ready(images))


def pale_images(count: int = 8) -> torch.Tensor:
    """(count, 1, 32, 40): waves of 2 gray levels around 200, as floats and as whole numbers."""
    rows, columns = torch.arange(32.0)[:, None], torch.arange(40.0)
    waves = [torch.sin(rows * k / 9) * torch.cos(columns * (k % 3 + 1) / 7) for k in range(count)]
    images = 200.3 + torch.stack(waves)[:, None]
    images[1::2] = images[1::2].round()
    return images


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_bf16_leaves_an_image_of_few_gray_levels_its_answer(engine):
    if not has_bf16():
        pytest.skip("this machine has no bf16")
    found, images = classifier("ag_sononet8"), pale_images()
    ready = ENGINES[engine](found.model, found.preprocess, (8,), "bf16")
    # this network's answers move little: 0.03 where the mean was rounded
    assert (ready(images) - found.probabilities(images)).abs().max() < 0.006
    assert torch.equal(found.preprocess.without_normalization().normalize(images), images)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's, torch 2.11
def test_the_compiled_network_answers_the_same():
    found = classifier("ag_sononet8")
    images = some_images("ag_sononet8", 5)
    counters["inductor"].clear()
    ready = ENGINES["compiled"](found.model, found.preprocess, (4,), "fp32")
    # which it only can where the weights are frozen into the graph
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > 10
    made = counters["stats"]["unique_graphs"]
    assert (ready(images) - found.probabilities(images)).abs().max() <= TOLERANCES["fp32"]
    assert counters["stats"]["unique_graphs"] == made  # no call compiles again


def test_a_network_of_timms_own_is_taken_too():
    model = timm.create_model("resnet10t", num_classes=3).eval()
    found = Classifier(model, list("abc"), Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    images = some_images("attention56_cifar", 3)
    ready = ENGINES["openvino"](model, found.preprocess, (3,), "fp32")
    assert (ready(images) - found.probabilities(images)).abs().max() <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    "engine",
    ["eager", pytest.param("compiled", marks=pytest.mark.slow), "onnxruntime", "openvino"],
)
def test_an_engine_gives_the_features_that_tell_unlike_images(engine):
    """Three heads' inputs of AG-SonoNet, in one pass, whole and filled-up batches alike."""
    found = classifier("ag_sononet8")
    images = some_images("ag_sononet8", 5).float()
    expected, appearance = found.features(images)
    rng = np.random.default_rng(0)
    training = [np.repeat(f, 10, 0) + rng.normal(0, 0.1, (50, f.shape[1])).astype(np.float32)
                for f in (expected, appearance)]  # fmt: skip
    found.familiarity = fit_familiarity(training, np.repeat(np.arange(5), 10), training)
    plain, distances = found.with_distances(images)
    ready = ENGINES[engine](found.model, found.preprocess, (4,), "fp32", features=True)
    assert not found.model.get_classifier()[0]._forward_pre_hooks  # its own copy has them
    probabilities, features = ready.with_features(images)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(ready(images), probabilities)
    found.engine = ready
    answers, far = found.with_distances(images)
    assert (answers - plain).abs().max() <= TOLERANCES["fp32"]
    assert far == pytest.approx(distances, rel=1e-2)
    views = torch.stack([images, images.flip(-1)], dim=1)
    found.engine = None
    of_both = found.with_distances(views)[1]
    found.engine = ready
    assert found.with_distances(views)[1] == pytest.approx(of_both, rel=1e-2)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_threads_have_each_their_own_answers(engine):
    found = classifier("ag_sononet8")
    ready = ENGINES[engine](found.model, found.preprocess, (1,), "fp32", features=True)
    images = some_images("ag_sononet8", 6).split(1)
    expected = [ready.with_features(x) for x in images]

    def agrees(k: int) -> bool:
        pairs = zip(ready.with_features(images[k % 6]), expected[k % 6], strict=True)
        return all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(agrees, range(48)))
    finally:
        sys.setswitchinterval(interval)


def test_maps_leave_no_hook_on_the_network():
    found = classifier("ag_sononet8")
    deployed = Deployed(found.model, found.preprocess, ["gate3.map"])
    probabilities, shown = deployed(some_images("ag_sononet8", 2).float())
    assert probabilities.shape == (2, 5)
    assert shown.shape[0] == 2
    assert all(not m._forward_hooks for m in found.model.modules())


def test_wrong_names_are_one_line():
    found = classifier("ag_sononet8")
    with pytest.raises(ValueError, match="engine 'warp': choose auto, eager, compiled, onnx"):
        open_engine(found, "warp")
    with pytest.raises(ValueError, match="precision 'fp8': choose auto, fp32, bf16"):
        open_engine(found, "eager", precision="fp8")
    with pytest.raises(ValueError, match="computes in fp32"):
        ENGINES["onnxruntime"](found.model, found.preprocess, (1,), "bf16")


def test_what_is_not_installed_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None)
    found = classifier("ag_sononet8")
    with pytest.raises(ValueError, match=r"pip install 'regard\[openvino\]'"):
        ENGINES["openvino"](found.model, found.preprocess)


def test_a_missing_engine_ends_the_command_before_torch_is_imported():
    code = (
        "import sys, regard.extras, regard.cli\n"
        "regard.extras.find_spec = lambda name: None\n"
        "for arguments in ('predict r i --engine onnxruntime', 'evaluate r --engine openvino',\n"
        "                  'serve r', 'export r --to onnx --out a.onnx', 'train hf:x',\n"
        "                  'data hf:x', 'evaluate r hf:x', 'train digits --log wandb'):\n"
        "    assert regard.cli.run_command(arguments.split()) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extras = re.findall(r"pip install 'regard\[(\w+)\]'", done.stderr)
    assert extras == ["onnxruntime", "openvino", "serve", "onnxruntime", "hf", "hf", "hf", "wandb"]


def test_the_libraries_complaints_are_not_shown():
    code = (
        "import logging, regard.log; regard.log.show_messages(force=True)\n"
        "logging.getLogger('torch.utils.cpp_extension').warning('No CUDA runtime is found')\n"
        "logging.getLogger('matplotlib').warning('created a temporary cache directory')\n"
        "logging.getLogger('matplotlib.font_manager').warning('building the font cache')\n"
        "logging.getLogger('regard.x').warning('ours')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "regard: ours\n"


def test_as_many_networks_as_one_likes_are_compiled(monkeypatch):
    compiled = []

    def note(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    preprocess = Preprocess((1, 4, 4), (0.5,), (0.25,))
    for _ in range(10):  # dynamo's limit for one code object is 8
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
        answer = Compiled(model, preprocess, (2,))(torch.ones(2, 1, 4, 4))
        expected = Eager(model, preprocess, (2,))(torch.ones(2, 1, 4, 4))
        torch.testing.assert_close(answer, expected)
    assert len(compiled) == 10


def test_the_eager_engine_goes_with_its_last_name():
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(each) is nn.Conv2d for each in gc.get_objects())
        engine = Eager(model, Preprocess((1, 16, 16), (0.5,), (0.25,)), (2,), features=True)
        assert engine.gives_features
        del engine
        assert sum(type(each) is nn.Conv2d for each in gc.get_objects()) == before
    finally:
        gc.enable()
