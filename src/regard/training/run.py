"""A training run from data to results: `train` prepares, trains, tests and writes a folder.

The folder: config.json and model.safetensors (timm's `local-dir`), README.md (the model card),
recipe.toml, run.json, splits.csv, metrics.csv, evaluation.json, predictions.npz,
validation.npz, TensorBoard event files, and state/ until the run is finished.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from regard.data.device_decoding import check_device_decoding
from regard.data.loading import InMemoryLoader, StreamingLoader
from regard.data.near_duplicates import leak_line
from regard.data.table import ImageTable
from regard.data.workers import WaitInterrupted, worker_errors
from regard.errors import NotFiniteError, Replacing, Stopped, UsageError
from regard.evaluation import Predictions
from regard.files import about, check_space, plural, shortened
from regard.machine import memory_errors, one_cpu_thread
from regard.models.counting import count_parameters
from regard.run_data import write_start
from regard.runs import RunFolder
from regard.training.build import build_loader, build_model, build_trainer, settle_norms
from regard.training.checkpoint import KEPT, Checkpoints
from regard.training.compile import choose_compiled
from regard.training.config import Recipe, with_channels
from regard.training.distributed import (
    Ranks,
    Requests,
    Watch,
    broadcast_tensors,
    gathered,
    lost_processes,
    on_main,
    start_accelerator,
)
from regard.training.finish import finish_run, run_facts, tested_split
from regard.training.lock import Lock
from regard.training.loop import Trainer
from regard.training.memory import fit_memory
from regard.training.opening import Opened, Resume, open_run
from regard.training.plan import check_batch, precision_note
from regard.training.progress import Display
from regard.training.recipe_files import load_recipe, recipe_toml
from regard.training.run_plan import Plan, Request, accumulation_now, check_arguments
from regard.training.scoring import Scorer
from regard.training.signals import Signals, Stop
from regard.training.splits import LoadedSplit, load_splits, measured
from regard.training.trackers import Trackers, check_trackers

log: logging.Logger = logging.getLogger(__name__)


def train(
    data: str | Path,
    *,
    model: str | None = None,
    recipe: str | Path | Recipe = "quick",
    out: str | Path | None = None,
    resume: Resume = False,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    splits: str = "auto",
    model_args: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
    device: str = "auto",
    **changes: Any,
) -> Path:
    """Trains a network on labeled images and writes a run's folder; see `regard.train`."""
    trackers = (trackers,) if isinstance(trackers, str) else trackers
    optional = {
        "model": model, "out": out, "weights": weights, "root": root, "model_args": model_args,
    }  # fmt: skip
    given = {name: value for name, value in optional.items() if value is not None}
    check_arguments(recipe=recipe, trackers=trackers, **given)
    accelerator = start_accelerator(device)
    if not accelerator.is_main_process:  # others log only errors
        logging.getLogger("regard").setLevel(logging.ERROR)
    trackers, world = check_trackers(trackers), accelerator.num_processes
    if isinstance(changes.get("pretrained"), bool):  # a bool, as in timm's functions
        changes["pretrained"] = "yes" if changes["pretrained"] else "no"
    watch = contextlib.closing(Watch()) if world > 1 else contextlib.nullcontext()
    with watch, lost_processes(world), one_cpu_thread(accelerator.device):
        base = on_main(  # only the first process may have the file
            accelerator, lambda: recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        )
        arguments, changes = with_channels(model_args or {}, changes)
        chosen = base.changed(**changes)
        asked = Request(
            data=str(data), model=model, recipe=chosen,
            weights=None if weights is None else str(weights),
            root=None if root is None else str(root), splits=splits,
            model_args=arguments, base=base,
            changes={name: getattr(chosen, name) for name in changes},  # as the recipe has them
            has_recipe=not (isinstance(recipe, str) and recipe == "quick"),
        )  # fmt: skip
        opened = open_run(accelerator, asked, out, resume)
        if not opened.finished:
            for warning in opened.table.warnings:
                log.info(f"note: {warning}")
            Run(opened, accelerator, trackers).go()
    return opened.path


class Run:
    """One run under way, in one of its processes."""

    def __init__(
        self, opened: Opened, accelerator: Accelerator, trackers: Sequence[str] = ()
    ) -> None:
        self.plan: Plan = opened.plan
        self.table: ImageTable = opened.table
        self.stored: dict[str, Any] = opened.stored
        self.folder: RunFolder = RunFolder(opened.path)  # only the first process knows its content
        self.accelerator = accelerator
        self.tracker_names: Sequence[str] = trackers
        self.main: bool = accelerator.is_main_process
        self.world: int = accelerator.num_processes
        self.signals: Signals = Signals()
        self.requests: Requests = Requests(accelerator)
        self.stop: Stop = Stop(self.signals, self.requests)
        self.states: Checkpoints = Checkpoints(self.folder.path / "state")
        self.saved_at: float = time.monotonic()
        self.saved_after: int = -1  # steps
        self.best: dict[str, float] = {}
        self.best_of_states: list[int] = []  # steps of the best weights of the last two states
        self.resumed: bool = opened.resumed
        self.has_state: bool = opened.has_state
        self.claimed: bool = False  # by this process, which may then undo it
        self.unscored: bool = False  # the saved state still needs the evaluation of its epoch

    def go(self) -> None:
        """Prepares, trains, tests and writes the run; see `train`."""
        lock = Lock(self.folder.path)
        batch = self.plan.recipe.batch_size
        advice = f"lower batch_size ({batch}) or size, or set fit_memory or grad_checkpointing"
        try:
            with (
                Replacing(self._with_images), memory_errors("training", advice), worker_errors(),
                lost_processes(self.world),
            ):  # fmt: skip
                self._prepare(lock)
                with self.signals.heard():
                    self._train()
                    self._finish()
        finally:
            self._close_loaders()
            if self.claimed:
                self.folder.leave()
            lock.release()
            if self.main:
                with contextlib.suppress(OSError):  # fails if the folder is not empty
                    self.folder.path.rmdir()

    # -------------------------------------------------------------------- preparation
    def _prepare(self, lock: Lock) -> None:
        torch.manual_seed(self.plan.recipe.seed)
        model = self._model()
        check_batch(model, self.plan.recipe, int(np.count_nonzero(self.table.splits == "train")))
        if self.plan.recipe.decode == "device":
            check_device_decoding(self.accelerator.device)
        if self.plan.recipe.self_adaptive and self.world > 1:
            raise UsageError(
                "self_adaptive: each of several processes would know only a part of the targets; "
                "train in one process"
            )
        on_main(self.accelerator, lambda: self._claim(lock, model))
        self.parts: dict[str, LoadedSplit] = load_splits(
            self.table, self.plan.preprocess, self.plan.recipe,
            left_out=self.stored.get("left_out") if self.resumed else None, show=self.main,
            ranks=Ranks(self.accelerator),
        )  # fmt: skip
        self._write_left_out()
        held = self.parts["train"].images is not None
        if self.main and held and self.plan.recipe.decode == "device":
            log.info("decode=device has no effect: the training images are held in memory "
                     "(memory=no streams them)")  # fmt: skip
        if self.main and not self.resumed and (line := leak_line(self.table)):
            log.warning(line)
            told = (*self.table.warnings, line)  # for the card and the report
            self.table = dataclasses.replace(self.table, warnings=told)
        if self.plan.recipe.normalization == "data" and not self.resumed:
            preprocess = on_main(
                self.accelerator, lambda: measured(self.parts["train"], self.plan.preprocess)
            )
            self.plan = dataclasses.replace(self.plan, preprocess=preprocess)
        self.loaders: dict[str, InMemoryLoader | StreamingLoader] = {
            s: build_loader(self.plan, s, p, self.accelerator.device)
            for s, p in self.parts.items()
            if s != "train"
        }
        trainer = build_trainer(self.plan, model, self.parts["train"], self.accelerator)
        self.trainer: Trainer
        self.trainer, chosen = self._fitted(trainer, self.stored)
        chosen["left_out"] = {
            self.table.key_of(path): why
            for part in self.parts.values() for path, why in part.left_out
        }  # fmt: skip
        chosen["warnings"] = list(self.table.warnings)
        on_main(self.accelerator, lambda: self._start(chosen))
        self._load_state()
        self._announce()

    def _model(self) -> nn.Module:
        """The network, with weights that only the first process reads or downloads."""
        made: list[nn.Module] = []

        def build(start: bool) -> None:
            made.append(build_model(self.plan, self.accelerator.device, start=start))

        on_main(self.accelerator, lambda: build(not self.has_state))
        if not made:
            build(start=False)
        broadcast_tensors([*made[0].parameters(), *made[0].buffers()])
        return made[0]

    def _claim(self, lock: Lock, model: nn.Module) -> None:
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        targets = 0
        if self.plan.recipe.self_adaptive:  # in each state: two are stored while a third is written
            images = int(np.count_nonzero(self.table.splits == "train"))
            targets = 3 * 4 * images * len(self.plan.classes)
        best = 3 * size if self.plan.recipe.select == "best" else 0  # of the states, and a new one
        needed = 10 * size + best + targets + 50_000_000
        check_space(self.folder.path, 0 if self.resumed else needed)
        lock.acquire()
        if not self.resumed:
            self.folder.refuse_others()  # another run may have ended here meanwhile
        self.folder.claim()
        self.claimed = True

    def _write_left_out(self) -> None:
        left_out = [entry for part in self.parts.values() for entry in part.left_out]
        if left_out and self.main and not self.resumed:
            self.folder.write_unreadable(left_out)
        for part in self.parts.values():
            self._list_unreadable(part, list(part.missing.items()))

    def _fitted(self, trainer: Trainer, stored: dict[str, Any]) -> tuple[Trainer, dict[str, Any]]:
        """The trainer adapted to memory and speed, and the choices; a resumed run's are stored.

        This happens before the folder records that the run has started, so that a run that fails
        here leaves no folder behind.
        """
        recipe, chosen = self.plan.recipe, dict[str, Any]()
        batch, parts = trainer.batch, recipe.accumulate
        if recipe.fit_memory:
            batch, parts = stored.get("batches") or fit_memory(trainer)
            chosen["batches"] = [batch, parts]
        if self.world != self.plan.processes:
            parts = accumulation_now(parts, self.plan.processes, self.world)
            log.info(
                f"note: started with {plural(self.plan.processes, 'process')}, resumed with "
                f"{self.world}: "
                f"accumulate={parts} keeps the number of images per step"
            )
        if (batch, parts) != (trainer.batch, recipe.accumulate):
            fitted = recipe.changed(batch_size=batch, accumulate=parts)
            trainer = dataclasses.replace(trainer, recipe=fitted)
        if self.plan.rules:
            settle_norms(trainer.model, trainer.total * trainer.recipe.accumulate)
        if recipe.compile != "no":
            chosen["compiled"] = choose_compiled(trainer, stored.get("compiled"))
        return trainer, chosen

    def _start(self, chosen: dict[str, Any]) -> None:
        text = recipe_toml(self.plan.recipe, self.plan.header(self.table.reading))
        plan = dataclasses.asdict(self.plan)
        if not self.resumed:
            write_start(self.folder.path, plan)
        self.folder.start(plan, text, self.table, chosen)

    def _load_state(self) -> None:
        state, broken = on_main(self.accelerator, self.states.load)
        for line in broken:
            log.info(f"note: {line}; the previous state is used")
        if state is None:
            return
        self.best, self.unscored = state.pop("best"), state.pop("unscored", False)
        self._note_best()
        self.trainer.load_state_dict(state)
        self.saved_after = self.trainer.step
        if not self.main:  # the first process's state has the sums of all
            self.trainer.tally = torch.zeros_like(self.trainer.tally)
            self.trainer.unreadable = []
        log.info(f"resumed after step {self.trainer.step:,} of {self.trainer.total:,}")

    def _announce(self) -> None:
        t, r = self.trainer, self.plan.recipe
        counts = ", ".join(f"{len(p.table):,} {s}" for s, p in self.parts.items())
        parameters = count_parameters(t.model)
        log.info(
            f"{self.plan.network}, {parameters:,} parameters, {len(self.plan.classes)} classes; "
            f"images: {counts}"
        )
        held = "in memory" if self.parts["train"].images is not None else "streamed from files"
        c, h, w = self.plan.preprocess.input_size
        if note := precision_note(r.precision, self.accelerator.device):
            log.info(note)
        log.info(
            f"{plural(t.total, 'step')} of {plural(t.images_a_step, 'image')} "
            f"({about(t.total / t.steps_an_epoch, 'epoch')}) at {c}x{h}x{w}, {held}, "
            f"{t.precision}, {r.optimizer} at {r.lr:g}, "
            f"{self.accelerator.device.type} x {self.world}"
        )

    # ----------------------------------------------------------------- while it trains
    def _train(self) -> None:
        trackers = None
        self.scorer: Scorer = Scorer(self.trainer, self.plan.classes, self.stop.asked)
        if self.main:
            config = {
                **dataclasses.asdict(self.plan.recipe), "model": self.plan.model,
                "started": self.folder.read_started() if self.plan.rules else None,
            }  # fmt: skip
            trackers = Trackers(self.tracker_names, self.folder.path, config, self.trainer.step)
        source = self.trainer.source
        if isinstance(source, StreamingLoader):
            source.stop = self.stop.overdue
        self.display: Display
        with Display(self.trainer, trackers) as self.display:
            try:
                if self.unscored:
                    self._end_epoch()
                    self._save()
                self.trainer.fit(after_step=self._after_step)
            except WaitInterrupted:
                self._stop_while_waiting()

    def _stop_while_waiting(self) -> None:
        """Stops a run whose next images did not arrive; a step begins once all of them have."""
        if self.world == 1:
            self._save()
        number = self.requests.heard(self.signals.stop, at_once=True)
        raise Stopped(max(0, self.saved_after), number)

    def _after_step(self, trainer: Trainer, loss: float) -> None:
        self.display.step(loss)
        ends = trainer.epoch_ends(trainer.step)
        if ends:
            try:
                self._end_epoch()
            except WaitInterrupted:  # in the evaluation, which the resumed run repeats
                self.unscored = True
        due = time.monotonic() - self.saved_at > 60 * self.plan.recipe.save_minutes
        stop, save = self.requests.agree(self.signals.stop, due or self.signals.save, now=ends)
        if self.world > 1 and trainer.step == self.saved_after + 1:
            save = False  # this request was made before the last one was met
        if ends or stop or save:
            self._save()
        if save and self.signals.save:
            self.signals.save = False
            log.info(f"saved after step {trainer.step:,}, on a signal")
        if stop and (self.unscored or trainer.step < trainer.total):
            self.accelerator.wait_for_everyone()  # a process that ends early may end the others
            raise Stopped(trainer.step, stop)

    def _end_epoch(self) -> None:
        t = self.trainer
        t.check_finite()
        row = t.epoch_row()
        if "val" in self.parts:
            part = self.parts["val"]
            scores = self.scorer.validate(self.loaders["val"], part)
            row |= {"val_loss": scores.loss, "val_accuracy": scores.accuracy}
            self._list_unreadable(part, part.lost)
            self._keep_best(row)
        t.tally, self.unscored = torch.zeros_like(t.tally), False
        t.history.append(row)
        t.model.train()
        if self.main:
            self.folder.write_metrics(t.history)
        self.display.evaluated(row)

    def _keep_best(self, row: dict[str, float]) -> None:
        better = (row["val_accuracy"], -row["val_loss"])
        if self.best and better <= (self.best["val_accuracy"], -self.best["val_loss"]):
            return
        self.best = {k: row[k] for k in ("epoch", "step", "val_accuracy", "val_loss")}
        if self.plan.recipe.select == "best" and self.main:
            self.folder.write_best(self.trainer.weights, int(row["step"]))

    def _save(self) -> None:
        t = self.trainer
        t.check_finite()
        t.share_buffers()
        if self.world > 1:  # the counts of all processes are collected in the first one
            tally = self.accelerator.reduce(t.tally.to(t.device), "sum").cpu()
            t.tally, t.unreadable = tally, gather_object(t.unreadable)
            if not self.main:
                t.tally, t.unreadable = torch.zeros_like(t.tally), []
        if self.main:
            t.unreadable = list(dict.fromkeys(t.unreadable))  # without repetitions
            extra = {"best": self.best, "unscored": self.unscored}
            self.states.save(t.step, {**t.state_dict(), **extra})
            self._note_best()
            self.folder.keep_best(self.best_of_states)
            self._list_unreadable(self.parts["train"], t.unreadable)
        self.saved_at, self.saved_after = time.monotonic(), t.step

    def _note_best(self) -> None:
        """Notes the step of the best weights that the newest state names."""
        step = [int(self.best["step"])] if self.best else []
        self.best_of_states = [*self.best_of_states[-(KEPT - 1) :], *step]

    def _list_unreadable(self, part: LoadedSplit, rows: list[tuple[int, str]]) -> None:
        """Appends images of a split to unreadable.csv."""
        if rows and self.main:
            self.folder.write_unreadable([(part.table.path(row), why) for row, why in rows])

    # --------------------------------------------------------------------------- end
    def _finish(self) -> None:
        """Loads the selected weights, tests them, and writes the network."""
        t = self.trainer
        if self.plan.recipe.select == "best" and self.best:
            step = int(self.best["step"])
            on_main(self.accelerator, lambda: self.folder.read_best(t.weights, step))
            broadcast_tensors([*t.weights.parameters(), *t.weights.buffers()])
        predictions = {}
        for split in dict.fromkeys((tested_split(self.parts), "val")):
            if split in self.parts and (said := self._predictions(split)) is not None:
                predictions[split] = said
        if self.main:
            facts = run_facts(self.plan, self.table, t, self.parts, self.best)
            finish_run(self.folder, self.plan, t, self.parts, predictions, facts)
            self.states.clear()

    def _predictions(self, split: str) -> Predictions | None:
        """The finished network's probabilities for the images of a split, in the first process."""
        part = self.parts[split]
        loader = self.loaders.get(split) or build_loader(
            self.plan, "test", part, self.accelerator.device
        )
        self.loaders[split] = loader  # to be closed
        try:
            predictions = self.scorer.predict(loader, part)
        except WaitInterrupted:
            number = max(gathered(self.accelerator, self.signals.stop))
            raise Stopped(self.trainer.step, number) from None
        self._list_unreadable(part, part.lost)
        return predictions

    def _close_loaders(self) -> None:
        """Ends the loaders' worker processes now, however the run ended."""
        loaders = [*getattr(self, "loaders", {}).values()]
        if hasattr(self, "trainer"):
            loaders.append(self.trainer.source)
        for loader in loaders:
            loader.close()

    def _with_images(self, error: Exception) -> NotFiniteError | None:
        """The error with the names of the step's images, all of which run.json lists, and advice.

        None for another error.
        """
        if not isinstance(error, NotFiniteError):
            return None
        table = self.parts["train"].table
        files = [table.path(row) for row in error.rows]
        named = NotFiniteError(error.step, error.rate, error.rows)
        saved = self.main and self.states.any()
        state = f"The last good state is in {self.states.folder}; " if saved else ""
        images = f"; its images: {shortened(files, 8)}" if files else ""
        named.args = (f"{error}{images}. {state}try a lower lr, or clip_grad=1",)
        if self.main:
            self.folder.note_failure({
                "reason": str(error), "step": error.step, "learning_rate": error.rate,
                "images": files, "state": str(self.states.folder) if state else None,
            })  # fmt: skip
        return named
