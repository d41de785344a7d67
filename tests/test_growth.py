"""What steps, trainings, networks and errors leave behind: nothing, without a collection."""

import contextlib
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.data.images import read_image
from regard.data.preprocess import Preprocess
from regard.data.workers import worker_errors
from regard.errors import ImageError, NotFiniteError, ResourceError, UsageError
from regard.machine import memory_errors
from regard.models import fused_torch
from regard.models.fused import fused_at_every_size, set_fused
from regard.predict import Classifier
from regard.training.distributed import lost_processes, on_main, start_accelerator
from regard.training.feed import _by_thread
from regard.training.loop import Trainer

UNIT = Preprocess((1, 16, 16), (0.5,), (0.25,))


@pytest.fixture
def without_collection():
    """What lives on only until a collection is alive: on a GPU nothing asks for one in time."""
    gc.collect()
    gc.freeze()  # what is here before need not be looked at
    gc.disable()
    yield
    gc.enable()


def alive(*kinds: type) -> int:
    """Objects of these kinds that Python knows of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is looked at may be deprecated
        return sum(isinstance(each, kinds) for each in gc.get_objects())


def network(name: str) -> nn.Module:
    model = regard.create_model(name, num_classes=3).to(memory_format=torch.channels_last)
    set_fused(model)
    return model.train()


def after_steps(
    model: nn.Module, backward: Callable[[Tensor], object], precision: str = "fp32"
) -> list[int]:
    """The tensors that are alive after each of four steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.pretrained_cfg["input_size"][0], 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    counts = []
    for _ in range(4):
        with fused_at_every_size(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            outputs = model(images)
        backward(regard.multi_head_cross_entropy(outputs.float(), torch.tensor([0, 1])))
        model.zero_grad(set_to_none=True)
        del outputs
        counts.append(alive(Tensor))
    return counts


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["cbam_resnet18", "se_resnet18", "cbam_mobilenet_070", "attention56_cifar", "ag_sononet8"],
)
def test_no_step_leaves_tensors_behind(name, precision):
    counts = after_steps(network(name), lambda loss: loss.backward(), precision)
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_no_step_of_gates_on_a_frozen_network_leaves_tensors_behind():
    model = network("cbam_resnet18")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".se." in name or "fc" in name)
    counts = after_steps(model, lambda loss: loss.backward())
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_a_backward_pass_for_one_gate_leaves_no_graph_behind():
    model = network("cbam_resnet18")
    gate = [*model.layer4[1].se.parameters()]
    counts = after_steps(model, lambda loss: torch.autograd.grad(loss, gate))
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.usefixtures("without_collection")
def test_a_backward_pass_that_runs_out_of_memory_leaves_no_graph_behind(monkeypatch):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def backward(loss: Tensor) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()

    monkeypatch.setattr(fused_torch, "input_backward", run_out)
    counts = after_steps(network("cbam_resnet18"), backward)
    assert counts[1] == counts[2] == counts[3]


# ------------------------------------------------------------------------- trainings, networks
@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("changes", [{"memory": "no", "workers": 1}, {"lr": 1e30}], ids=str)
def test_a_training_that_ended_leaves_no_network_behind(scans, tmp_path, changes):
    before = alive(nn.Module, Trainer)
    try:
        regard.train(
            scans, model="ag_sononet8", out=tmp_path / "run", size=16, epochs=0.3, batch_size=32,
            flip=0, faithfulness_images=0, device="cpu", trackers=["none"], **changes,
        )  # fmt: skip
    except NotFiniteError:
        assert "lr" in changes
    assert alive(nn.Module, Trainer) == before


@pytest.mark.usefixtures("without_collection")
def test_an_error_that_replaces_another_leaves_none_of_its_frames_behind():
    """With contextlib.contextmanager it would, since Python 3.12."""

    def run_out(model: nn.Module) -> None:
        with memory_errors("this", "lower size"), worker_errors(), lost_processes(2):
            raise torch.OutOfMemoryError(f"{type(model)}: out of memory")

    before = alive(nn.Linear, BaseException)
    with pytest.raises(ResourceError, match="this ran out of GPU memory: lower size") as caught:
        run_out(nn.Linear(1, 1))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    del caught
    assert alive(nn.Linear, BaseException) == before


@pytest.mark.usefixtures("without_collection")
def test_a_classifier_goes_with_its_last_name():
    model = regard.create_model("ag_sononet8", num_classes=2)
    classifier, alone = (
        Classifier(model, ["a", "b"], UNIT),
        weakref.ref(model),
    )
    assert list(classifier.members) == [classifier]
    del classifier, model
    assert alone() is None


# -------------------------------------------------------------------------------------- errors
class Held(io.BytesIO):
    """What a frame holds, which an error's traceback holds."""


@pytest.mark.usefixtures("without_collection")
def test_an_image_that_cannot_be_read_is_not_kept():
    source = Held(b"no image")
    alone = weakref.ref(source)
    with contextlib.suppress(ImageError):
        read_image(source)
    del source
    assert alone() is None


@pytest.mark.usefixtures("without_collection")
def test_an_error_that_all_processes_are_told_keeps_nothing():
    accelerator = start_accelerator("cpu")

    def refuse() -> None:
        raise UsageError("no")

    def work() -> None:
        mine = Held()
        found.append(weakref.ref(mine))
        on_main(accelerator, refuse)

    found: list[weakref.ref[Held]] = []
    with contextlib.suppress(UsageError):
        work()
    assert found[0]() is None


@pytest.mark.usefixtures("without_collection")
def test_an_error_of_the_thread_that_feeds_keeps_nothing():
    def source() -> Iterator[int]:
        yield 1
        raise ValueError

    def work() -> None:
        mine = Held()
        found.append(weakref.ref(mine))
        list(_by_thread(source(), int, torch.device("cpu")))

    found: list[weakref.ref[Held]] = []
    with contextlib.suppress(ValueError):
        work()
    assert found[0]() is None
