"""The cost of the training loop itself: `regard train`'s loop against a bare PyTorch loop.

    python benchmarks/loop.py [--model attention56_cifar] [--rounds 7] [--steps 10]

Both train the same network from the same weights on the same tensors in memory, batch 64,
fp32, without augmentation; the bare loop is eight lines. They run alternately in one process, and
the median of the rounds' ratios is printed with both speeds.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import regard
from regard.data.loading import InMemoryLoader, Reader, SampleOrder
from regard.data.preprocess import Preprocess
from regard.data.sources import open_data
from regard.training.config import Recipe
from regard.training.loop import Trainer
from regard.training.losses import multi_head_cross_entropy

BATCH, SIZE = 64, 32


def make(name: str, classes: int, channels: int) -> torch.nn.Module:
    """The network, with the same weights each time."""
    torch.manual_seed(0)
    model = regard.create_model(name, num_classes=classes, in_chans=channels)
    return model.to(memory_format=torch.channels_last)


def trainer(name: str, steps: int) -> Trainer:
    """Regard's loop on the digits, without augmentation."""
    table = open_data("digits")
    recipe = Recipe(batch_size=BATCH, steps=steps, flip=0.0, precision="fp32", size=SIZE)
    preprocess = Preprocess((1, SIZE, SIZE), (0.5,), (0.25,))
    reader = Reader(table, preprocess, recipe)
    images = torch.stack([preprocess.fit(reader.decode(i)) for i in range(len(table))])
    return Trainer(
        model=make(name, 10, 1), recipe=recipe, preprocess=preprocess,
        source=InMemoryLoader(reader, SampleOrder(len(table), 0), 0, images),
        labels=torch.from_numpy(table.labels), classes=10, count=len(table), total=steps,
        accelerator=Accelerator(mixed_precision="no"),
    )  # fmt: skip


def bare(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Seconds of a tutorial-style loop; the tensors are already normalized."""
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    weights = getattr(model, "head_weights", None)
    started = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        x = images[rows].contiguous(memory_format=torch.channels_last)
        outputs = model(x)
        several = outputs.ndim == 3
        loss = (
            multi_head_cross_entropy(outputs, labels[rows], weights)
            if several
            else F.cross_entropy(outputs, labels[rows])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return time.perf_counter() - started


def main() -> None:
    """Prints both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="attention56_cifar")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    ours = trainer(args.model, args.steps * (args.rounds + 1))
    images = ours.preprocess.normalize(ours.source.images)  # type: ignore[attr-defined]
    model = make(args.model, 10, 1).train()
    ratios, speeds = [], ([], [])
    for number in range(args.rounds + 1):
        ours.total = args.steps * (number + 1)
        started = time.perf_counter()
        ours.fit(after_step=lambda *_: None)
        seconds = time.perf_counter() - started, bare(model, images, ours.labels, args.steps)
        if number > 0:  # the first round is a warm-up
            ratios.append(seconds[1] / seconds[0])
            for each, s in zip(speeds, seconds, strict=True):
                each.append(BATCH * args.steps / s)
    print(
        f"{args.model}, batch {BATCH}, 1x{SIZE}x{SIZE}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    print(f"regard's loop   {statistics.median(speeds[0]):8.1f} images/s (median of {args.rounds})")
    print(f"a bare loop     {statistics.median(speeds[1]):8.1f} images/s")
    each = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"ratio           {statistics.median(ratios):8.3f} (each {each})")


if __name__ == "__main__":
    main()
