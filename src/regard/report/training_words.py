"""How a run was prepared and trained, in sentences, from its recipe and its measurements.

Every recipe entry that changes the result appears in one of these sentences if it differs
from its default; numbers describe what was done rather than what was requested.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from regard.attention import attention_kinds
from regard.files import about, plural
from regard.report.words import SPLITS

# Defaults of entries that a run's recipe.toml may lack, as they have no value or are newer.
_DEFAULTS: dict[str, Any] = {
    "accumulate": 1, "partial_batch": False, "nesterov": True, "momentum": 0.9,
    "decay_norm_and_bias": True, "backbone_lr_scale": 1.0, "gate_lr_scale": None,
    "clip_grad": 0.0, "ema_decay": 0.0,
    "schedule_unit": "epochs", "milestones": (), "lr_factors": (), "warmup": 0.0,
    "label_smoothing": 0.0, "class_weights": "none", "mixup": 0.0, "label_noise": 0.0,
    "self_adaptive": 0.0,
    "sampler": "shuffled", "sampler_weights": "", "largest_class_weight": 1.0, "limit": None,
    "split_seed": 0, "fold": None, "keep_together": False, "normalization": "data",
    "full_decode": False, "decode": "cpu", "random_crop": "none", "crop_shift": 0.125,
    "crop_scale": (0.08, 1.0),
    "flip": 0.5, "rotate": 0.0, "zoom": (1.0, 1.0), "axis_scale": (1.0, 1.0), "shift": 0.0,
    "color_jitter": 0.0, "lighting": 0.0, "random_erasing": 0.0, "graft": "none",
    "sync_bn": False, "eval_every": 1.0, "seed": 0,
}  # fmt: skip
_ATTENTION = re.compile(r"attention|attn|squeeze|^SEModule|cbam", re.IGNORECASE)
_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon (vectors by AdamW)"}
_RESIZE = {
    "squash": "scaled to", "crop": "scaled and cropped at the center to",
    "pad": "scaled and padded to",
}  # fmt: skip


def with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recipe as in its file, with the entries that the file may lack."""
    return _DEFAULTS | dict(recipe)


def partitions(
    recipe: Mapping[str, Any],
    counts: Mapping[str, int],
    given: Collection[str] | None,
    groups: bool,
) -> str:
    """The number of images in each partition, and where the partitions come from.

    Args:
        recipe: with every entry.
        counts: images by split.
        given: the splits that the data comes with; None: not known.
        groups: whether the images come in groups.
    """
    sizes = ", ".join(f"{SPLITS[s]} {plural(n, 'image')}" for s, n in counts.items())
    parts = [f"{sizes}.", _origin(recipe, counts, given, groups)]
    if recipe["keep_together"] and (given is None or set(counts) - set(given)):
        parts.append("Near-duplicate images were put into the same partition.")
    if recipe["limit"] == counts.get("train"):
        parts.append(
            f"The training images were limited to {recipe['limit']:,}, drawn at random with the "
            "classes in proportion; the other partitions were left whole."
        )
    return " ".join(parts)


def _origin(
    recipe: Mapping[str, Any], counts: Mapping[str, int], given: Collection[str] | None,
    groups: bool,
) -> str:  # fmt: skip
    whole = ", no group divided" if groups else ""
    how = f"at random (seed {recipe['split_seed']}), stratified by class{whole}"
    if recipe["fold"]:
        fold, _, folds = recipe["fold"].partition("/")
        val = f"; the {_named(['val'])} were drawn from the other folds" if "val" in counts else ""
        return f"The test images are fold {fold} of {folds}, which were drawn {how}{val}."
    if given is None:
        return "The partitions are stored in splits.csv."
    drawn = [split for split in counts if split not in given]
    if not given:
        return f"They were drawn {how}."
    if not drawn:
        return "The partitions were given with the data."
    had = _named([split for split in counts if split in given])
    return (
        f"The {had} were given with the data; the {_named(drawn)} were drawn from its training "
        f"images {how}."
    )


def _named(splits: list[str]) -> str:
    return f"{' and '.join(SPLITS[s] for s in splits)} images"


def technology(network: nn.Module) -> str:
    """The kind of a network as text: whether it is convolutional, and has attention."""
    parts = list(network.modules())[1:]  # the network's own class name says nothing about its parts
    # a vision transformer has one such layer, which divides the image into patches
    layers = [part for part in parts if isinstance(part, nn.Conv2d)]
    convolutional = sum(max(layer.kernel_size) > 1 for layer in layers) > 1
    kind = "a convolutional neural network" if convolutional else "a neural network"
    named = any(_ATTENTION.search(type(part).__name__) for part in parts)  # timm's have no maps
    return f"{kind} with attention" if named or attention_kinds(network) else kind


# ---- images ------------------------------------------------------------------------------
def preprocessing(
    recipe: Mapping[str, Any], preprocess: Mapping[str, Any], *, started: bool = False
) -> str:
    """How images become input, and how training images were augmented.

    Args:
        recipe: with every entry.
        preprocess: of the run's plan.
        started: whether the network started from given weights, rather than at random.
    """
    c, h, w = preprocess["input_size"]
    how = _RESIZE.get(preprocess.get("resize", ""), "scaled to")
    share = preprocess.get("crop_pct", 1.0)
    cut = f" (a crop of {share:g} of the shorter side)" if share != 1 else ""
    first = " (the whole image resized, then cropped)" if preprocess.get("resize_first") else ""
    whose = "starting weights" if started else "network's configuration"
    normal = {
        "data": "with the mean and deviation of the training images",
        "image": "with each image's own mean and deviation",  # also if the starting weights' is
    }.get(
        "image" if preprocess.get("normalization") == "image" else recipe["normalization"],
        f"with the mean and deviation of the {whose}",
    )
    channels = "grayscale" if c == 1 else "color" if c == 3 else f"{c} channels"
    said = f"Images were {how} {w}×{h} pixels{cut}{first}, {channels}, and normalized {normal}."
    if (values := preprocess.get("value_range")) is not None:
        said += (
            f" Pixel values from {values[0]:g} to {values[1]:g} became 0 to 1 in images without a "
            "range of their own (signed, 32-bit and float ones, DICOM without a window)."
        )
    if recipe["full_decode"]:
        said += " JPEG files were decoded at full size."
    if recipe["decode"] == "device":
        said += " Streamed JPEG files of training images were decoded on the training device."
    augmentation = _augmentation(recipe, color=c == 3)
    return f"{said} Augmentation of training images: {augmentation}." if augmentation else said


def _augmentation(r: Mapping[str, Any], color: bool) -> str:
    listed = []
    if r["random_crop"] == "shift":
        listed.append(f"random crop after padding by {r['crop_shift']:g} of the side")
    elif r["random_crop"] == "resized":
        low, high = r["crop_scale"]
        listed.append(f"random resized crop of {low:g} to {high:g} of the area")
    for name in ("flip", "rotate", "zoom", "axis_scale", "shift", "color_jitter", "lighting",
                 "random_erasing", "mixup"):  # fmt: skip
        value = r[name]
        if name == "lighting" and not color:
            continue
        if isinstance(value, list | tuple):
            if tuple(value) != (1.0, 1.0):
                listed.append(f"{name.replace('_', ' ')} {value[0]:g} to {value[1]:g}")
        elif value:
            listed.append(f"{name.replace('_', ' ')} {value:g}")
    return ", ".join(listed)


# ---- training ----------------------------------------------------------------------------
def training(
    recipe: Mapping[str, Any],
    facts: Mapping[str, Any],
    head_weights: Collection[float] = (),
    channel_gates: bool = False,
) -> str:
    """The optimizer and its steps, the loss, and what else affects the weights.

    Args:
        recipe: with every entry.
        facts: what the run measured.
        head_weights: weights in the loss, for a network with several heads.
        channel_gates: whether the network has channel gates.
    """
    r = recipe
    rate = f"learning rate {r['lr']:g}"
    if r["backbone_lr_scale"] != 1:
        rate += f" ({r['backbone_lr_scale']:g} of it for all but attention and classifier)"
    if channel_gates and r["gate_lr_scale"] is not None:
        by = ", by AdamW" if r["optimizer"] == "muon" else ""
        rate += f" ({r['gate_lr_scale']:g} of it for the channel gates{by})"
    loss = "cross entropy"
    if len(head_weights) > 1:
        listed = ", ".join(f"{w:g}" for w in head_weights)
        loss += f" summed over {len(head_weights)} heads (weights {listed})"
    noise = (
        f"{r['label_noise']:g} of the training labels changed to another class at random"
        if r["label_noise"] else ""
    )  # fmt: skip
    smoothing = f"label smoothing {r['label_smoothing']:g}" if r["label_smoothing"] else ""
    adaptive = (
        f"self-adaptive training (momentum {r['self_adaptive']:g})" if r["self_adaptive"] else ""
    )
    clip = f"gradients clipped to a norm of {r['clip_grad']:g}" if r["clip_grad"] else ""
    average = f"moving average of the weights ({_average_decay(r)})" if r["ema_decay"] else ""
    parts = [
        _OPTIMIZERS.get(r["optimizer"], r["optimizer"]), rate, _schedule(r), _momentum(r),
        _decay(r), clip, average, _epochs(facts, r), batches(facts, r), loss, smoothing, adaptive,
        noise,
        f"{facts['precision']} arithmetic" if facts.get("precision") else "", f"seed {r['seed']}",
    ]  # fmt: skip
    time = f"in {facts['seconds']:.0f} s on {facts['device']}"
    return f"{', '.join(part for part in parts if part)}, {time}."


def _momentum(r: Mapping[str, Any]) -> str:
    if r["optimizer"] not in ("sgd", "muon"):
        return ""
    kind = "Nesterov momentum" if r["nesterov"] and r["momentum"] > 0 else "momentum"
    return f"{kind} {r['momentum']:g}"


def _decay(r: Mapping[str, Any]) -> str:
    spared = bool(r["weight_decay"]) and not r["decay_norm_and_bias"]
    return f"weight decay {r['weight_decay']:g}{' (not of norms and biases)' if spared else ''}"


def _schedule(r: Mapping[str, Any]) -> str:
    said, unit = f"schedule {r['schedule']}", r["schedule_unit"]
    if r["milestones"]:
        said += f" at {', '.join(f'{m:g}' for m in r['milestones'])} {unit}"
    if r["lr_factors"]:
        said += f" with factors {', '.join(f'{f:g}' for f in r['lr_factors'])}"
    return f"{said} after a linear warm-up of {r['warmup']:g} {unit}" if r["warmup"] else said


def batches(facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The number of images per step, and the batches in which they were computed.

    Args:
        facts: what the run measured: batch sizes that fitted the memory, processes.
        recipe: its batch size and accumulation, for runs that did not measure them.
    """
    size, parts = facts.get("batches") or (recipe["batch_size"], recipe.get("accumulate", 1))
    processes = facts.get("processes", 1)
    if parts * processes == 1:
        return f"batch size {size}"
    where = f" in each of {processes} processes" if processes > 1 else ""
    shared = ", batch norm over all processes" if processes > 1 and recipe.get("sync_bn") else ""
    each = f"a batch of {size}" if parts == 1 else f"{parts} batches of {size}"
    return f"steps of {size * parts * processes} images ({each}{where}{shared})"


def _average_decay(r: Mapping[str, Any]) -> str:
    return f"decay {r['ema_decay']:g}, but at most (1 + t) / (10 + t) at step t from 0"


def _epochs(facts: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    ends = _ends(facts, r) if r["partial_batch"] else ""
    return f"{plural(facts['steps'], 'step')} ({about(facts['epochs'], 'epoch')}{ends})"


def _ends(facts: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    """How epochs that begin no other one ended."""
    if (count := facts.get("counts", {}).get("train")) is None:
        return ", each ending with a smaller batch"
    size, parts = facts.get("batches") or (r["batch_size"], r["accumulate"])
    images = size * parts * facts.get("processes", 1)
    full, rest = divmod(count, images)
    if not rest or facts["steps"] <= full:  # or it ended before
        return ""
    if facts["steps"] / facts["epochs"] > full + 0.5:
        return ", each ending with a smaller batch"
    return f", each without its last {plural(rest, 'image')}" if full else ""


def imbalance(recipe: Mapping[str, Any]) -> str:
    """What was done about classes of different sizes."""
    r, used = recipe, []
    if r["class_weights"] != "none":
        used.append(f"class weights in the loss: {r['class_weights']}")
    if r["sampler"] == "balanced":
        used.append("images drawn in inverse proportion to the size of their class")
    if r["sampler_weights"]:
        used.append(f"factors on the frequency with which images are drawn: {r['sampler_weights']}")
    if r["largest_class_weight"] != 1:
        used.append(
            f"images of the largest class drawn {r['largest_class_weight']:g} times as often as "
            "otherwise"
        )
    if not used:
        return "Nothing was done about class imbalance."
    return f"{used[0][0].upper()}{'; '.join(used)[1:]}."


def selection(recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Which epoch's weights are the result, whether they are averages, and what chose them."""
    chosen = facts.get("selected")
    if not chosen:
        return ""
    decay = recipe["ema_decay"]
    what = f"a moving average over the steps (decay {decay:g})" if decay else "those"
    until = "up to" if decay else "of"
    if chosen["by"] == "the last epoch":
        return f"The weights are {what} {until} the last epoch; no image chose them."
    a_step = facts["epochs"] / facts["steps"]  # more than an epoch, where images are few
    every = about(max(recipe["eval_every"], a_step), "epoch").removeprefix("1 ")
    return (
        f"The weights are {what} {until} epoch {chosen['epoch']:g}, chosen by {chosen['by']}; it "
        f"was measured every {every}."
    )
