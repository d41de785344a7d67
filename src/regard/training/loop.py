"""The training loop: `fit` trains a network on batches, and can be stopped and resumed at any step.

Everything random is a function of the seed and the step, and everything else is in the saved
state, so an interrupted run ends with the same bits as an uninterrupted one (one process, on a
CPU, with the same number of threads).

A step's loss is one mean over all its images, however they are divided among gradient
accumulation and processes: the weighted sum of their losses divided by the sum of their
weights. Accelerate provides the device, the processes and the gathering; forward, backward,
precision, accumulation and clipping are PyTorch's, called here, so that no ACCELERATE_* variable
changes them.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather, reduce
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from regard.compat import without_buffer_exchange
from regard.data.augment import Augmentation, augment, blend, mixup_shares, neighbors
from regard.data.device_decoding import EncodedBatch, ReadBatch
from regard.data.loading import repeated
from regard.data.preprocess import Preprocess
from regard.errors import FileError, NotFiniteError
from regard.machine import fastest_kernels, most_precise, seed_device
from regard.training.activation_checkpointing import frozen_statistics
from regard.training.config import Recipe
from regard.training.distributed import broadcast_tensors
from regard.training.feed import Mover, Placed, feed
from regard.training.losses import (
    joined_heads,
    multi_head_cross_entropy,
    prediction_cross_entropy,
    total_weight,
)
from regard.training.optim import rate_factor, set_rate
from regard.training.self_adaptive import START, SelfAdaptiveTargets
from regard.training.steps import StepPlan, StepSpans, step_plan
from regard.training.update import Updater

CHECK_EVERY = 20  # steps between reads of the loss from a device, each of which waits for it
TINY = 1e-12  # lower bound of the sum of weights, which is divided by


class Source(Protocol):
    """Batches by (start position, count), such as loading.InMemoryLoader."""

    def batches(self, spans: Any) -> Iterator[ReadBatch]: ...


@dataclass
class Trainer:
    """A run's network, data and progress; `fit` trains it.

    Attributes:
        model: the network, on the device.
        recipe, preprocess: how to train, and how images become input.
        source: gives batches of the training images.
        labels: (N,) labels of the training images, on the CPU.
        classes: number of classes.
        count: number of training images; an epoch is this many positions.
        total: optimizer steps of the whole run.
        class_weights: (classes,) for the loss, or None.
        precision: fp32, tf32, bf16 or fp16, as for `Updater`.
        compiled: the network compiled or as a `Graphed`; None: it runs eagerly.
        planned: batches of a step of all processes as the run was planned; 0: as the recipe says.
    """

    model: nn.Module
    recipe: Recipe
    preprocess: Preprocess
    source: Source
    labels: Tensor
    classes: int
    count: int
    total: int
    accelerator: Accelerator
    class_weights: Tensor | None = None
    precision: str = "fp32"
    compiled: Any = None
    planned: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.device: torch.device = self.accelerator.device
        self.look_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        self._bad = torch.full((), -1)  # first step whose loss was not finite
        self.augmentation: Augmentation = recipe.augmentation
        self.head_weights: tuple[float, ...] | None = getattr(self.model, "head_weights", None)
        world = self.accelerator.num_processes
        self.steps: StepPlan = step_plan(recipe, self.count, world, self.planned)
        self.batch: int = self.steps.batch
        self.images_a_step: int = self.steps.images
        self.steps_an_epoch: float = self.steps.an_epoch
        self.updater: Updater = Updater(self.model, recipe, self.device, self.precision)
        self.optimizer: torch.optim.Optimizer = self.updater.optimizer
        self.ema: ModelEmaV3 | None = self.updater.ema
        self.targets: SelfAdaptiveTargets | None = None
        if recipe.self_adaptive:
            momentum = recipe.self_adaptive
            self.targets = SelfAdaptiveTargets(self.labels, self.classes, momentum, self.device)
        # sums over this epoch: objective, weights, cross entropy, correct, images
        self.tally: Tensor = torch.zeros(5, dtype=torch.float64)
        self._forward: Any = self.model
        self._parallel: nn.parallel.DistributedDataParallel | None = None

    @property
    def weights(self) -> nn.Module:
        """The network to evaluate and to save: the averaged one if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def epoch_ends(self, step: int) -> bool:
        """Whether an evaluation is due after this many steps."""
        every = self.recipe.eval_every * self.steps_an_epoch
        # 1e-6: three fifths of an epoch of 20/3 steps end with step 4, whatever the rounding
        done, before = (math.floor(s / every + 1e-6) for s in (step, step - 1))
        return step >= self.total or done > before

    def spans(self, start: int) -> StepSpans:
        """This process's batches in sample order, from a step to the end."""
        return self.steps.spans(self.accelerator.process_index, start, self.total)

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0), for attention and classifier."""
        factor = rate_factor(self.recipe, step, self.total, self.steps_an_epoch)
        return self.recipe.lr * factor

    def epoch_row(self) -> dict[str, float]:
        """The training columns of metrics.csv, from the epoch's sums over all processes.

        `loss` is the cross entropy of the prediction, like `val_loss`; `objective` is what is
        minimized: with smoothing, class weights and every head.
        """
        summed = self.tally
        if self.accelerator.num_processes > 1:  # NCCL exchanges only what is on the device
            summed = reduce(summed.to(self.device), "sum")
        objective, weight, entropy, correct, seen = summed.tolist()
        rate = self.rate(self.step - 1)
        row = {
            "epoch": round(self.step / self.steps_an_epoch, 3),
            "step": float(self.step),
            "learning_rate": rate,
        }
        if self.recipe.backbone_lr_scale != 1:
            row["backbone_learning_rate"] = rate * self.recipe.backbone_lr_scale
        row |= {"loss": entropy / seen, "accuracy": correct / seen}
        return row | {"objective": objective / weight if weight > 0 else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.updater.scaler is None else self.updater.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "targets": None if self.targets is None else self.targets.table,
            "tally": self.tally.clone(),
            "history": self.history,
            "unreadable": self.unreadable,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state saved by `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.updater.scaler is not None and state["scaler"] is not None:  # else it starts anew
            self.updater.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.targets is not None:
            self.targets.table.copy_(state["targets"])
        self.step, self.history = state["step"], state["history"]
        self.tally, self.seconds, self.waited = state["tally"], state["seconds"], state["waited"]
        self.unreadable = [tuple(u) for u in state["unreadable"]]

    def fit(self, *, after_step: Callable[["Trainer", float], None]) -> None:
        """Trains to the last step; calls `after_step` after each one with its loss.

        The loss is NaN if it was not read (on a device, in all but every CHECK_EVERY-th step).

        Raises:
            NotFiniteError: a loss is not finite. On a CPU the weights are those before that
                step; on a device up to CHECK_EVERY further steps have changed them.
        """
        self._prepare()
        batches = feed(self.source.batches(self.spans(self.step)), self.place, self.device)
        try:
            while self.step < self.total:
                started = time.perf_counter()
                set_rate(self.optimizer, self.rate(self.step))
                _seed(self.recipe.seed, self.step, self.accelerator)
                loss = self.gradients(batches, started=started)
                is_read = (self.step + 1) % self.look_every == 0
                self._bad = torch.where((self._bad < 0) & ~loss.isfinite(), self.step, self._bad)
                if is_read or self.step + 1 == self.total:
                    self.check_loss()
                self.update()
                self.step += 1
                self.seconds += time.perf_counter() - started
                after_step(self, float(loss) if is_read else math.nan)
        finally:
            getattr(batches, "close", lambda: None)()

    def gradients(
        self, batches: Iterator[Any], parts: int | None = None, started: float | None = None
    ) -> Tensor:
        """Computes the gradients of a step's loss; returns this process's share of it.

        The mean of all processes' shares is the step's loss. The time from `started` until the
        batches are there counts as waiting.

        Args:
            batches: the step's batches first, from the source or from `place`.
            parts: how many of them are the step's (default: as planned).
            started: when the step began.
        """
        count = self.steps.parts(self.step) if parts is None else parts
        step = [self._readable(next(batches)) for _ in range(count)]
        if started is not None:
            self.waited += time.perf_counter() - started
        targets = [self._target(batch) for batch in step]
        weights = [total_weight(target, self.class_weights) for target in targets]
        whole = torch.stack(weights).sum()
        share = torch.ones_like(whole)
        if self._parallel is not None:  # averages the gradients over the processes
            share, whole = share * self.accelerator.num_processes, reduce(whole, "sum")
        # images that all have weight 0 teach nothing, also by the other classes' share of a
        # smoothed label, which has a weight
        share = torch.where(whole > 0, share, 0.0)
        whole = whole.clamp_min(TINY)
        loss = torch.zeros((), device=self.device)
        for part, (batch, target, weight) in enumerate(zip(step, targets, weights, strict=True)):
            with fastest_kernels(), self._synchronized(part == len(step) - 1):
                outputs = self._outputs(self._input(batch))[: batch.count]
                summed = self._summed_loss(outputs, target)
                with self._recomputing():
                    self.updater.backward(summed * share / whole)
            loss += summed.detach() * share / whole
            if self.targets is not None and batch.rows is not None and self._targets_move:
                self.targets.move(batch.rows, joined_heads(self.model, outputs.detach()))
            self._count(outputs.detach(), batch, target, summed.detach(), weight)
        return loss

    def place(self, batch: ReadBatch) -> Placed:
        """A batch with its labels and mixup coefficients, still where the source made it.

        Files are decoded on the device.

        Unreadable images are replaced by others of the batch, which do not count: a network that is
        compiled or uses batch norm gets batches of one size.
        """
        if isinstance(batch, EncodedBatch):
            batch = batch.decoded(self.device)
        count, unreadable = len(batch.indices), batch.unreadable
        if count and unreadable:
            batch = repeated(batch, count + len(unreadable))
        labels, u = self.labels[batch.indices], batch.random_numbers
        shares, partners = None, None
        if self.recipe.mixup and len(labels) > 1:
            shares = mixup_shares(u, self.recipe.mixup)
            partners = labels[neighbors(len(labels))][:count]
        rows = None if self.targets is None else batch.indices[:count]
        return Placed(batch.images, u, labels[:count], shares, partners, count, unreadable, rows)

    def input_of(self, batch: ReadBatch) -> Tensor:
        """(B, C, H, W), the network's input for a batch, on the device."""
        return self._input(self._readable(batch))

    def update(self) -> None:
        """Updates the weights, and their average, from the gradients."""
        self.updater.update(self.step)

    def check_finite(self) -> None:
        """Refuses to test or save weights that the last step made infinite or NaN.

        Raises:
            NotFiniteError: the network's or its average's weights are not finite; or a loss since
                the last check was not, and then the error names that step.
        """
        self.check_loss()
        tensors = [*self.model.state_dict().values(), *self.weights.state_dict().values()]
        finite = torch.stack([t.isfinite().all() for t in tensors if t.is_floating_point()])
        if not bool(finite.all()):
            raise self.not_finite("a weight")

    def check_loss(self) -> None:
        """Checks whether the loss of a step was not finite, which waits for the device.

        Raises:
            NotFiniteError: for the first such step in any process.
        """
        if (first := self._agreed(self._bad)) >= 0:
            raise self._error(first, "the loss")

    def not_finite(self, what: str) -> NotFiniteError:
        """The error for the last step done."""
        return self._error(self.step - 1, what)

    def share_buffers(self) -> None:
        """Gives all processes the first one's BN running statistics; each computes its own."""
        if self.accelerator.num_processes == 1:
            return
        buffers = [*self.model.buffers()]
        if self.ema is not None:
            buffers += self.ema.module.buffers()
        broadcast_tensors(buffers)

    # ------------------------------------------------------------------------ its parts
    def _error(self, step: int, what: str) -> NotFiniteError:
        """The error for a step (from 0), which users count from 1, as the progress display does."""
        rows = []
        if (order := getattr(self.source, "order", None)) is not None:
            rows = order.at(*self.steps.positions(step)).tolist()
        return NotFiniteError(step + 1, self.rate(step), rows, what)

    def _agreed(self, bad: Tensor) -> int:
        """The first step with a loss not finite in any process, or -1, so all stop together."""
        if self.accelerator.num_processes == 1:
            return int(bad)
        steps = gather(bad.view(1).to(self.device))
        return int(steps[steps >= 0].min()) if bool((steps >= 0).any()) else -1

    def _prepare(self) -> None:
        self.model.train()
        self._bad = self._bad.to(self.device)
        self._forward = self.model if self.compiled is None else self.compiled
        if self.accelerator.num_processes > 1:
            torch.compiler.reset()  # the trial compiled without graph breaks for DDP
            # DDP wraps the compiled network, not the reverse: then no_sync and the hooks that
            # exchange gradients are PyTorch's own, and dynamo splits the graph at them
            self._forward = self._parallel = nn.parallel.DistributedDataParallel(
                self._forward,
                device_ids=None if self.device.type == "cpu" else [self.device.index],
                gradient_as_bucket_view=True,
                **without_buffer_exchange(),  # `share_buffers` does that where they are used
            )

    @property
    def _targets_move(self) -> bool:
        """Whether a self-adaptive run has reached the steps in which its targets move."""
        return self.step >= START * self.total

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Lets processes exchange gradients only in the last batch of a step."""
        if self._parallel is None or last:
            return contextlib.nullcontext()
        return self._parallel.no_sync()

    def _recomputing(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the backward pass, in which checkpointing runs the forward pass again."""
        checkpoints = self.recipe.grad_checkpointing
        return frozen_statistics(self.model) if checkpoints else contextlib.nullcontext()

    def _readable(self, batch: ReadBatch | Placed) -> Placed:
        """The batch on the device; its unreadable images are recorded."""
        if not isinstance(batch, Placed):
            batch = self.place(batch).moved(Mover(self.device))
        self.unreadable += batch.unreadable
        if batch.count == 0:
            reason = batch.unreadable[0][1]
            raise FileError(f"no image of step {self.step + 1} can be read: {reason}")
        return batch

    def _target(self, batch: Placed) -> Tensor:
        """(count,) labels, or (count, classes) probabilities: with mixup, or self-adaptive."""
        if self.targets is not None and batch.rows is not None and self._targets_move:
            return self.targets.of(batch.rows)
        if batch.shares is None or batch.partners is None:
            return batch.labels
        own, other = (
            F.one_hot(labels, self.classes).float() for labels in (batch.labels, batch.partners)
        )
        share = batch.shares[: batch.count, None]
        return own * share + other * (1 - share)

    def _input(self, batch: Placed) -> Tensor:
        """The network's input, (B, C, H, W): augmented, standardized, mixed."""
        x = augment(batch.images, batch.random_numbers, self.augmentation, self.preprocess)
        x = x if batch.shares is None else blend(x, batch.shares)
        return x.contiguous(memory_format=torch.channels_last)

    def _outputs(self, x: Tensor) -> Tensor:
        """Logits, (B, classes) or (B, heads, classes)."""
        with self.updater.autocast():
            return self._forward(x).float()

    def _summed_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The objective summed over a batch's images, each weighted by its class weight."""
        return multi_head_cross_entropy(
            outputs, target, self.head_weights, reduction="sum",
            weight=self.class_weights, label_smoothing=self.recipe.label_smoothing,
        )  # fmt: skip

    def _count(
        self, outputs: Tensor, batch: Placed, target: Tensor, summed: Tensor, weight: Tensor
    ) -> None:
        """Adds a batch to the epoch's sums."""
        outputs = joined_heads(self.model, outputs)
        correct = (outputs.argmax(dim=1) == batch.labels).sum()
        entropy = prediction_cross_entropy(outputs, target)
        seen = torch.full_like(entropy, len(outputs))
        added = torch.stack([summed, weight.to(summed), entropy, correct.to(summed), seen])
        dtype = most_precise(added.device)
        self.tally = self.tally.to(dtype=dtype).to(added.device) + added.to(dtype)


def _seed(seed: int, step: int, accelerator: Accelerator) -> None:
    """Seeds dropout and the like: differs by step and process, the same when resumed."""
    mixed_in = ((seed * 1_000_003 + step) * 4099 + accelerator.process_index) % (2**63 - 1)
    seed_device(accelerator.device, mixed_in)
