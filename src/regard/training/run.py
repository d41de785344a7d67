"""A training run from DATA to its folder: `train` prepares, trains, tests, and writes it all.

The folder: config.json and model.safetensors (timm's `local-dir`), recipe.toml, run.json,
splits.csv, metrics.csv, evaluation.json, predictions.npz, report.html, TensorBoard's events,
and state/ while the run goes on.
"""

import contextlib
import dataclasses
import logging
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from regard.data.loading import (
    InMemoryLoader,
    Reader,
    SampleOrder,
    StreamingLoader,
    default_workers,
)
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable, open_data
from regard.data.splits_file import read_splits
from regard.errors import FileError, NotFiniteError, Stopped, UsageError
from regard.evaluation import Evaluation, Predictions, evaluate
from regard.files import check_space
from regard.machine import keep_freed_memory
from regard.models.create import make_model
from regard.models.io import save_model
from regard.predict import Classifier, probabilities_of
from regard.runs import RunFolder, choose_out
from regard.training.activation_checkpointing import set_checkpointing
from regard.training.checkpoint import Checkpoints
from regard.training.compile import choose_compiled
from regard.training.config import Recipe, load_recipe, recipe_toml
from regard.training.loop import Trainer
from regard.training.memory import Described, fit_memory
from regard.training.plan import (
    bf16_note,
    check_batch,
    choose_model,
    choose_preprocess,
    choose_splits,
    choose_steps,
    fit_schedule,
    image_weights,
    is_scaled,
    loss_weights,
    noisy_labels,
    own_recipe,
    use_bf16,
)
from regard.training.progress import Display
from regard.training.splits import LoadedSplit, check_deviation, load_split, measured
from regard.version import __version__

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_EVERY = 10  # steps between the processes' asking each other whether to stop or to save


@dataclass(frozen=True)
class Plan:
    """A run, decided: what is asked for, and what followed from the data."""

    data: str
    root: str | None
    model: str
    model_args: dict[str, Any]
    weights: str | None
    pretrained: bool
    recipe: Recipe
    classes: list[str]
    preprocess: Preprocess


def train(
    data: str,
    *,
    model: str | None = None,
    recipe: str | Path | Recipe = "quick",
    out: str | Path | None = None,
    resume: bool = False,
    weights: str | Path | None = None,
    pretrained: bool = False,
    root: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    echo: Callable[[str], None] = print,
    **changes: Any,
) -> Path:
    """Trains a network on labeled images and writes a run's folder.

    Args:
        data: digits, a folder, a CSV file, cifar10, ...; see `regard.data.open_data`.
        model: a network's name; without it the recipe's.
        recipe: a shipped one's name, a TOML file, or a Recipe.
        out: the run's folder; without it runs/DATA-MODEL.
        resume: go on with the run in that folder from its last saved state.
        weights: a run's folder to start from, or an authors' checkpoint.
        pretrained: start from timm's pretrained weights (of the plain network, grafted, for a
            CBAM or SE ResNet).
        root: where cifar10 and cifar100 are kept.
        model_args: arguments of the network, on top of the recipe's.
        echo: is given the lines for the person.
        changes: values of the recipe's fields, on top of it.

    Returns:
        The run's folder.

    Raises:
        UsageError: a wrong argument, or data that can't be used.
        OSError: something can't be read or written.
        NotFiniteError: the loss became infinite or NaN; the last state is kept.
        Stopped: SIGINT or SIGTERM; the state is saved.
    """
    accelerator = Accelerator(mixed_precision="no")
    say = echo if accelerator.is_main_process else _quiet
    if not accelerator.is_main_process:  # the first process speaks for all
        logging.getLogger("regard").setLevel(logging.ERROR)
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    asked = base.changed(**changes)
    changes = {name: getattr(asked, name) for name in changes}  # as the recipe has them
    folder = RunFolder(choose_out(out, data, model or asked.model, resume))
    if resume and folder.exists:
        named = not (isinstance(recipe, str) and recipe == "quick")
        given = _differing(asked, changes) if named else {}
        plan = _resumed(folder, data, model, {**given, **changes}, weights, pretrained, model_args)
        table = read_splits(open_data(data, root=plan.root), folder.path / "splits.csv")
        if folder.finished:
            _finished(folder, accelerator.is_main_process, say)
            return folder.path
    else:
        folder.refuse_others()
        plan, table = _planned(data, model, asked, weights, pretrained, root, model_args)
        images = int(np.count_nonzero(table.splits == "train"))
        world = accelerator.num_processes
        fitted = fit_schedule(plan.recipe, base, changes, images, world)
        plan = dataclasses.replace(plan, recipe=fitted)
    for warning in table.warnings:
        say(f"note: {warning}")
    Run(plan, table, folder, accelerator, say).go()
    return folder.path


def _quiet(_: str) -> None:
    return None


def _finished(folder: RunFolder, main: bool, say: Callable[[str], None]) -> None:
    """Of a run that is finished: does what is left where it was ended in its last moment."""
    if main:
        Checkpoints(folder.path / "state").clear()
    say(f"{folder.path} is finished: nothing is left to do")


def _differing(asked: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Recipe) if f.name not in changes]
    return {name: getattr(asked, name) for name in names}


def _planned(
    data: str,
    model: str | None,
    asked: Recipe,
    weights: str | Path | None,
    pretrained: bool,
    root: str | Path | None,
    model_args: Mapping[str, Any] | None,
) -> tuple[Plan, ImageTable]:
    table = choose_splits(open_data(data, root=root), asked)
    name, arguments = choose_model(model, asked, model_args)
    preprocess, arguments = choose_preprocess(name, arguments, asked, table, pretrained)
    asked = own_recipe(asked, name, arguments, preprocess)
    own_root = None if root is None else str(root)
    own_weights = None if weights is None else str(weights)
    return Plan(
        data, own_root, name, arguments, own_weights, pretrained, asked, table.classes, preprocess
    ), table


def _resumed(
    folder: RunFolder,
    data: str,
    model: str | None,
    given: dict[str, Any],
    weights: str | Path | None,
    pretrained: bool,
    model_args: Mapping[str, Any] | None,
) -> Plan:
    """The plan that the folder keeps.

    Raises:
        UsageError: what is asked for now is not what the run was started with.
    """
    kept, recipe = folder.read_plan(), load_recipe(folder.path / "recipe.toml")
    now: dict[str, tuple[Any, Any]] = {
        "DATA": (kept["data"], data),
        "--model": (kept["model"], model or kept["model"]),
        "--weights": (kept["weights"], kept["weights"] if weights is None else str(weights)),
        "--pretrained": (kept["pretrained"], kept["pretrained"] or pretrained),
    }
    now |= {
        f"--{name.replace('_', '-')}": (getattr(recipe, name), value)
        for name, value in given.items()
        if name not in ("model", "model_args", "workers", "save_minutes")
        and not is_scaled(name, getattr(recipe, name), value)
    }
    for name, value in (model_args or {}).items():
        now[f"--arg {name}"] = (recipe.model_args.get(name), value)
    for name, (was, is_now) in now.items():
        if was != is_now:
            raise UsageError(
                f"{name} {is_now}: {folder.path} was started with {was}; leave it out to "
                "resume, or give --out another folder"
            )
    operational = {k: v for k, v in given.items() if k in ("workers", "save_minutes")}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in kept["preprocess"].items()
    }
    preprocess = Preprocess(**values)
    return Plan(
        data, kept["root"], kept["model"], kept["model_args"], kept["weights"],
        kept["pretrained"], recipe.changed(**operational), kept["classes"], preprocess,
    )  # fmt: skip


class Run:
    """One run under way, in one of its processes."""

    def __init__(
        self,
        plan: Plan,
        table: ImageTable,
        folder: RunFolder,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.folder, self.accelerator, self.say = plan, folder, accelerator, say
        self.main = accelerator.is_main_process
        self.table = table
        self.signal = 0
        self.saved_at = time.perf_counter()
        self.best: dict[str, float] = {}
        self.resumed = folder.exists

    def go(self) -> None:
        """Prepares, trains, tests and writes; see `train`."""
        plan, recipe = self.plan, self.plan.recipe
        torch.manual_seed(recipe.seed)
        model = self._model()
        check_batch(model, recipe, int(np.count_nonzero(self.table.splits == "train")))
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was
        if self.main:
            check_space(self.folder.path, 10 * size + 50_000_000)
            self.folder.claim()
        self.parts = self._load_splits()
        self.plan = plan = self._measured(plan)
        self.trainer, chosen = self._fitted(self._trainer(model))
        if self.main:
            text = recipe_toml(recipe, _header(plan))
            self.folder.start(dataclasses.asdict(plan), text, self.table, chosen)
        self.states = Checkpoints(self.folder.path / "state")
        self._resume()
        self._announce()
        try:
            with (
                self._stopping(),
                Display(self.trainer, self.folder, self.main, self.say) as self.display,
            ):
                self.trainer.fit(after_step=self._after_step)
            self._finish()
        except NotFiniteError as error:
            raise self._explained(error) from error

    # -------------------------------------------------------------------- preparation
    def _model(self) -> nn.Module:
        model = make_model(
            self.plan.model, self.plan.model_args, len(self.plan.classes),
            self.plan.preprocess.input_size, self.plan.pretrained, self.plan.weights,
            self.plan.classes,
        )  # fmt: skip
        if self.plan.recipe.grad_checkpointing:
            set_checkpointing(model, self.plan.model)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        return model.to(self.accelerator.device).to(memory_format=torch.channels_last)

    def _load_splits(self) -> dict[str, LoadedSplit]:
        parts, unreadable = {}, []
        for split in ("train", "val", "test"):
            rows = np.flatnonzero(self.table.splits == split)
            if len(rows) == 0:
                continue
            augmentation = self.plan.recipe.augmentation if split == "train" else None
            reader = Reader(self.table.select(rows), self.plan.preprocess, augmentation)
            part = load_split(reader, self.plan.recipe, self.say, split, show=self.main)
            unreadable += part.unreadable
            parts[split] = part
        if unreadable:
            share = len(unreadable) / len(self.table)
            told = f"{len(unreadable)} of {len(self.table)} images can't be read ({share:.1%})"
            if share > self.plan.recipe.max_unreadable:
                raise UsageError(
                    f"{told}, more than --max-unreadable {self.plan.recipe.max_unreadable:g}: "
                    + "; ".join(reason for _, reason in unreadable[:3])
                )
            self.say(f"note: {told}; they are left out and listed in unreadable.csv")
            if self.main:
                self.folder.write_unreadable(unreadable)
        if "train" not in parts or len(parts["train"].table) == 0:
            raise UsageError(f"{self.plan.data}: no training image can be read")
        for split, part in parts.items():
            check_deviation(part, split)
        return parts

    def _measured(self, plan: Plan) -> Plan:
        """With the training images' mean and deviation, where the recipe standardizes by them."""
        if plan.recipe.normalization != "data" or self.resumed:
            return plan
        preprocess = measured(self.parts["train"], plan.preprocess)
        return dataclasses.replace(plan, preprocess=preprocess)

    def _source(self, split: str) -> InMemoryLoader | StreamingLoader:
        part, recipe = self.parts[split], self.plan.recipe
        order = None
        if split == "train":
            order = SampleOrder(len(part.table), recipe.seed, image_weights(part.table, recipe))
        if part.images is not None:
            return InMemoryLoader(part.reader, order, recipe.seed, part.images)
        workers = default_workers() if recipe.workers is None else recipe.workers
        return StreamingLoader(part.reader, order, recipe.seed, workers)

    def _trainer(self, model: nn.Module) -> Trainer:
        recipe, table = self.plan.recipe, self.parts["train"].table
        device = self.accelerator.device
        labels = noisy_labels(table.labels, len(self.plan.classes), recipe.label_noise, recipe.seed)
        weights = loss_weights(table, recipe)
        world = self.accelerator.num_processes
        return Trainer(
            model=model,
            recipe=recipe,
            preprocess=self.plan.preprocess,
            source=self._source("train"),
            labels=torch.from_numpy(labels).to(device),
            classes=len(self.plan.classes),
            count=len(table),
            total=choose_steps(recipe, len(table), world),
            accelerator=self.accelerator,
            class_weights=None if weights is None else weights.to(device),
            bf16=use_bf16(recipe.precision, device),
        )

    def _fitted(self, trainer: Trainer) -> tuple[Trainer, dict[str, Any]]:
        """The trainer as memory and speed have it, and what was decided, as a resumed run had it.

        It is decided before the folder says that the run has started: what can't be is no run.
        """
        recipe, kept = self.plan.recipe, self.folder.read_measured() if self.resumed else {}
        chosen: dict[str, Any] = {}
        if recipe.fit_memory:
            described = Described(
                self.plan.model, self.plan.model_args, len(self.plan.classes),
                self.plan.preprocess, recipe, trainer.bf16, torch.get_num_threads(),
            )  # fmt: skip
            batch, parts = kept.get("batches") or fit_memory(trainer, described, self.say)
            chosen["batches"] = [batch, parts]
            recipe = trainer.recipe.changed(batch_size=batch, accumulate=parts)
            trainer = dataclasses.replace(trainer, recipe=recipe)
        if recipe.compile != "no":
            chosen["compiled"] = choose_compiled(trainer, self.say, kept.get("compiled"))
        return trainer, chosen

    def _resume(self) -> None:
        state, broken = self.states.load()
        for line in broken:
            self.say(f"note: {line}; the state before it is used")
        if state is not None:
            self.best = state.pop("best")
            self.trainer.load_state_dict(state)
            if not self.main:  # the first process has what all of them counted
                self.trainer.tally, self.trainer.unreadable = (
                    torch.zeros_like(self.trainer.tally),
                    [],
                )
            self.say(f"resumed after step {self.trainer.step:,} of {self.trainer.total:,}")

    def _announce(self) -> None:
        t, r = self.trainer, self.plan.recipe
        counts = ", ".join(f"{len(p.table):,} {s}" for s, p in self.parts.items())
        parameters = sum(p.numel() for p in t.model.parameters())
        self.say(
            f"{self.plan.model}, {parameters:,} parameters, {len(self.plan.classes)} classes; "
            f"images: {counts}"
        )
        held = "held in memory" if self.parts["train"].images is not None else "streamed from files"
        c, h, w = self.plan.preprocess.input_size
        precision = "bf16" if t.bf16 else "fp32"
        if note := bf16_note(r.precision, self.accelerator.device):
            self.say(note)
        self.say(
            f"{t.total:,} steps of {t.images_a_step} images ({t.total / t.steps_an_epoch:.3g} "
            f"epochs) at {c}x{h}x{w}, {held}, {precision}, {r.optimizer} at {r.lr:g}, "
            f"{self.accelerator.device.type} x {self.accelerator.num_processes}"
        )

    # ----------------------------------------------------------------- while it trains
    def _after_step(self, trainer: Trainer, loss: float) -> None:
        self.display.step(loss)
        ends = trainer.epoch_ends(trainer.step)
        if ends:
            self._end_epoch()
        stop, due = self._asked()
        if ends or stop or due:
            self._save()
        if stop and trainer.step < trainer.total:
            self.accelerator.wait_for_everyone()  # one that ends early may end the others
            raise Stopped(trainer.step, stop)

    def _end_epoch(self) -> None:
        t = self.trainer
        t.check_finite()
        row = t.epoch_row()
        t.tally = torch.zeros_like(t.tally)
        if "val" in self.parts:
            predictions = self.predict("val")
            chosen = predictions.probabilities[np.arange(len(predictions)), predictions.labels]
            row["val_loss"] = float(-np.log(np.clip(chosen, 1e-12, 1)).mean())
            hits = predictions.probabilities.argmax(axis=1) == predictions.labels
            row["val_accuracy"] = float(hits.mean())
            self._keep_best(row)
        t.history.append(row)
        t.model.train()
        if self.main:
            self.folder.write_metrics(t.history)
        self.display.epoch(row)

    def _keep_best(self, row: dict[str, float]) -> None:
        better = (row["val_accuracy"], -row["val_loss"])
        if self.best and better <= (self.best["val_accuracy"], -self.best["val_loss"]):
            return
        self.best = {k: row[k] for k in ("epoch", "step", "val_accuracy", "val_loss")}
        if self.plan.recipe.select == "best" and self.main:
            self.folder.write_best(self.trainer.weights)

    def _summed(self, tally: Tensor) -> Tensor:
        return self.accelerator.reduce(tally, "sum").cpu()

    def predict(self, split: str) -> Predictions:
        """What the network says of a split now, gathered from all processes, no image twice."""
        part = self.parts[split]
        self.trainer.share_buffers()
        classifier = Classifier(self.trainer.weights, self.plan.classes, self.plan.preprocess)
        rows, found, unreadable = probabilities_of(
            classifier, self._source(split), len(part.table), batch=max(32, self.trainer.batch),
            rank=self.accelerator.process_index, world=self.accelerator.num_processes,
        )  # fmt: skip
        if self.accelerator.num_processes > 1:
            gathered = gather_object([(rows, found, unreadable)])
            rows = np.concatenate([r for r, _, _ in gathered])
            found = np.concatenate([f for _, f, _ in gathered])
            unreadable = [u for _, _, us in gathered for u in us]
        part.lost = unreadable
        self._list_unreadable(part, unreadable)
        if len(rows) == 0:
            raise FileError(f"no {split} image can be read: {unreadable[0][1]}")
        order = np.argsort(rows)
        rows, found = rows[order], found[order]
        if not np.isfinite(found).all():
            raise self.trainer.not_finite("what the network answers after the update")
        table = part.table.select(rows)
        paths = [table.path(i) for i in range(len(table))]
        return Predictions(found, table.labels, table.classes, table.groups, paths)

    def _save(self) -> None:
        t = self.trainer
        t.check_finite()
        t.share_buffers()
        if self.accelerator.num_processes > 1:  # what each process counted becomes the first's
            t.tally, t.unreadable = self._summed(t.tally), gather_object(t.unreadable)
            if not self.main:
                t.tally, t.unreadable = torch.zeros_like(t.tally), []
        if self.main:
            t.unreadable = list(dict.fromkeys(t.unreadable))  # a state holds each once
            self.states.save(t.step, {**t.state_dict(), "best": self.best})
            self._list_unreadable(self.parts["train"], t.unreadable)
        self.saved_at = time.perf_counter()

    def _list_unreadable(self, part: LoadedSplit, found: list[tuple[int, str]]) -> None:
        """Adds images that were found unreadable on the way to unreadable.csv."""
        if found and self.main:
            self.folder.write_unreadable([(part.table.path(row), why) for row, why in found])

    def _explained(self, error: NotFiniteError) -> NotFiniteError:
        table = self.parts["train"].table
        files = [table.path(row) for row in error.rows]
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        told = NotFiniteError(error.step, error.rate, error.rows)
        told.args = (
            f"{error}; its images: {shown}. The last good state is kept in "
            f"{self.states.folder}; try a lower --lr or --clip-grad 1",
        )
        return told

    # ------------------------------------------------------------------------- signals
    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """A first SIGINT or SIGTERM lets the step end; a second SIGINT ends at once."""

        def ask(number: int, _: FrameType | None) -> None:
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        try:
            before = {s: signal.signal(s, ask) for s in STOP_SIGNALS}
        except ValueError:  # not in the main thread: signals are another's
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _asked(self) -> tuple[int, bool]:
        """The signal to stop for, and whether a state is due; all processes agree on both."""
        due = time.perf_counter() - self.saved_at > 60 * self.plan.recipe.save_minutes
        if self.accelerator.num_processes == 1:
            return self.signal, due
        if self.trainer.step % ASK_EVERY:
            return 0, False
        asked = torch.tensor([[self.signal, due]], device=self.accelerator.device)
        number, saving = self.accelerator.gather(asked).amax(dim=0).tolist()
        return number, bool(saving)

    # --------------------------------------------------------------------------- end
    def _finish(self) -> None:
        """Takes the chosen weights, tests them, and writes the network and the report."""
        t = self.trainer
        if self.plan.recipe.select == "best" and self.best:
            self.accelerator.wait_for_everyone()
            self.folder.read_best(t.weights)
        split = next(s for s in ("test", "val", "train") if s in self.parts)
        predictions = self.predict(split)
        if not self.main:
            return
        evaluation = evaluate(predictions, seed=self.plan.recipe.seed)
        self._write_network(evaluation)
        self.folder.write_evaluation(split, evaluation, predictions)
        self.folder.finish(self._facts(split))
        self.states.clear()
        self._tell(split, evaluation)

    def _write_network(self, evaluation: Evaluation) -> None:
        plan = self.plan
        top1 = evaluation.metrics["top1"]
        save_model(
            self.trainer.weights, self.folder.path, class_names=plan.classes,
            data_config=plan.preprocess.data_config(),
            extra={"regard": {**plan.preprocess.regard_config(), "top1": top1.value}},
        )  # fmt: skip

    def _facts(self, split: str) -> dict[str, Any]:
        t = self.trainer
        return {
            "tested_on": split,
            "counts": {s: len(p.table) for s, p in self.parts.items()},
            "parameters": sum(p.numel() for p in t.model.parameters()),
            "steps": t.total,
            "epochs": t.total / t.steps_an_epoch,
            "seconds": t.seconds,
            "waited": t.waited / max(t.seconds, 1e-9),
            "images_a_second": t.total * t.images_a_step / max(t.seconds, 1e-9),
            "best": self.best,
            "warnings": list(self.table.warnings),
            "bf16": t.bf16,
            "compiled": t.compiled is not None,
            "batches": [t.batch, t.recipe.accumulate],
            "threads": torch.get_num_threads(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "unreadable": len(set(t.unreadable))
            + sum(len(p.unreadable) + len(p.lost) for p in self.parts.values()),
            "versions": {
                "regard": __version__, "torch": torch.__version__,
                "Python": platform.python_version(),
            },
        }  # fmt: skip

    def _tell(self, split: str, evaluation: Evaluation) -> None:
        top1 = evaluation.metrics["top1"]
        wrong = int(evaluation.n - evaluation.confusion.trace())
        name = {"test": "test", "val": "validation", "train": "training"}[split]
        self.say(
            f"accuracy on the {evaluation.n:,} {name} images: {top1.value:.2%} (95 % interval "
            f"{top1.low:.2%} to {top1.high:.2%}), {wrong} wrong; trained in "
            f"{self.trainer.seconds:.0f} s, {self.trainer.waited / self.trainer.seconds:.0%} of it "
            "waiting for images"
        )
        self.say(f"the network: {self.folder.path}")


def _header(plan: Plan) -> str:
    command = " ".join(shlex.quote(a) for a in sys.argv[1:])
    first = f"The recipe of this run, every value resolved: {plan.model} on {plan.data}"
    start = " --pretrained" * plan.pretrained
    if plan.weights is not None:
        start += f" --weights {shlex.quote(plan.weights)}"
    again = f"regard train {shlex.quote(plan.data)} --recipe THIS_FILE{start}"
    return f"{first}\nregard {command}\nThe same run again: {again}"
