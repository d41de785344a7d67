"""Training recipes: one dataclass, filled from TOML files and the flags of `regard train`.

Each field's type holds its choices and its range: the command line and the TOML reader check
values against the same types.
"""

# ruff: noqa: RUF009 (`_field` is dataclasses.field with a help text)

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter
from cyclopts.validators import Number

from regard.cells import number_of
from regard.errors import UsageError
from regard.files import plural
from regard.training.field_types import check, convert

if TYPE_CHECKING:
    from regard.data.augment import Augmentation


def _limits(**limits: float) -> Parameter:
    """Bounds of a number (gt, gte, lte), which must be finite in any case."""
    return Parameter(validator=Number(**{"lt": math.inf, **limits}))


_Share = Annotated[float, _limits(gte=0, lte=1)]
_Positive = Annotated[float, _limits(gt=0)]
_NotNegative = Annotated[float, _limits(gte=0)]
_Count = Annotated[int, _limits(gte=1, lte=2**31)]
_Increasing = Annotated[tuple[float, ...], _limits(gte=0)]
_Range = Annotated[tuple[float, float], _limits(gt=0)]  # smallest and largest
GATES_WITH_MUON = 0.01  # gate_lr_scale, see optim.py


def _field(default: Any, group: str, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Each field's help is in its metadata; see `fields_of`.

    Attributes:
        size: (height, width); a single number stands for both.
        model, model_args: the network and its arguments, a TOML file's [model] table. Its in_chans
            is another name of `channels`, and is kept there.
        random_start: values that apply when the weights start at random, the [random_start] table;
            `for_start` applies them. They belong together: `changed` drops all of them if it sets
            one of them to another value, or if one of them is unused with the other values.

    Raises:
        UsageError: a value has a wrong type, is not among its choices, out of range, or unused
            with the others.
    """

    epochs: Annotated[float, _limits(gt=0, lte=1e6)] | None = _field(
        None, "Length",
        "Epochs to train (default: 15 * sqrt(2000 / n) for n training images, from 3 to 60).",
    )  # fmt: skip
    steps: _Count | None = _field(None, "Length", "Optimizer steps to train, instead of epochs.")
    batch_size: _Count = _field(64, "Length", "Batch size per process.")
    accumulate: _Count = _field(1, "Length", "Gradient accumulation steps.")
    partial_batch: bool = _field(
        False, "Length",
        "End each epoch with a smaller batch, instead of filling it from the next epoch.",
    )  # fmt: skip

    optimizer: Literal["sgd", "adamw", "muon"] = _field(
        "sgd", "Optimizer",
        "Optimizer; muon updates matrices by Muon, with steps as long as AdamW's, and vectors "
        "(norms, biases) and channel gates by AdamW.",
    )  # fmt: skip
    lr: _NotNegative = _field(0.1, "Optimizer", "Peak learning rate.")
    momentum: _Share = _field(0.9, "Optimizer", "Momentum (SGD, Muon).")
    nesterov: bool = _field(True, "Optimizer", "Use Nesterov momentum.")
    weight_decay: _NotNegative = _field(
        1e-4, "Optimizer", "Weight decay (L2 for SGD, decoupled for AdamW and Muon)."
    )
    decay_norm_and_bias: bool = _field(
        True, "Optimizer", "Apply weight decay to normalization weights and biases too."
    )
    backbone_lr_scale: _Share = _field(
        1.0, "Optimizer", "Learning rate factor for all but the attention and the classifier."
    )
    gate_lr_scale: _Positive | None = _field(
        None, "Optimizer",
        "Learning rate factor for the channel gates of CBAM and SE (default: 0.01 with Muon, at "
        "whose full rate many become the same for every image; else 1).",
    )  # fmt: skip
    clip_grad: _NotNegative = _field(0.0, "Optimizer", "Clip the gradient to this norm (0 = off).")
    ema_decay: Annotated[float, _limits(gte=0, lte=0.99999)] = _field(
        0.0,
        "Optimizer",
        "Decay of the exponential moving average of the weights (0 = off). It spans "
        "1 / (1 - decay) steps, at most about a ninth of those so far.",
    )

    schedule: Literal["steps", "onecycle", "cosine", "constant"] = _field(
        "onecycle", "Schedule", "Learning rate schedule."
    )
    schedule_unit: Literal["epochs", "steps"] = _field(
        "epochs", "Schedule", "Unit of milestones and warm-up."
    )
    milestones: _Increasing = _field(
        (), "Schedule", "Where the learning rate changes (schedule steps)."
    )
    lr_factors: _Increasing = _field(
        (), "Schedule",
        "Learning rate factors before the first milestone and after each (default: 1 0.1 0.01 …).",
    )  # fmt: skip
    warmup: _NotNegative = _field(0.0, "Schedule", "Length of the linear warm-up.")

    label_smoothing: Annotated[float, _limits(gte=0, lte=0.999)] = _field(
        0.0, "Loss", "Label smoothing."
    )
    class_weights: str = _field(
        "none", "Loss",
        "Class weights in the loss: none, balanced (inverse frequency) or CLASS=WEIGHT,... "
        "(1 for a class that is not named).",
    )  # fmt: skip
    mixup: Annotated[float, _limits(gte=0, lte=10)] = _field(0.0, "Loss", "Mixup alpha (0 = off).")
    self_adaptive: Annotated[float, _limits(gte=0, lt=1)] = _field(
        0.0, "Loss",
        "Self-adaptive training, for wrong labels: after a quarter of the steps each image's "
        "target moves from its label to the network's predictions, with this momentum (0 = off).",
    )  # fmt: skip
    label_noise: _Share = _field(
        0.0, "Loss",
        "Fraction of the training labels changed to another class; class weights and samplers go "
        "by the changed labels.",
    )  # fmt: skip

    sampler: Literal["shuffled", "balanced"] = _field(
        "shuffled", "Sampling", "Shuffle, or draw images with weight 1 / class count."
    )
    sampler_weights: str = _field(
        "", "Sampling", "Factors on the sampling weights: CLASS=WEIGHT,... (default: 1)."
    )
    largest_class_weight: _NotNegative = _field(
        1.0, "Sampling", "Factor on the sampling weight of the class with the most images."
    )
    val: Annotated[float, _limits(gte=0, lte=0.9)] = _field(
        0.1, "Sampling",
        "Validation fraction, for data without a validation split; with fold, of the images "
        "outside of it.",
    )  # fmt: skip
    test: Annotated[float, _limits(gte=0, lte=0.9)] = _field(
        0.2, "Sampling", "Test fraction, for data without a test split."
    )
    limit: _Count | None = _field(
        None, "Sampling", "Train on this many images only, with the classes in proportion."
    )
    split_seed: Annotated[int, _limits(gte=0, lte=2**31)] = _field(
        0, "Sampling", "Random seed of the splits."
    )
    fold: str | None = _field(
        None, "Sampling", "Cross-validation: K/N tests fold K of N, instead of a test fraction."
    )
    keep_together: bool = _field(
        False,
        "Sampling",
        "Put near-duplicates (the same picture cropped, saved again, ...) into the same split.",
    )

    size: Annotated[tuple[int, ...], _limits(gte=4, lte=8192)] | None = _field(
        None,
        "Images",
        "Input size in pixels: one number, or height and width (default: by the data).",
    )
    channels: int | None = _field(
        None, "Images", "Input channels, 1 or 3 (default: 3 if any image has color, else 1)."
    )
    resize: Literal["squash", "crop", "pad"] = _field(
        "crop", "Images", "Fit images by squashing, by a center crop, or by padding."
    )
    crop_pct: Annotated[float, _limits(gte=0.1, lte=1)] = _field(
        1.0, "Images", "Fraction of the shorter side that the center crop keeps."
    )
    resize_first: bool = _field(
        False, "Images", "With resize=crop: resize the whole image, then crop, as torchvision does."
    )
    normalization: Literal["data", "model", "image"] = _field(
        "data", "Images",
        "Mean and standard deviation: of the training images, of the pretrained network, or of "
        "each image.",
    )  # fmt: skip
    max_unreadable: _Share = _field(
        0.01,
        "Images",
        "Stop before training if more than this fraction of the images is unreadable.",
    )

    full_decode: bool = _field(
        False, "Images", "Decode JPEG files at full size, however small the input."
    )

    random_crop: Literal["none", "shift", "resized"] = _field(
        "none", "Augmentation", "Random crop: after padding (shift), or of random area (resized)."
    )
    crop_shift: _Share = _field(
        0.125, "Augmentation", "Padding of random_crop=shift, as a fraction of the side."
    )
    crop_scale: Annotated[tuple[float, float], _limits(gt=0, lte=1)] = _field(
        (0.08, 1.0), "Augmentation", "Smallest and largest area of random_crop=resized."
    )
    flip: _Share = _field(0.5, "Augmentation", "Horizontal flip probability.")
    rotate: Annotated[float, _limits(gte=0, lte=180)] = _field(
        0.0, "Augmentation", "Maximum rotation in degrees."
    )
    zoom: _Range = _field((1.0, 1.0), "Augmentation", "Smallest and largest zoom factor.")
    axis_scale: _Range = _field(
        (1.0, 1.0), "Augmentation", "Smallest and largest sampling grid scale, drawn per axis."
    )
    shift: _Share = _field(0.0, "Augmentation", "Maximum shift, as a fraction of the side.")
    color_jitter: _Share = _field(
        0.0, "Augmentation", "Maximum change of brightness, contrast and saturation."
    )
    lighting: _Share = _field(
        0.0, "Augmentation", "Standard deviation of AlexNet's PCA color augmentation (0 = off)."
    )
    random_erasing: _Share = _field(0.0, "Augmentation", "Random erasing probability.")

    graft: Literal["none", "se", "cbam"] = _field(
        "none", "Network",
        "Insert attention into the residual branches of a plain network, or at the end of its "
        "stages if it has none. It starts neutral: the network's answers stay the same.",
    )  # fmt: skip

    pretrained: Literal["auto", "yes", "no"] = _field(
        "no", "Run",
        "Start from pretrained weights; auto: timm's weights of the plain network (from the local "
        "cache or the hub), else Regard's own where they fit, else random ones.",
    )  # fmt: skip
    select: Literal["best", "last"] = _field(
        "best", "Run", "Weights to keep: of the best epoch on validation images, or the last."
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = _field(
        "auto", "Run",
        "Precision; auto is bf16 where the hardware supports it, else fp16 on GPUs that support "
        "that, else fp32.",
    )  # fmt: skip
    compile: Literal["no", "yes", "graphs", "auto"] = _field(
        "no", "Run",
        "Use torch.compile; graphs: record the passes as CUDA graphs instead, which takes a second "
        "and speeds up small batches (CUDA only); auto measures what pays.",
    )  # fmt: skip
    fuse: Literal["auto", "yes", "no"] = _field(
        "auto", "Run",
        "Compute the end of ResNet blocks with CBAM as one operator, which saves memory and "
        "time; auto does so on CPUs and on CUDA, where it was measured.",
    )  # fmt: skip
    sync_bn: bool = _field(
        False, "Run",
        "Batch norm over the batches of all processes together (several GPUs only).",
    )  # fmt: skip
    grad_checkpointing: bool = _field(
        False, "Run", "Gradient checkpointing: less memory, more time."
    )
    fit_memory: bool = _field(
        False, "Run",
        "Split each step into as few equal batches as fit in memory (batch norm sees the smaller "
        "batches).",
    )  # fmt: skip
    memory: Literal["auto", "yes", "no"] = _field(
        "auto", "Run", "Hold decoded images in memory, or stream them."
    )
    decode: Literal["cpu", "device"] = _field(
        "cpu", "Run",
        "Where JPEG files of streamed training images are decoded; device: by the GPU (CUDA, extra "
        "gpu).",
    )  # fmt: skip
    workers: Annotated[int, _limits(gte=0, lte=256)] | None = _field(
        None,
        "Run",
        "Data loading processes of each training process (default: its share of the cores, at most "
        "8).",
    )
    eval_every: _Positive = _field(1.0, "Run", "Epochs between evaluations.")
    save_minutes: _NotNegative = _field(
        5.0, "Run", "Minutes between checkpoints, in addition to one per evaluation."
    )
    faithfulness_images: Annotated[int, _limits(gte=0, lte=4096)] = _field(
        24, "Run", "Test images on which the report scores the attention maps (0 = none)."
    )
    seed: Annotated[int, _limits(gte=0, lte=2**31)] = _field(
        0, "Run",
        "Random seed for weight initialization, sample order, augmentation and label noise; "
        "split_seed is the one for the splits.",
    )  # fmt: skip

    # of the network, not flags
    model: str | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random_start: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "random_start", _checked_table(self.random_start))
        arguments, values = with_channels(self.model_args, {"channels": self.channels})
        object.__setattr__(self, "model_args", arguments)
        object.__setattr__(self, "channels", values["channels"])
        for f in fields_of():
            value = convert(f.name, getattr(self, f.name), _HINTS[f.name])
            check(f.name, value, _HINTS[f.name])
            object.__setattr__(self, f.name, value)
        if self.size is not None and len(self.size) == 1:
            object.__setattr__(self, "size", self.size * 2)
        _check_together(self)
        _ = self.fold_of

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """The test fold and the number of folds, or None.

        Raises:
            UsageError: `fold` is not K/N with K from 1 to N, and N at least 2.
        """
        if self.fold is None:
            return None
        k, slash, n = self.fold.partition("/")
        if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n) >= 2):
            raise UsageError(f"fold={self.fold!r}: give K/N with K from 1 to N, such as 2/5")
        return int(k), int(n)

    @property
    def augmentation(self) -> "Augmentation":
        """The augmentation fields."""
        from regard.data.augment import Augmentation  # torch, not for `regard --help`

        names = [f.name for f in dataclasses.fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})

    def for_start(self, random: bool) -> "Recipe":
        """The recipe for weights that start at random, or not; without the random_start table.

        With Muon, `gate_lr_scale` gets its default.
        """
        values = self.random_start if random else {}
        recipe = dataclasses.replace(self, random_start={}).changed(**values)
        if recipe.optimizer == "muon" and recipe.gate_lr_scale is None:
            recipe = recipe.changed(gate_lr_scale=GATES_WITH_MUON)
        return recipe

    def changed(self, **changes: Any) -> "Recipe":
        """A copy of the recipe with other values; lists are accepted for tuples.

        A value replaces those that it excludes: `steps` removes the epochs, another `schedule` the
        old one's milestones, another `optimizer` Muon's default of `gate_lr_scale`, and a value
        other than `random_start`'s removes that whole table.

        Raises:
            UsageError: a name is unknown, or a value has a wrong type, is out of range or is unused
                with the others.
        """
        values = cast(changes, [f.name for f in dataclasses.fields(self)])
        given = {k for k, v in values.items() if v is not None}
        for one, other in (("epochs", "steps"), ("steps", "epochs")):
            if one in given:
                values.setdefault(other, None)
        after = {f.name: getattr(self, f.name) for f in fields_of()} | values
        for f in fields_of():
            if (reason := _unused(f.name, after)) is None:
                continue
            if f.name in given:
                raise UsageError(f"{f.name}={after[f.name]!r}: not used with {reason}")
            values[f.name] = f.default
        if self.optimizer == "muon" != after["optimizer"] and self.gate_lr_scale == GATES_WITH_MUON:
            values.setdefault("gate_lr_scale", None)  # Muon's default, which a run's recipe has
        table = self.random_start
        moved = any(after[k] != value for k, value in table.items() if k in given)
        started = {**after, **table}
        if moved or any(_unused(k, started) for k in {*given, *table} & {*after}):
            values["random_start"] = {}
        return dataclasses.replace(self, **values)


_HINTS = get_type_hints(Recipe, include_extras=True)

_JOINED_DIGITS = re.compile(r"[^,]*=[\s\d.]*\d_\d[^,=]*(?=,|$)")  # a=4_7, which Python reads as 47

# When a field is used: another field, and that field's values with which it is used.
_USED_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "momentum": ("optimizer", ("sgd", "muon")),
    "nesterov": ("optimizer", ("sgd", "muon")),
    "milestones": ("schedule", ("steps",)),
    "lr_factors": ("schedule", ("steps",)),
    "warmup": ("schedule", ("steps", "cosine", "constant")),
    "schedule_unit": ("schedule", ("steps", "cosine", "constant")),
    "test": ("fold", (None,)),
    "crop_pct": ("resize", ("crop",)),
    "resize_first": ("resize", ("crop",)),
    "crop_shift": ("random_crop", ("shift",)),
    "crop_scale": ("random_crop", ("resized",)),
}


def _unused(name: str, values: Mapping[str, Any]) -> str | None:
    """The value that makes a field unused, or None."""
    other, where = _USED_WITH.get(name, (name, (values[name],)))
    return None if values[other] in where else f"{other}={values[other]}"


def _checked_table(values: Any) -> dict[str, Any]:
    """The values of `random_start`, converted to their fields' types.

    Raises:
        UsageError: not a table, or it sets a field that is needed before the start is chosen.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"random_start={values!r}: give a table of recipe values")
    groups = ("Optimizer", "Loss", "Augmentation")
    known = [f.name for f in fields_of() if f.metadata["group"] in groups]
    for name in values:
        if name not in known:
            raise UsageError(f"random_start has {name!r}; it can have {', '.join(known)}")
    return cast(values, known)


def _check_together(recipe: Recipe) -> None:
    """Checks what depends on more than one value."""
    if recipe.epochs is not None and recipe.steps is not None:
        raise UsageError(f"epochs={recipe.epochs:g} and steps={recipe.steps}: give one of them")
    if recipe.fold is None and recipe.val + recipe.test >= 1:  # a fold is the test
        raise UsageError(f"val={recipe.val} and test={recipe.test} leave nothing to train on")
    if recipe.size is not None and len(recipe.size) != 2:
        raise UsageError(f"size={recipe.size}: give one number, or height and width")
    if recipe.channels not in (None, 1, 3):
        raise UsageError(f"channels={recipe.channels}: choose 1 or 3")
    if not recipe.class_weights.strip(", "):
        raise UsageError(
            f"class_weights {recipe.class_weights!r}: give none, balanced or CLASS=WEIGHT,..."
        )
    if recipe.class_weights not in ("none", "balanced"):
        _check_weights("class_weights", recipe.class_weights)
    _check_weights("sampler_weights", recipe.sampler_weights)
    for name in ("milestones", "crop_scale", "zoom", "axis_scale"):
        value = getattr(recipe, name)
        if list(value) != sorted(value):
            raise UsageError(f"{name}={value}: must be in increasing order")
    if recipe.self_adaptive and recipe.mixup:
        raise UsageError(
            f"self_adaptive={recipe.self_adaptive:g} and mixup={recipe.mixup:g}: predictions for "
            "mixed images are no targets for a single image; give one of them"
        )
    factors, milestones = recipe.lr_factors, recipe.milestones
    if factors and len(factors) != len(milestones) + 1:
        raise UsageError(
            f"lr_factors={factors}: give one more than {plural(len(milestones), 'milestone')}"
        )
    values = {f.name: getattr(recipe, f.name) for f in fields_of()}
    for f in fields_of():
        if values[f.name] != f.default and (reason := _unused(f.name, values)) is not None:
            raise UsageError(f"{f.name}={values[f.name]!r}: not used with {reason}")


def _check_weights(name: str, text: str) -> None:
    """Refuses CLASS=WEIGHT,... whose last weight, or one of joined digits, is none.

    More can't be checked without the data: names of classes may have commas and equals signs.
    """
    last = text.strip(", ").rpartition(",")[2].strip()
    if not text:
        return
    if "=" not in last:
        raise UsageError(f"{name}: {last!r} is not CLASS=WEIGHT")
    if said := _JOINED_DIGITS.findall(text):
        raise UsageError(f"{name}: {said[0].strip()!r} has a weight that is not a number")
    try:
        weight = number_of(last.rpartition("=")[2])
    except ValueError:
        raise UsageError(f"{name}: {last!r} has a weight that is not a number") from None
    if not 0 <= weight < math.inf:
        raise UsageError(f"{name}: {last!r}: give a weight of at least 0")


def with_channels(
    arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A network's arguments without in_chans, and a recipe's values with it as their `channels`.

    Raises:
        UsageError: both are given, and differ.
    """
    arguments, values = dict(arguments), dict(values)
    if (own := arguments.pop("in_chans", None)) is None:
        return arguments, values
    if values.get("channels") not in (None, own):
        raise UsageError(f"in_chans={own} and channels={values['channels']}: give one of them")
    return arguments, {**values, "channels": own}


def fields_of() -> list[dataclasses.Field[Any]]:
    """The fields that are flags, with help and group in their metadata."""
    return [f for f in dataclasses.fields(Recipe) if "help" in f.metadata]


def cast(values: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Converts values from TOML or Python to their fields' types.

    Raises:
        UsageError: a name is not in `known`, or a value has another type.
    """
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"a recipe has no {name!r}; {hint}")
    return {name: convert(name, value, _HINTS[name]) for name, value in values.items()}
