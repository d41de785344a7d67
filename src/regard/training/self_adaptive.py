"""Targets that move from the labels towards the network's predictions, for noisy labels.

Self-adaptive training (Huang, Zhang and Zhang 2020, arXiv 2002.10319): after the start of a run
each image's target is the running mean of its label and the network's predictions for it, updated
in each batch that contains it. Unlike in the paper, images are not weighted, and an image's
loss uses its target before the update; the paper's, after it, has the same gradient (for one head,
without smoothing) times the momentum.
"""

import torch
from torch import Tensor

START = 0.25  # fraction of the steps in which the targets are the labels


class SelfAdaptiveTargets:
    """The target of each training image.

    Args:
        labels: (N,) labels of the images, on the CPU.
        classes: number of classes.
        momentum: weight of the old target when an image is seen.
        device: where it trains.

    Attributes:
        table: (N, classes) float32 probabilities, on the device.
    """

    def __init__(self, labels: Tensor, classes: int, momentum: float, device: torch.device) -> None:
        self.momentum: float = momentum
        table = torch.zeros(len(labels), classes, device=device)  # one_hot would be int64
        self.table: Tensor = table.scatter_(1, labels.to(device)[:, None], 1.0)

    def of(self, rows: Tensor) -> Tensor:
        """(B,) rows of the images -> (B, classes), their targets."""
        return self.table[rows]

    def move(self, rows: Tensor, logits: Tensor) -> None:
        """Moves the targets of images (B,) towards the network's predictions, logits (B, classes).

        If sampling with replacement puts an image into a batch several times, the first one counts:
        on a device, duplicate rows would be written in no fixed order.
        """
        first = (rows[:, None] == rows).byte().argmax(dim=1)
        said = logits.detach().float().softmax(dim=1)[first]
        self.table[rows] = self.momentum * self.table[rows] + (1 - self.momentum) * said
