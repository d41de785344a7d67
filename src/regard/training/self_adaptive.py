"""Targets that move from the labels towards what the network says, for labels that may be wrong.

Self-adaptive training (Huang, Zhang and Zhang 2020, arXiv 2002.10319): after the start of a run
each image's target is the running mean of its label and the network's predictions of it, one for
each batch that it was in. Unlike the paper's, images have no weights of their own, and an image's
loss is that of its target before it moves; the paper's, after, has the same gradient (of one head,
without smoothing) times the momentum.
"""

import torch
from torch import Tensor

START = 0.25  # of the steps, in which the targets are the labels


class SelfAdaptiveTargets:
    """The target of each training image.

    Args:
        labels: (N,) of the images, on the CPU.
        classes: how many.
        momentum: the share of a target that stays when its image is seen.
        device: where it trains.

    Attributes:
        table: (N, classes) float32 probabilities, on the device.
    """

    def __init__(self, labels: Tensor, classes: int, momentum: float, device: torch.device) -> None:
        self.momentum: float = momentum
        table = torch.zeros(len(labels), classes, device=device)  # one_hot's are of 8 bytes
        self.table: Tensor = table.scatter_(1, labels.to(device)[:, None], 1.0)

    def of(self, rows: Tensor) -> Tensor:
        """(B,) rows of the images -> (B, classes), their targets."""
        return self.table[rows]

    def move(self, rows: Tensor, logits: Tensor) -> None:
        """Moves the targets of images (B,) towards what the network says of them (B, classes).

        Of an image that is in the batch more than once, as sampling with replacement draws it,
        the first counts; a device that writes several mixes them.
        """
        first = (rows[:, None] == rows).byte().argmax(dim=1)
        said = logits.detach().float().softmax(dim=1)[first]
        self.table[rows] = self.momentum * self.table[rows] + (1 - self.momentum) * said
