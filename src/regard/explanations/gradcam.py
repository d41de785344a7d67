"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391) for any of timm's classifiers.

The map has the layer's own size and scale: it is neither upsampled nor normalized.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention import evaluating, of_this_thread
from regard.errors import UsageError


def check_targets(target: Tensor | Sequence[int] | int, logits: Tensor) -> Tensor:
    """One class for each image, (B,), on the device of the logits (B, classes).

    Raises:
        UsageError: the number of classes and images differ, or a class does not exist.
    """
    targets = torch.as_tensor(target, device=logits.device)
    if targets.ndim == 0:
        targets = targets.expand(len(logits))
    if targets.shape != (len(logits),) or targets.dtype.is_floating_point:
        raise UsageError(
            f"target of shape {tuple(targets.shape)}: give {len(logits)} whole numbers"
        )
    if bool(((targets < 0) | (targets >= logits.shape[1])).any()):
        raise UsageError(f"target={targets.tolist()}: classes are 0 to {logits.shape[1] - 1}")
    return targets.long()


def default_layer(model: nn.Module, x: Tensor) -> str:
    """The default layer for Grad-CAM: the network's last feature map.

    timm's `feature_info` names it; for a vision transformer it is the first norm of the last block,
    as the patches that the last block outputs don't reach the class token. For a network without
    this information, or where it names a layer with several maps (HRNet, CrossViT), it is the last
    submodule that outputs a map of more than one position, or else tokens of a grid.

    Raises:
        UsageError: no submodule outputs a map.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(model, "num_prefix_tokens"):
        name = f"blocks.{len(blocks) - 1}.norm1"
        if _has(model, name):
            return name
    info = list(getattr(model, "feature_info", None) or [])
    name = info[-1].get("module", "") if info and isinstance(info[-1], dict) else ""
    outputs, size = _outputs(model, x), (x.shape[-2], x.shape[-1])
    maps = [n for n, t in outputs if t.ndim == 4 and t[0, 0].numel() > 1]
    if name and any(n == name for n, _ in outputs):
        return name
    tokens = [n for n, t in outputs if t.ndim == 3 and t.shape[1] > 4 and _grid(t, model, size)]
    if found := _last_that_matters(model, x, tokens) or maps:
        return found[-1]
    raise UsageError(
        f"{type(model).__name__} has no layer that outputs a map: name one with layer="
    )


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def _outputs(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """Every submodule that outputs a tensor, with a meta tensor of the output's shape."""
    found: list[tuple[str, Tensor]] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                found.append((name, output.to("meta")))

        return hook

    named = [(n, m) for n, m in model.named_modules() if n]
    handles = [m.register_forward_hook(of_this_thread(hook_of(n))) for n, m in named]
    try:
        with torch.no_grad(), evaluating(model):
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _last_that_matters(model: nn.Module, x: Tensor, names: Sequence[str]) -> list[str]:
    """The layers whose patches, not only the class token, affect the logits."""
    outputs: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    layers = [(n, model.get_submodule(n)) for n in names]
    handles = [m.register_forward_hook(of_this_thread(hook_of(n))) for n, m in layers]
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(x[:1].detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    slopes = (
        torch.autograd.grad(logits.max(), list(outputs.values()), allow_unused=True)
        if outputs
        else ()
    )
    return [
        n for n, s in zip(outputs, slopes, strict=True) if s is not None and bool(s[:, 2:].any())
    ]


def _fits(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a grid of square patches can cover an input: both sides rounded down, or both up."""
    (rows, columns), (height, width) = grid, size
    down = max(height / (rows + 1), width / (columns + 1)) < min(height / rows, width / columns)
    up = max((rows - 1) / height, (columns - 1) / width) < min(rows / height, columns / width)
    return down or up


def _grid(tokens: Tensor, model: nn.Module, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """Number of leading non-patch tokens, rows and columns of the patches; None if not a grid.

    The grid is that of the model's patches, or else that of square patches on an input of this
    height and width.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    high, wide = patch if isinstance(patch, tuple | list) else (patch or 0,) * 2
    prefixes = dict.fromkeys((getattr(model, "num_prefix_tokens", 0), 0, 1, 2))
    counts = [(prefix, tokens.shape[1] - prefix) for prefix in prefixes]
    for prefix, count in counts:
        for up in (0, 1) if high and wide else ():  # rounded down or up
            rows, columns = (size[0] + up * (high - 1)) // high, (size[1] + up * (wide - 1)) // wide
            if rows * columns == count > 0:
                return prefix, rows, columns
    for prefix, count in counts:
        for rows in range(1, count + 1):
            if count % rows == 0 and _fits((rows, count // rows), size):
                return prefix, rows, count // rows
    return None


def _channels_first(values: Tensor, model: nn.Module, size: tuple[int, int]) -> Tensor:
    """A layer's output as (B, C, h, w): from NCHW, NHWC (as in Swin), or tokens (B, N, C)."""
    if values.ndim == 4:
        _, a, b, c = values.shape
        first, last = _fits((b, c), size), _fits((a, b), size)
        if first == last:  # ambiguous by shape
            last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return values.permute(0, 3, 1, 2) if last else values
    if values.ndim == 3 and (grid := _grid(values, model, size)) is not None:
        prefix, rows, columns = grid
        return values[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))
    raise UsageError(
        f"the layer outputs {tuple(values.shape)}, not a map: choose another with layer="
    )


def gradcam(
    model: nn.Module,
    x: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    *,
    layer: str | None = None,
) -> Tensor:
    """Grad-CAM: ReLU(sum over c of alpha_c A_c), alpha_c the mean over positions of dy/dA_c.

    A is a layer's output and y the logit of the class, or its log-odds if the network answers with
    logarithms of probabilities (`answers_log_probabilities`; AG-SonoNet, whose heads are averaged):
    their gradients differ by a factor, 1 - p, and near p = 1 that of log p is rounding. The network
    is evaluated as in prediction; its mode, weights, gradients and hooks are unchanged afterwards.

    Args:
        x: (B, C, H, W), preprocessed.
        target: the class to explain, one for each image or one for all; default: the predicted
            class.
        layer: a submodule's name; default: the last feature map, see default_layer.

    Returns:
        (B, h, w), at the layer's size, at least 0, on the device of x.

    Raises:
        UsageError: the layer does not exist, did not run or outputs no map, or the target is not
            a class.
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x = x.detach().clone()
        name = default_layer(model, x) if layer is None else layer
        if not _has(model, name):
            known = [n for n, _ in model.named_children()]
            raise UsageError(f"layer={name!r}: no such layer; in this network: {', '.join(known)}")
        kept: list[Tensor] = []

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"layer={name!r}: its output is {type(output).__name__}, not a map"
                )
            # a leaf, so that nothing before the layer is differentiated, and a copy of it for the
            # layers that follow, which may work in place
            kept[:] = [output.detach().requires_grad_()]
            return kept[0].clone()

        handle = model.get_submodule(name).register_forward_hook(of_this_thread(hook))
        try:
            logits = model(x)
        finally:
            handle.remove()
        if not kept:
            raise UsageError(
                f"layer={name!r} did not run: choose one that runs, and don't compile the model"
            )
        targets = check_targets(logits.argmax(dim=1) if target is None else target, logits)
        targets = targets.clone()  # tensors made in inference mode can't be saved for backward
        scores = logits.gather(1, targets[:, None])
        if getattr(model, "answers_log_probabilities", False) and logits.shape[1] > 1:
            others = logits.scatter(1, targets[:, None], -math.inf)
            scores = scores - others.logsumexp(dim=1, keepdim=True)  # log p - log(1 - p)
        scores = scores.sum()
        if not scores.requires_grad:
            raise UsageError(f"layer={name!r}: the class does not depend on it")
        (slope,) = torch.autograd.grad(scores, kept[0], allow_unused=True)
        if slope is None:
            raise UsageError(f"layer={name!r}: the class does not depend on it")
    size = x.shape[-2], x.shape[-1]
    values = _channels_first(kept[0].detach().float(), model, size)
    weights = _channels_first(slope.float(), model, size).mean(
        dim=(2, 3), keepdim=True
    )  # (B, C, 1, 1)
    return (weights * values).sum(dim=1).relu()
