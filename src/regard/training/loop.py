"""The training loop: `fit` trains a network on batches, and can be stopped and resumed at any step.

Everything random is a function of the seed and the step, and everything else is in the saved
state, so a run that was interrupted ends with the same bits as one that was not (one process,
on a CPU, with the same number of threads).
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
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from regard.data.augment import augment, mixup
from regard.data.loading import Batch
from regard.data.preprocess import Preprocess
from regard.errors import FileError, NotFiniteError
from regard.training.activation_checkpointing import kept_statistics
from regard.training.config import Recipe
from regard.training.losses import multi_head_cross_entropy
from regard.training.optim import make_optimizer, rate_factor, set_rate

CHECK_EVERY = 20  # steps between looks at the loss, on a device where looking means waiting


class Source(Protocol):
    """Batches by (start place, count): loading.InMemoryLoader or loading.StreamingLoader."""

    def batches(self, spans: Any) -> Iterator[Batch]: ...


@dataclass
class Trainer:
    """What a run has and where it stands; `fit` moves it.

    Attributes:
        model: the network, on the device.
        recipe, preprocess: how to train, and how images become input.
        source: of the training images.
        labels: (N,) of the training images, on the device.
        classes: how many.
        count: of training images; an epoch is this many places.
        total: optimizer steps of the whole run.
        class_weights: (classes,) for the loss, or None.
        bf16: whether the network runs under autocast.
        compiled: the network as torch.compile gives it; None: it runs eagerly.
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
    bf16: bool = False
    compiled: Any = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0

    def __post_init__(self) -> None:
        recipe, world = self.recipe, self.accelerator.num_processes
        self.augmentation = recipe.augmentation
        self.head_weights = getattr(self.model, "head_weights", None)
        self.batch = min(recipe.batch_size, self.count)
        self.images_a_step = self.batch * recipe.accumulate * world
        self.steps_an_epoch = self.count / self.images_a_step
        self.optimizer = make_optimizer(self.model, recipe)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.tally = torch.zeros(3, dtype=torch.float64)  # loss, correct, images of this epoch
        self._forward: Any = self.model

    @property
    def weights(self) -> nn.Module:
        """The network to evaluate and to keep: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def epoch_ends(self, step: int) -> bool:
        """Whether an evaluation is due after this many steps."""
        every = self.recipe.eval_every * self.steps_an_epoch
        return step >= self.total or math.floor(step / every) > math.floor((step - 1) / every)

    def spans(self, start: int) -> list[tuple[int, int]]:
        """This process's batches of the order of training, from a step to the end."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [
            (step * self.images_a_step + (part * world + rank) * self.batch, self.batch)
            for step in range(start, self.total)
            for part in range(self.recipe.accumulate)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "tally": self.tally.clone(),
            "history": self.history,
            "unreadable": self.unreadable,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the run where `state_dict` was."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.step, self.history = state["step"], state["history"]
        self.tally, self.seconds, self.waited = state["tally"], state["seconds"], state["waited"]
        self.unreadable = [tuple(u) for u in state["unreadable"]]

    def fit(self, *, after_step: Callable[["Trainer", float], None]) -> None:
        """Trains to the last step; `after_step` is called after each with the step's loss.

        The loss is not a number where it was not looked at (on a device, between looks).

        Raises:
            NotFiniteError: the loss is not finite; the weights are those before that step.
        """
        self._prepare()
        device = self.accelerator.device
        bad = torch.full((), -1, device=device)  # the first step whose loss was not finite
        batches = iter(self.source.batches(self.spans(self.step)))
        rate = 0.0
        while self.step < self.total:
            started = time.perf_counter()
            rate = self.recipe.lr * rate_factor(
                self.recipe, self.step, self.total, self.steps_an_epoch
            )
            set_rate(self.optimizer, rate)
            _seed(self.recipe.seed, self.step, self.accelerator)
            loss = self.gradients(batches, started)
            looked = device.type == "cpu" or (self.step + 1) % CHECK_EVERY == 0
            bad = torch.where((bad < 0) & ~loss.isfinite(), self.step, bad)
            if (looked or self.step + 1 == self.total) and (first := self._agreed(bad)) >= 0:
                raise NotFiniteError(first, rate, self._rows(first))
            self.update()
            self.step += 1
            self.seconds += time.perf_counter() - started
            after_step(self, float(loss) if looked else math.nan)

    def gradients(self, batches: Iterator[Batch], started: float | None = None) -> Tensor:
        """Adds up the gradients of a step's batches; returns its mean loss.

        The time since `started`, until the first batch is ready, counts as waiting.
        """
        accumulate = self.recipe.accumulate
        loss = torch.zeros((), device=self.accelerator.device)
        for part in range(accumulate):
            x, target, labels = self._input(next(batches), started if part == 0 else None)
            with self._synchronized(part == accumulate - 1):
                outputs, batch_loss = self._loss(x, target)
                with self._recomputing():
                    self.accelerator.backward(batch_loss / accumulate)
            loss += batch_loss.detach() / accumulate
            self._count(outputs.detach(), labels, batch_loss.detach())
        return loss

    def update(self) -> None:
        """Moves the weights, and their average, by the gradients."""
        if self.recipe.clip_grad:
            self.accelerator.clip_grad_norm_(self._forward.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def check_finite(self) -> None:
        """Refuses weights that the last step broke, before they are tested or saved.

        Raises:
            NotFiniteError: some are infinite or NaN, of the network or of its average.
        """
        tensors = [*self.model.state_dict().values(), *self.weights.state_dict().values()]
        finite = torch.stack([t.isfinite().all() for t in tensors if t.is_floating_point()])
        if not bool(finite.all()):
            raise self.not_finite("a weight")

    def not_finite(self, what: str) -> NotFiniteError:
        """The error of the step that was done last."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        return NotFiniteError(self.step - 1, rate, self._rows(self.step - 1), what)

    def share_buffers(self) -> None:
        """Gives all processes the first one's running means of BN; each counts its own."""
        if self.accelerator.num_processes == 1:
            return
        for buffer in [*self.model.buffers(), *self.weights.buffers()]:
            torch.distributed.broadcast(buffer, 0)

    # ------------------------------------------------------------------------ its parts
    def _agreed(self, bad: Tensor) -> int:
        """The step whose loss was not finite in any process, or -1: all end together."""
        if self.accelerator.num_processes == 1:
            return int(bad)
        return int(self.accelerator.gather(bad.view(1)).max())

    def _prepare(self) -> None:
        self.model.train()
        if self.accelerator.num_processes > 1:
            self._forward = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=None if self.accelerator.device.type == "cpu" else [
                    self.accelerator.device.index
                ],
            )  # fmt: skip
            if self.compiled is not None:  # anew: it is cut where gradients are exchanged
                self._forward = torch.compile(self._forward)
        elif self.compiled is not None:
            self._forward = self.compiled

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged between processes with the last batch of a step only."""
        distributed = isinstance(self._forward, nn.parallel.DistributedDataParallel)
        return self._forward.no_sync() if distributed and not last else contextlib.nullcontext()

    def _recomputing(self) -> contextlib.AbstractContextManager[Any]:
        """For the backward pass, which checkpoints let go forward a second time."""
        checkpoints = self.recipe.grad_checkpointing
        return kept_statistics(self.model) if checkpoints else contextlib.nullcontext()

    def _input(self, batch: Batch, started: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """The network's input (B, C, H, W), the target, and the labels (B,)."""
        self.unreadable += batch.unreadable
        if len(batch.indices) == 0:
            raise FileError(f"no image of step {self.step} can be read: {batch.unreadable[0][1]}")
        device = self.accelerator.device
        u = batch.draws.to(device)
        labels = self.labels[batch.indices.to(device)]
        x = augment(
            batch.images.to(device, non_blocking=True), u, self.augmentation, self.preprocess
        )
        target = labels
        if self.recipe.mixup > 0 and len(labels) > 1:
            x, target = mixup(x, F.one_hot(labels, self.classes).float(), u, self.recipe.mixup)
        if started is not None:
            self.waited += time.perf_counter() - started
        return x.contiguous(memory_format=torch.channels_last), target, labels

    def _loss(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, (B, classes) or (B, heads, classes), and the mean loss."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            outputs = self._forward(x)
        outputs = outputs.float()
        loss = multi_head_cross_entropy(
            outputs, target, self.head_weights,
            weight=self.class_weights, label_smoothing=self.recipe.label_smoothing,
        )  # fmt: skip
        return outputs, loss

    def _count(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Adds a batch to the epoch's mean loss and accuracy; the heads vote by their mean."""
        shares = outputs.softmax(dim=-1)
        predicted = (shares.mean(dim=1) if shares.ndim == 3 else shares).argmax(dim=1)
        correct = (predicted == labels).sum()
        seen = torch.full_like(loss, len(labels))
        added = torch.stack([loss * len(labels), correct.to(loss.dtype), seen])
        self.tally = self.tally.to(added.device) + added.double()

    def _rows(self, step: int) -> list[int]:
        """The training images of a step, of all processes."""
        order = getattr(self.source, "order", None)
        if order is None:
            return []
        return order.at(step * self.images_a_step, self.images_a_step).tolist()


def _seed(seed: int, step: int, accelerator: Accelerator) -> None:
    """Of dropout and the like: another for each step and process, the same when resumed.

    torch.manual_seed would do, but for the 0.6 ms that it spends on devices that are not there.
    """
    mixed_in = ((seed * 1_000_003 + step) * 4099 + accelerator.process_index) % (2**63 - 1)
    torch.default_generator.manual_seed(mixed_in)
    if accelerator.device.type == "cuda":
        torch.cuda.manual_seed(mixed_in)
