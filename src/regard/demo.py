"""`regard demo`: trains AG-SonoNet-8 on real handwritten digits and shows where it looks.

scikit-learn's digits are 1,797 scans of 8x8 pixels from forms that 43 people filled in
(NIST), 16 grey levels, embedded in the library: nothing is downloaded.
"""

import csv
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import regard
from regard.attention import record
from regard.models import create_model
from regard.models.folder import save_model
from regard.report import GalleryItem, Report, wilson_interval, write_report
from regard.training.losses import heads_loss

MODEL = "ag_sononet8"
SIZE = 48  # the 8x8 scans are enlarged so that the first gate's map has 12x12 positions


@dataclass(frozen=True)
class Digits:
    """The digits, split: images (N, 1, 48, 48) standardised, labels (N,), scans (N, 8, 8)."""

    images: Tensor
    labels: Tensor
    scans: np.ndarray
    train: np.ndarray
    test: np.ndarray
    mean: float
    std: float


@dataclass(frozen=True)
class Settings:
    """How the demo trains: SGD with Nesterov momentum and a one-cycle learning rate."""

    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    rotate: float = 12.0  # degrees, either way
    zoom: float = 0.12  # 0.88 to 1.12
    shift: float = 0.06  # of the side, either way
    seed: int = 0


def load_digits(seed: int) -> Digits:
    """scikit-learn's digits with a stratified fifth held out, and standardised on the rest."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    raw = sklearn_digits()
    train, test = train_test_split(
        np.arange(len(raw.target)), test_size=0.2, stratify=raw.target, random_state=seed
    )
    scans = torch.from_numpy(raw.images).float()[:, None] / 16.0  # (N, 1, 8, 8), 0 to 1
    images = F.interpolate(scans, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    mean, std = float(images[train].mean()), float(images[train].std())
    labels = torch.from_numpy(raw.target).long()
    return Digits((images - mean) / std, labels, raw.images, train, test, mean, std)


def augment(images: Tensor, settings: Settings) -> Tensor:
    """Each image turned, zoomed and shifted by its own random amount. (B, C, H, W) -> same."""
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape) * 2 - 1

    angle = uniform(count) * math.radians(settings.rotate)
    zoom = 1 + uniform(count) * settings.zoom
    shift = uniform(count, 2) * settings.shift * 2  # grid coordinates go from -1 to 1
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(
    model: nn.Module, digits: Digits, settings: Settings, on_step: Callable[[dict[str, Any]], None]
) -> list[dict[str, float]]:
    """Trains the model in place; returns loss and accuracy of each epoch."""
    steps = math.ceil(len(digits.train) / settings.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, 0.9, 0, settings.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.epochs * steps, pct_start=0.25
    )
    history = []
    for epoch in range(1, settings.epochs + 1):
        model.train()
        rate, total, correct = schedule.get_last_lr()[0], 0.0, 0
        for chosen in _batches(digits.train, settings.batch_size):
            images = augment(digits.images[chosen], settings)
            labels = digits.labels[chosen]
            outputs = model(images.contiguous(memory_format=torch.channels_last))
            loss = heads_loss(outputs, labels, model.head_weights)  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
            predicted = outputs.detach().softmax(dim=2).mean(dim=1).argmax(dim=1)
            correct += int((predicted == labels).sum())
            on_step({"epoch": epoch, "loss": loss.item()})
        count = len(digits.train)
        history.append(
            {
                "epoch": float(epoch),
                "learning_rate": float(rate),
                "loss": total / count,
                "accuracy": correct / count,
            }
        )
    return history


def _batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    order = indices[torch.randperm(len(indices)).numpy()]
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Class probabilities (N, classes), and each gate's map (N, H, W) by its name."""
    model.eval()
    with record(model) as maps:
        probabilities = model(images).softmax(dim=1)
    gates = {name.removesuffix(".map"): m.values[:, 0] for name, m in maps.items()}
    return probabilities, gates


def run(out: Path, *, settings: Settings, echo: Callable[[str], None]) -> float:
    """Trains, tests and writes the run folder with its report; returns the test accuracy.

    Raises:
        ValueError: `out` holds something that this demo did not write.
        OSError: `out` can't be written.
    """
    _own(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    digits = load_digits(settings.seed)
    model = create_model(MODEL, num_classes=10).to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    echo(
        f"{MODEL}, {parameters:,} parameters, on {len(digits.train):,} scans of handwritten "
        f"digits; {len(digits.test)} more are held out"
    )
    started = time.perf_counter()
    with _progress(settings, len(digits.train), echo) as on_step:
        history = train(model, digits, settings, on_step)
    seconds = time.perf_counter() - started
    probabilities, gates = predict(model, digits.images[digits.test])
    report = _report(digits, settings, history, probabilities, gates, parameters, seconds)
    _write(out, model, digits, history, report)
    low, high = report.interval
    wrong = round((1 - report.accuracy) * report.n_test)
    echo(
        f"accuracy on the {report.n_test} held-out images: {report.accuracy:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}), {wrong} wrong; trained in {seconds:.0f} s"
    )
    echo(f"where it looks: {out / 'report.html'}")
    return report.accuracy


def _own(out: Path) -> None:
    """Refuses to write over what is not a demo's run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ".regard-demo").exists():
        raise ValueError(f"{out} holds something else: give --out a new folder")


@contextmanager
def _progress(
    settings: Settings, images: int, echo: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with the time left in a terminal; elsewhere a plain line an epoch."""
    console = Console(stderr=True)
    steps = math.ceil(images / settings.batch_size)
    done, started = 0, time.perf_counter()

    def plain(step: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if done % steps == 0:
            left = (time.perf_counter() - started) / done * (settings.epochs * steps - done)
            epoch = f"epoch {step['epoch']:2d} of {settings.epochs}"
            echo(f"{epoch}  loss {step['loss']:.4f}  {left:3.0f} s left")

    if not console.is_terminal:
        yield plain
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]:2d} of " + str(settings.epochs)),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=settings.epochs * steps, epoch=1, loss=float("nan"))
        yield lambda step: bar.update(task, advance=1, **step)


def _report(
    digits: Digits,
    settings: Settings,
    history: list[dict[str, float]],
    probabilities: Tensor,
    gates: dict[str, Tensor],
    parameters: int,
    seconds: float,
) -> Report:
    truth = digits.labels[digits.test]
    predicted = probabilities.argmax(dim=1)
    correct = int((predicted == truth).sum())
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (truth.numpy(), predicted.numpy()), 1)
    return Report(
        title="Handwritten digits: where an attention-gated network looks",
        model=MODEL,
        summary={
            "Network": f"{MODEL}, {parameters:,} parameters, image size {SIZE}x{SIZE}",
            "Images": f"{len(digits.train):,} to train on, {len(digits.test)} held out, a "
            "stratified fifth (scikit-learn's digits, 8x8 scans enlarged)",
            "Training": f"{settings.epochs} epochs in {seconds:.0f} s on "
            f"{torch.get_num_threads()} threads, batch {settings.batch_size}, seed {settings.seed}",
        },
        classes=[str(d) for d in range(10)],
        history=history,
        accuracy=correct / len(truth),
        interval=wilson_interval(correct, len(truth)),
        n_test=len(truth),
        confusion=confusion,
        gallery=_gallery(digits, probabilities, gates),
        versions={
            "regard": regard.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "Python": platform.python_version(),
        },
        command=f"regard demo --seed {settings.seed} --epochs {settings.epochs}",
        notes=[
            "The gallery is not picked by hand: of the held-out images it shows the wrong ones (at "
            "most eight, the surest first), the four right ones that the network was least sure "
            "of, and the first right one of each class.",
            "A gate's map tells how much each place weighs in the vector that this gate gives to "
            "the classifier. It shows what was weighed, not why: read it as evidence, not proof.",
            "One split and one seed. Another seed gives a slightly different number; the interval "
            "says how far 360 images can tell.",
        ],
    )


def _gallery(digits: Digits, probabilities: Tensor, gates: dict[str, Tensor]) -> list[GalleryItem]:
    """The wrong images, the least sure right ones, and the first right one of each class."""
    truth = digits.labels[digits.test].numpy()
    sure, predicted = (t.numpy() for t in probabilities.max(dim=1))
    wrong = np.flatnonzero(predicted != truth)
    wrong = wrong[np.argsort(-sure[wrong])][:8]
    right = np.flatnonzero(predicted == truth)
    unsure = right[np.argsort(sure[right])][:4]
    first = [np.flatnonzero((truth == d) & (predicted == d))[:1] for d in range(10)]
    return [
        GalleryItem(
            image=(digits.scans[digits.test[i]] / 16 * 255).round().astype(np.uint8),
            true=str(truth[i]),
            predicted=str(predicted[i]),
            probability=float(sure[i]),
            maps=[(name, values[i].numpy()) for name, values in gates.items()],
        )
        for i in dict.fromkeys(np.concatenate([wrong, unsure, *first]).tolist())
    ]


def _write(
    out: Path, model: nn.Module, digits: Digits, history: list[dict[str, float]], report: Report
) -> None:
    """The run folder: weights and configuration, metrics.csv, report.html."""
    (out / ".regard-demo").touch()
    save_model(
        model,
        out,
        class_names=report.classes,
        data_config={
            "input_size": (1, SIZE, SIZE), "mean": (digits.mean,), "std": (digits.std,),
            "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
        },
    )  # fmt: skip
    beside = out / "metrics.csv.writing"
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    os.replace(beside, out / "metrics.csv")
    write_report(report, out / "report.html")
