"""The training loop: one loss a step however it is divided, and what the metrics say."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import regard
from regard.data.augment import random_numbers
from regard.data.loading import Batch, SampleOrder
from regard.data.preprocess import Preprocess
from regard.errors import NotFiniteError, UsageError
from regard.predict import Classifier
from regard.training import run
from regard.training.config import Recipe
from regard.training.loop import Trainer
from regard.training.self_adaptive import SelfAdaptiveTargets
from regard.training.steps import SMALLEST, StepPlan
from regard.training.trial import trial
from regard.training.update import Updater

COUNT, CLASSES = 24, 3
CLASS_WEIGHTS = (0.2, 1.0, 3.0)


class Noise:
    """A source of the same 24 images in order, again and again."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(256, (COUNT, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.order = SampleOrder(COUNT, 0)

    def batches(self, spans):
        for start, count in spans:
            rows = torch.arange(start, start + count) % COUNT
            yield Batch(self.images[rows], rows, random_numbers(0, start, count))


class Heads(nn.Module):
    """Without batch norm; three heads in training, the prediction's first, as deep_sup has."""

    head_weights = (1.0, 0.1, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).view(-1, 3, CLASSES)

    def join_heads(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


def trainer_of(model: nn.Module | None = None, **values) -> Trainer:
    torch.manual_seed(2)
    weights = values.pop("weights", torch.tensor(CLASS_WEIGHTS))
    model = Heads() if model is None else model
    recipe = Recipe(**{"batch_size": 12, "steps": 8, "flip": 0.5, **values})
    return Trainer(
        model=model.train(), recipe=recipe, preprocess=Preprocess((1, 8, 8), (0.5,), (0.25,)),
        source=Noise(), labels=torch.arange(COUNT) * 7 % 5 % CLASSES, classes=CLASSES,
        count=COUNT, total=recipe.steps, accelerator=Accelerator(cpu=True), class_weights=weights,
    )  # fmt: skip


def first_step(trainer: Trainer) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the first step."""
    batches = trainer.source.batches(trainer.spans(0)[: trainer.recipe.accumulate])
    loss = trainer.gradients(iter(batches))
    return loss, [p.grad for p in trainer.model.parameters()]


def test_self_adaptive_targets_move_towards_what_the_network_says(monkeypatch):
    """Of eight steps the first two have the labels; the table is that of the paper's rule."""
    trainer = trainer_of(weights=None, self_adaptive=0.9, label_smoothing=0.0)
    outputs, losses, forward = [], [], trainer._outputs

    def recorded(x: Tensor) -> Tensor:
        said = forward(x)
        outputs.append(said.detach())
        return said

    monkeypatch.setattr(trainer, "_outputs", recorded)
    trainer.fit(after_step=lambda _, loss: losses.append(loss))
    table = F.one_hot(trainer.labels, CLASSES).float()
    for step, (said, loss) in enumerate(zip(outputs, losses, strict=True)):
        rows = torch.arange(12 * step, 12 * step + 12) % COUNT
        entropy = -(table[rows][:, None] * said.log_softmax(dim=2)).sum(dim=2).mean(dim=0)
        expected = (entropy * torch.tensor(Heads.head_weights)).sum()
        assert loss == pytest.approx(float(expected), rel=1e-6)
        if step >= 2:
            table[rows] = 0.9 * table[rows] + 0.1 * said[:, 0].softmax(dim=1)
    torch.testing.assert_close(trainer.targets.table, table)
    other = trainer_of(weights=None, self_adaptive=0.9)
    other.load_state_dict(trainer.state_dict())
    assert torch.equal(other.targets.table, table)


def test_an_image_that_is_twice_in_a_batch_moves_its_target_once():
    """Written twice, a GPU mixes the two."""
    targets = SelfAdaptiveTargets(torch.tensor([0, 1]), 2, 0.5, torch.device("cpu"))
    said = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    targets.move(torch.tensor([1, 0, 1]), said.log())
    torch.testing.assert_close(targets.table, torch.tensor([[0.7, 0.3], [0.1, 0.9]]))


def test_trial_steps_have_no_second_table_of_targets():
    with trial(trainer_of(self_adaptive=0.9)) as at_trial:
        assert at_trial.targets is None


def test_room_is_asked_for_the_targets_in_the_states(monkeypatch):
    needed = []
    monkeypatch.setattr(run, "check_space", lambda folder, size: needed.append(size))
    for momentum in (0.0, 0.9):
        self = Mock()
        self.resumed, self.table.splits = False, np.array(["train"] * 40 + ["val"] * 5)
        self.plan = SimpleNamespace(recipe=Recipe(self_adaptive=momentum), classes=["a"] * 100)
        run.Run._claim(self, Mock(), nn.Linear(1, 1))
    assert needed[1] - needed[0] == 3 * 4 * 40 * 100


def test_self_adaptive_training_takes_one_image_at_a_time():
    with pytest.raises(UsageError, match=r"self_adaptive=0\.9 and mixup=0\.2: "):
        Recipe(self_adaptive=0.9, mixup=0.2)


LOSSES = [
    {},
    {"label_smoothing": 0.2},
    {"mixup": 0.7},
    {"mixup": 0.7, "label_smoothing": 0.2},
]


# ----------------------------------------------------------------------- one loss a step
@pytest.mark.parametrize("weights", [None, torch.tensor(CLASS_WEIGHTS)])
@pytest.mark.parametrize("losses", LOSSES)
def test_accumulation_gives_the_loss_and_the_gradients_of_one_batch(losses, weights):
    loss, gradients = first_step(trainer_of(weights=weights, **losses))
    for batch in (2, 4, 6):
        divided = trainer_of(weights=weights, batch_size=batch, accumulate=12 // batch, **losses)
        again, others = first_step(divided)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-7)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_mean_is_pytorchs(smoothing):
    """Which divides by the weights of the batch's labels."""
    trainer = trainer_of(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), flip=0.0,
                         label_smoothing=smoothing)  # fmt: skip
    loss, gradients = first_step(trainer)
    trainer.model.zero_grad()
    images = trainer.source.images[:12].float()
    logits = trainer.model((images / 255 - 0.5) / 0.25)
    expected = F.cross_entropy(
        logits, trainer.labels[:12], weight=trainer.class_weights, label_smoothing=smoothing
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for one, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_step_of_images_without_weight_changes_nothing():
    loss, gradients = first_step(trainer_of(weights=torch.zeros(CLASSES)))
    assert float(loss) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("mixup", [0.0, 0.7])
def test_smoothing_gives_no_loss_to_a_step_of_images_without_weight(mixup):
    """The other classes have a part of each smoothed label, and a weight."""
    trainer = trainer_of(weights=torch.tensor([0.0, 1.0, 3.0]), label_smoothing=0.2, mixup=mixup)
    trainer.labels = torch.zeros_like(trainer.labels)
    loss, gradients = first_step(trainer)
    assert float(loss) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    trainer.step = 1
    assert trainer.epoch_row()["objective"] == 0


def test_smoothing_leaves_steps_with_some_weight_as_they_were():
    weights = torch.tensor([0.0, 1.0, 3.0])
    trainer = trainer_of(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), flip=0.0,
                         label_smoothing=0.2, weights=weights)  # fmt: skip
    loss, _ = first_step(trainer)
    logits = trainer.model((trainer.source.images[:12].float() / 255 - 0.5) / 0.25)
    expected = F.cross_entropy(logits, trainer.labels[:12], weight=weights, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)


WORKER = """
import sys, torch
from tests.test_loop import LOSSES, trainer_of
from torch import distributed
torch.set_num_threads(1)
found = []
for losses in LOSSES:
    trainer = trainer_of(batch_size=2, accumulate=3, **losses)
    if losses is LOSSES[-1]:  # gradients are exchanged once a step by compiled networks too
        trainer.compiled = torch.compile(trainer.model, backend="aot_eager")
    trainer._prepare()
    spans = trainer.spans(0)[:3]
    loss = trainer.gradients(iter(trainer.source.batches(spans)))
    mean = trainer.accelerator.reduce(loss, "mean")
    found.append((mean, [p.grad for p in trainer.model.parameters()], trainer.epoch_row()))
if trainer.accelerator.is_main_process:
    torch.save(found, sys.argv[1])
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradients_of_one_batch(tmp_path):
    """Real processes; each with three batches of two images of a step of twelve."""
    environment = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "found.pt")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for worker in workers:
        _, err = worker.communicate(timeout=200)
        assert worker.returncode == 0, err
    found = torch.load(tmp_path / "found.pt")
    for losses, (loss, gradients, row) in zip(LOSSES, found, strict=True):
        trainer = trainer_of(**losses)
        expected, own = first_step(trainer)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        for one, other in zip(own, gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
        assert row == pytest.approx(trainer.epoch_row(), rel=1e-5)


def test_no_variable_of_accelerates_divides_the_gradients(monkeypatch):
    _, gradients = first_step(trainer_of())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    _, others = first_step(trainer_of())
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


# -------------------------------------------------------------------------- what is shown
def test_loss_and_accuracy_are_of_the_head_that_predicts():
    trainer = trainer_of(label_smoothing=0.2, flip=0.0, batch_size=COUNT, steps=1)
    with torch.no_grad():
        images = (trainer.source.images.float() / 255 - 0.5) / 0.25
        joint = trainer.model(images)[:, 0]
    trainer.fit(after_step=lambda *_: None)
    row = trainer.epoch_row()
    assert row["loss"] == pytest.approx(F.cross_entropy(joint, trainer.labels).item(), rel=1e-5)
    hits = (joint.argmax(dim=1) == trainer.labels).float().mean().item()
    assert row["accuracy"] == pytest.approx(hits)
    assert row["objective"] > 1.2 * row["loss"]  # with smoothing, weights and three heads


@pytest.mark.parametrize("aggregation", ["mean", "deep_sup", "concat", "ft"])
def test_the_heads_of_training_join_to_what_evaluation_gives(aggregation):
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=4, aggregation=aggregation)
    from regard.training.losses import joined_heads

    for m in model.modules():  # the same statistics in both modes
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode=True, m=m: m
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        outputs = model.train()(x)
        expected = model.eval()(x).log_softmax(dim=1)
    torch.testing.assert_close(joined_heads(model, outputs).log_softmax(dim=1), expected)
    if aggregation == "mean":  # of a network that does not say how
        plain = joined_heads(nn.Identity(), outputs)
        torch.testing.assert_close(plain.log_softmax(dim=1), expected)


def test_the_learning_rate_is_the_recipes_and_the_backbones_is_beside_it():
    recipe = {"lr": 0.4, "schedule": "constant", "flip": 0.0}
    plain, scaled = trainer_of(**recipe), trainer_of(backbone_lr_scale=0.1, **recipe)
    for trainer in (plain, scaled):
        trainer.fit(after_step=lambda *_: None)
    assert plain.epoch_row()["learning_rate"] == 0.4
    assert "backbone_learning_rate" not in plain.epoch_row()
    row = scaled.epoch_row()
    assert (row["learning_rate"], row["backbone_learning_rate"]) == (0.4, pytest.approx(0.04))


class Breaks(Heads):
    """Gives NaN from the n-th step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return super().forward(x) * (math.nan if self.left <= 0 else 1.0)


def test_a_loss_that_is_not_finite_names_its_step(monkeypatch):
    trainer = trainer_of(Breaks(3), lr=0.4, schedule="cosine", warmup=4, schedule_unit="steps")
    done: list[int] = []
    with pytest.raises(
        NotFiniteError, match=r"the loss of step 3 .* \(learning rate 0.24\)"
    ) as caught:
        trainer.fit(after_step=lambda t, _: done.append(t.step))
    assert done == [1, 2]
    assert caught.value.step == 3
    assert caught.value.rate == pytest.approx(0.4 * 3 / 5)
    assert caught.value.rows == trainer.source.order.at(24, 12).tolist()


def test_of_several_steps_and_processes_the_first_that_was_not_finite_counts(monkeypatch):
    trainer = trainer_of()
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(num_processes=3))
    for steps, first in (([7, -1, 5], 5), ([-1, -1, -1], -1), ([-1, 0, 3], 0)):
        monkeypatch.setattr(
            "regard.training.loop.gather", lambda _, steps=steps: torch.tensor(steps)
        )
        assert trainer._agreed(torch.tensor(0)) == first


# ----------------------------------------------------------------------------- the steps
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_and_batches_share_every_position_once(partial, accumulate, processes):
    for count in (100, 96, 37, 12, 7):
        batch = min(8, count)
        plan = StepPlan(count, batch, accumulate, processes, partial)
        steps = 5 * math.ceil(plan.an_epoch)
        taken = []
        for step in range(steps):
            spans = [s for r in range(processes) for s in plan.spans(r, step, step + 1)]
            start, images = plan.positions(step)
            rows = sorted(p for first, n in spans for p in range(first, first + n))
            assert rows == list(range(start, start + images))
            assert len(spans) == accumulate * processes
            assert min(n for _, n in spans) >= min(SMALLEST, batch)
            taken += rows
        if not partial:
            assert taken == list(range(steps * plan.images))
            assert plan.an_epoch == count / plan.images
        assert len(set(taken)) == len(taken)


def test_a_partial_batch_ends_each_epoch():
    """As DataLoader(batch_size=32, drop_last=False) on CBAM's 8 GPUs."""
    plan = StepPlan(1_281_167, 32, 1, 8, True)
    assert plan.an_epoch == 5005
    assert plan.total(90) == 90 * 5005
    assert plan.positions(5004) == (5004 * 256, 143)
    assert plan.positions(5005) == (1_281_167, 256)
    last = [n for r in range(8) for _, n in plan.spans(r, 5004, 5005)]
    assert (sum(last), set(last)) == (143, {17, 18})
    assert StepPlan(100, 32, partial=True).an_epoch == 4
    assert StepPlan(97, 32, partial=True).an_epoch == 3  # one image is no batch for batch norm
    spans = StepPlan(100, 32, partial=True).spans(0, 2, 6)
    assert list(spans) == [(64, 32), (96, 4), (100, 32), (132, 32)]
    assert list(spans[1:3]) == [(96, 4), (100, 32)]
    assert np.sum([n for _, n in spans]) == 100


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize(("count", "batch"), [(100, 64), (1050, 256), (37, 16), (130, 64)])
def test_fitting_a_step_into_memory_changes_neither_steps_nor_their_images(count, batch, processes):
    """A step of few images at an epoch's end is divided into fewer batches than the others."""
    planned = StepPlan(count, batch // processes, 1, processes, True)
    fitted = StepPlan(count, 2, batch // 2 // processes, processes, True, planned=processes)
    assert (fitted.images, fitted.an_epoch) == (planned.images, planned.an_epoch)
    steps = 3 * int(planned.an_epoch)
    assert fitted.images_in(0, steps) == planned.images_in(0, steps)
    for rank in range(processes):
        whole = list(fitted.spans(rank, 0, steps))
        assert min(n for _, n in whole) >= SMALLEST
        for step in range(steps):
            spans = list(fitted.spans(rank, step, step + 1))
            assert len(spans) == fitted.parts(step)
            assert [whole.pop(0) for _ in spans] == spans
    for step in range(steps):
        rows = {
            p for r in range(processes) for first, n in fitted.spans(r, step, step + 1)
            for p in range(first, first + n)
        }  # fmt: skip
        start, images = planned.positions(step)
        assert rows == set(range(start, start + images))


@pytest.mark.parametrize(("count", "batch"), [(20, 3), (111, 100), (272, 100), (96, 7)])
@pytest.mark.parametrize("every", ["0.2", "0.3", "1", "2"])
def test_evaluations_are_due_with_the_step_that_ends_their_part(count, batch, every):
    run = SimpleNamespace(
        recipe=Recipe(eval_every=float(every)), steps_an_epoch=count / batch, total=1000
    )
    exact = Fraction(count, batch) * Fraction(every)
    for step in range(1, 300):
        assert Trainer.epoch_ends(run, step) == (step // exact > (step - 1) // exact), step


@pytest.mark.parametrize("count", [97, 98, 100, 128, 3])
@pytest.mark.parametrize("partial", [False, True])
def test_the_images_of_steps_are_those_of_their_batches(count, partial):
    plan = StepPlan(count, 16, 2, partial=partial)
    for first, end in ((0, 0), (0, 9), (2, 5), (4, 13)):
        assert plan.images_in(first, end) == sum(n for _, n in plan.spans(0, first, end))


def test_an_average_over_more_steps_than_the_run_has_is_not_of_its_start():
    """It begins as TensorFlow's ExponentialMovingAverage; by hand, for every step."""
    trainer = trainer_of(ema_decay=0.9999)
    expected = trainer.model.layer.weight.detach().clone()

    def after_step(t: Trainer, loss: float) -> None:
        decay = t.step / (9 + t.step)  # (1 + n) / (10 + n), n from 0
        expected.lerp_(t.model.layer.weight.detach(), 1 - decay)
        torch.testing.assert_close(t.weights.layer.weight, expected)

    trainer.fit(after_step=after_step)
    assert trainer.step == 8
    late = Updater(Heads(), Recipe(ema_decay=0.9), torch.device("cpu"))
    before = late.ema.module.layer.weight.clone()
    late.model.layer.weight.data += 1.0
    late.update(1000)
    torch.testing.assert_close(late.ema.module.layer.weight, before + 0.1)


def test_the_average_is_of_every_weight_also_once_it_is_scored():
    """`to` copies weights of (N, 1, 1, 1) each time, and the average knows them by their place."""
    depthwise = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    )
    trainer = trainer_of(depthwise.to(memory_format=torch.channels_last), ema_decay=0.5)
    before = [p.clone() for p in trainer.weights.parameters()]
    Classifier(trainer.weights, [str(k) for k in range(CLASSES)], trainer.preprocess)
    trainer.fit(after_step=lambda *_: None)
    for p, old in zip(trainer.weights.parameters(), before, strict=True):
        assert not torch.equal(p, old)
