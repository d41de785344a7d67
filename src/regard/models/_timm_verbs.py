"""timm's methods for a network of consecutive stages: what no paper describes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

from regard.compat import feature_take_indices
from regard.errors import UsageError
from regard.models._common import fitted


class StagedNetwork(nn.Module):
    """A network whose stages each end in a map, with `global_pool` and the classifier `fc`.

    Args:
        num_classes: of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        stages: the attribute of each map's stage, in order; "" for the stem's map.
    """

    def __init__(
        self, num_classes: int, in_chans: int, drop_rate: float, stages: Sequence[str]
    ) -> None:
        super().__init__()
        self.num_classes: int = num_classes
        self.in_chans: int = in_chans
        self.drop_rate: float = drop_rate
        self.grad_checkpointing: bool = False
        self.stage_names = list(stages)
        self.feature_info: list[dict[str, Any]] = []
        self.num_features: int = 0
        self.head_hidden_size: int = 0
        self.global_pool: Any
        self.fc: Any
        self.maxpool: Any  # only in networks with a pooling after the stem

    def _place(self, device: Any, dtype: Any) -> None:
        """Moves the finished network to the device and dtype in timm's arguments."""
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def _entry(self, x: Tensor) -> Tensor:
        """The layers before the first map's stage."""
        return x

    def _steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The functions that compute each map from the previous one."""
        return [self._checkpointed(getattr(self, name)) for name in self.stage_names]

    def _checkpointed(self, stage: nn.Module) -> Callable[[Tensor], Tensor]:
        return (lambda x: checkpoint_seq(stage, x)) if self.grad_checkpointing else stage

    def _normed(self, x: Tensor) -> Tensor:
        """The last stage's map after the network's own final norm."""
        return x

    def _final(self, maps: list[Tensor]) -> Tensor:
        """The output of forward_features, from the maps of all stages."""
        return self._normed(maps[-1])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: each block is recomputed in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; 0 classes gives pooled features, and pool "" the map."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        new = create_classifier(self.num_features, num_classes, pool)
        self.global_pool, self.fc = (fitted(self, module) for module in new)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if num_classes > 0:
            nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
            nn.init.zeros_(self.fc.bias)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The map after each stage, and forward_features' map; see timm.

        norm also applies the final norm to the last stage's map. With stop_early, the first
        of the two results is the last map that was computed.
        """
        if output_fmt != "NCHW":
            raise UsageError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported")
        steps = self._steps()
        take, last = feature_take_indices(len(steps), indices)
        x = self._entry(x)
        maps = []
        for step in steps[: last + 1] if stop_early else steps:
            x = step(x)
            maps.append(x)
        complete = len(maps) == len(steps)
        final = self._final(maps) if complete and not intermediates_only else x
        if norm and complete:
            maps[-1] = self._normed(x)
        taken = [m for i, m in enumerate(maps) if i in take]
        return taken if intermediates_only else (final, taken)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the layers that forward_intermediates does not need for these maps."""
        count = len(self.stage_names)
        take, last = feature_take_indices(count, indices)
        cut = last < count - 1
        for name in self.stage_names[last + 1 :]:
            setattr(self, name, nn.Sequential())
        if last == 0 and hasattr(self, "maxpool"):  # the pooling follows the stem's map
            self.maxpool = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if (prune_norm or cut) and hasattr(self, "norm"):
            for name in ("norm", "act"):
                setattr(self, name, nn.Identity())
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take
