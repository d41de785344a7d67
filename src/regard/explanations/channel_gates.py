"""Whether channel gates attend: whether their values depend on the image.

A gate with the same values for every image is a constant factor for each channel. CBAM's and SE's
gates become so when all ReLUs inside their MLP are 0 for every image, which leaves the sigmoid of a
bias, or when their sigmoids saturate. Hardly any gradient then reaches the MLP, so they rarely
recover.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.attention import attention_kinds, evaluating, record
from regard.files import plural

SAME = 0.01
"""A gate is the same for every image if no value varies by more than this share of the largest."""

CLOSED, OPEN = 0.01, 0.99
SHOWN = 6  # gates named in a sentence
ENOUGH = 10  # images; from fewer nothing is concluded


def has_channel_gates(model: nn.Module) -> bool:
    """Whether the network has channel gates."""
    return "channel" in attention_kinds(model).values()


def channel_gates(model: nn.Module, x: Tensor) -> dict[str, NDArray[np.float32]]:
    """The values of each channel gate, (B, C), for images (B, C, H, W); empty if it has none."""
    if not has_channel_gates(model):
        return {}
    with torch.no_grad(), evaluating(model), record(model, this_thread=True) as maps:
        model(x)
    return {
        name: m.values.flatten(1).float().cpu().numpy()
        for name, m in maps.items()
        if m.kind == "channel"
    }


@dataclass(frozen=True)
class GateCheck:
    """One channel gate over several images.

    Attributes:
        name: the submodule.
        channels: number of channels.
        variation: the largest range of a channel's values over the images.
        same: whether its values are the same for every image.
        closed: share of all values below 0.01.
        opened: share of all values above 0.99.
    """

    name: str
    channels: int
    variation: float
    same: bool
    closed: float
    opened: float

    def to_dict(self) -> dict[str, float | int | bool]:
        """For JSON."""
        return {
            "channels": self.channels, "variation": round(self.variation, 6), "same": self.same,
            "closed": round(self.closed, 4), "opened": round(self.opened, 4),
        }  # fmt: skip


def compare_gates(values: Mapping[str, NDArray[np.float32]]) -> list[GateCheck]:
    """Compares each gate's values (N, C) over N images; empty for fewer than two images."""
    found = []
    for name, each in values.items():
        if len(each) < 2:
            continue
        variation = float(np.ptp(each, axis=0).max())
        closed, opened = float((each < CLOSED).mean()), float((each > OPEN).mean())
        same = variation <= SAME * float(np.abs(each).max())
        found.append(GateCheck(name, each.shape[1], variation, same, closed, opened))
    return found


def verdict(gates: Sequence[GateCheck], images: int) -> str:
    """One sentence: which channel gates have the same values for all images; "" without gates."""
    if not gates:
        return ""
    same = [g for g in gates if g.same]
    if not same:
        which = "The channel gate depends"
        if len(gates) > 1:
            which = f"All {len(gates)} channel gates depend"
        return f"{which} on the image ({plural(images, 'image')})."
    parts = [f"{gate.name}{_ends(gate)}" for gate in same[:SHOWN]]
    more = f" and {len(same) - SHOWN} more" if len(same) > SHOWN else ""
    verb, pronoun = ("has", "it does") if len(same) == 1 else ("have", "they do")
    conclusion = f", so {pronoun} not attend to anything" if images >= ENOUGH else ""
    return (
        f"{len(same)} of {plural(len(gates), 'channel gate')} {verb} the same values for each of "
        f"{plural(images, 'image')}{conclusion}: {', '.join(parts)}{more}."
    )


def _ends(gate: GateCheck) -> str:
    """How many channels are closed or open for good, in brackets; "" if none."""
    shares = {"closed": gate.closed, "open": gate.opened}
    said = ", ".join(f"{share:.0%} {end}" for end, share in shares.items() if share >= 0.005)
    return f" (channels: {said})" if said else ""
