"""Batches on their way to the device: in order, ahead, and of one size."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from regard.data.augment import random_numbers
from regard.data.loading import Batch
from regard.training.feed import AHEAD, _by_thread, feed
from regard.training.loop import Trainer
from tests.test_loop import COUNT, first_step, trainer_of

CPU = torch.device("cpu")


def test_a_thread_is_ahead_and_no_further_than_it_may_be():
    made = []

    def make(number):
        made.append((number, threading.current_thread().name))
        return 10 * number

    batches = _by_thread(iter(range(100)), make, CPU)
    assert next(batches) == 0
    deadline = time.monotonic() + 20
    while len(made) < AHEAD + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert [number for number, _ in made] == list(range(AHEAD + 2))  # one waits to be put down
    assert {name for _, name in made} == {"regard-feed"}
    assert [next(batches) for _ in range(5)] == [10, 20, 30, 40, 50]
    batches.close()
    assert "regard-feed" not in {thread.name for thread in threading.enumerate()}
    assert len(made) <= 5 + AHEAD + 3


def test_an_error_of_the_source_comes_when_its_batch_would():
    def source():
        yield 1
        raise KeyError("a fault")

    batches = _by_thread(source(), lambda batch: batch, CPU)
    assert next(batches) == 1
    with pytest.raises(KeyError):
        next(batches)
    assert list(_by_thread(iter([1, 2]), str, CPU)) == ["1", "2"]


def test_on_a_cpu_nothing_is_made_before_it_is_asked_for():
    made = []
    batches = feed(iter(range(5)), made.append, torch.device("cpu"))
    next(batches)
    assert made == [0]


# -------------------------------------------------------------------- places of lost images
def lost(rows: list[int], batch: Batch) -> Batch:
    """The batch as a loader gives it where these rows can't be read."""
    kept = torch.tensor([k for k, row in enumerate(batch.indices.tolist()) if row not in rows])
    return Batch(
        batch.images[kept], batch.indices[kept], batch.random_numbers[kept],
        [(row, "no image") for row in rows],
    )  # fmt: skip


@pytest.mark.parametrize("mixup", [0.0, 0.7])
def test_the_place_of_an_unreadable_image_is_filled_and_does_not_count(mixup):
    trainer = trainer_of(flip=0.0, mixup=mixup, weights=None)
    whole = next(trainer.source.batches([(0, 12)]))
    placed = trainer.place(lost([3, 7], whole))
    assert placed.images.shape == whole.images.shape
    assert (placed.count, len(placed.labels)) == (10, 10)
    seen = []
    forward = trainer._forward
    trainer._forward = lambda x: (seen.append(len(x)), forward(x))[1]
    trainer.gradients(iter([placed]))
    assert seen == [12]  # so that nothing is compiled again
    assert trainer.tally[4] == 10
    assert trainer.tally[1] == 10
    assert trainer.unreadable == [(3, "no image"), (7, "no image")]


def test_the_gradients_are_those_of_the_images_that_can_be_read():
    trainer, other = trainer_of(flip=0.0), trainer_of(flip=0.0)
    batch = lost([0, 11], next(trainer.source.batches([(0, 12)])))
    trainer.gradients(iter([batch]))
    batch.unreadable = []
    other.gradients(iter([batch]))
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_labels_and_shares_are_those_of_the_images():
    recipe = SimpleNamespace(mixup=0.5)
    labels = torch.arange(100, 100 + COUNT)
    host = SimpleNamespace(labels=labels, recipe=recipe, targets=None)
    batch = Batch(torch.zeros(3, 1, 4, 4), torch.tensor([5, 2, 9]), random_numbers(0, 0, 3))
    placed = Trainer.place(host, batch)
    assert placed.labels.tolist() == [105, 102, 109]
    assert placed.partners.tolist() == [102, 105, 105]
    assert placed.shares.shape == (3,)
    alone = Batch(batch.images[:1], batch.indices[:1], batch.random_numbers[:1])
    assert Trainer.place(host, alone).shares is None


# ------------------------------------------------------------------------- a loss looked at late
def test_a_loss_looked_at_late_still_names_its_own_step(monkeypatch):
    from regard.errors import NotFiniteError
    from tests.test_loop import Breaks

    for ends_at in (8, 5):  # the look itself; an evaluation or a state before the look
        trainer = trainer_of(Breaks(3), lr=0.4, schedule="constant")
        trainer.look_every = 20

        def after(t, loss, end=ends_at):
            if t.step == end:
                t.check_finite()

        with pytest.raises(NotFiniteError, match="the loss of step 3 ") as caught:
            trainer.fit(after_step=after)
        assert caught.value.rows == trainer.source.order.at(24, 12).tolist()


def test_apples_gpus_are_asked_by_one_thread():
    threads = []
    there = SimpleNamespace(moved=lambda mover: threads.append(threading.current_thread()))
    list(feed(iter([1, 2]), lambda _: there, torch.device("mps")))
    assert threads == [threading.main_thread()] * 2


def test_the_thread_works_on_the_device_of_its_process(monkeypatch):
    """A new thread has the first one, where it would take memory."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert list(_by_thread(iter([1, 2]), str, torch.device("cuda", 1))) == ["1", "2"]
    assert list(_by_thread(iter([1, 2]), str, torch.device("cuda"))) == ["1", "2"]
    assert chosen == [1]


def test_what_several_gpus_exchange_is_on_them(monkeypatch):
    """A state that was read, and what is counted before the first step, is on the CPU."""
    from regard.training import loop

    trainer, devices = trainer_of(), []
    trainer.accelerator = SimpleNamespace(num_processes=2)
    trainer.device = torch.device("meta")
    monkeypatch.setattr(
        loop, "gather", lambda bad: devices.append(bad.device) or torch.tensor([-1, 7])
    )
    monkeypatch.setattr(
        loop, "reduce", lambda tally, _: devices.append(tally.device) or torch.ones(5)
    )
    assert trainer._agreed(trainer._bad) == 7
    trainer.step = 1
    assert trainer.epoch_row()["loss"] == 1
    assert devices == [trainer.device] * 2


# ------------------------------------------------------------------------------- fp16
def test_fp16_scales_the_loss_and_leaves_out_a_step_that_overflows():
    trainer, plain = trainer_of(weights=None), trainer_of(weights=None)
    import dataclasses

    half = dataclasses.replace(trainer, precision="fp16")
    scaler = half.updater.scaler
    assert scaler.get_scale() == 65536
    _, gradients = first_step(half)
    _, expected = first_step(plain)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a / 65536, b, rtol=2e-2, atol=2e-3)
    before = [p.clone() for p in half.model.parameters()]
    next(half.model.parameters()).grad[0, 0] = float("inf")
    half.update()
    assert scaler.get_scale() == 32768
    for p, old in zip(half.model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    again = dataclasses.replace(trainer, precision="fp16")
    again.load_state_dict(half.state_dict())
    assert again.updater.scaler.get_scale() == 32768
    # of a run that was in bf16 on another GPU
    again.load_state_dict(plain.state_dict())
    assert again.updater.scaler.get_scale() == 32768


def test_clipping_in_fp16_is_of_the_gradients_and_not_of_their_scale():
    import dataclasses

    trainer = trainer_of(weights=None, clip_grad=0.01, schedule="constant", lr=1.0, momentum=0.0,
                         weight_decay=0.0)  # fmt: skip
    half = dataclasses.replace(trainer, precision="fp16")
    before = torch.cat([p.detach().flatten() for p in half.model.parameters()]).clone()
    first_step(half)
    half.update()
    after = torch.cat([p.detach().flatten() for p in half.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-2)
