"""Recipes: how a network is trained, as one dataclass that TOML files fill.

Every field is a flag of `regard train` and a key of a recipe's TOML file, and is documented
here alone. `regard recipes` lists the shipped ones; each file's header gives its source,
its command, and what was measured with it.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from regard.data.augment import Augmentation
from regard.errors import UsageError

GROUPS = ("Length", "Optimizer", "Schedule", "Loss", "Sampling", "Images", "Augmentation", "Run")


def _field(default: Any, group: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"group": group, "help": text, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. What every field means stands beside it; `fields_of` lists them.

    Raises:
        UsageError: a value is not among a field's choices or outside its range.
    """

    epochs: float | None = _field(
        None, "Length", "Passes over the training images. Without it and --steps: by their number."
    )
    steps: int | None = _field(None, "Length", "Optimizer steps, instead of epochs.")
    batch_size: int = _field(64, "Length", "Images of a step, in each process.")
    accumulate: int = _field(1, "Length", "Batches whose gradients are added up to one step.")

    optimizer: str = _field("sgd", "Optimizer", "sgd or adamw.", ("sgd", "adamw"))
    lr: float = _field(0.1, "Optimizer", "Learning rate at its peak.")
    momentum: float = _field(0.9, "Optimizer", "Of SGD.")
    nesterov: bool = _field(True, "Optimizer", "Nesterov's momentum.")
    weight_decay: float = _field(1e-4, "Optimizer", "L2 for SGD, decoupled for AdamW.")
    decay_norm_and_bias: bool = _field(
        True, "Optimizer", "Decay biases and norms too, as the papers do."
    )
    backbone_lr_scale: float = _field(
        1.0, "Optimizer", "Factor on the learning rate of all but gates and classifier."
    )
    clip_grad: float = _field(0.0, "Optimizer", "Largest norm of the gradient; 0: no bound.")
    ema_decay: float = _field(
        0.0, "Optimizer", "Decay a step of a moving average of weights; 0: none."
    )

    schedule: str = _field(
        "onecycle", "Schedule", "steps, onecycle, cosine or constant.",
        ("steps", "onecycle", "cosine", "constant"),
    )  # fmt: skip
    schedule_unit: str = _field(
        "epochs", "Schedule", "What milestones and warm-up count: epochs or steps.",
        ("epochs", "steps"),
    )  # fmt: skip
    milestones: tuple[float, ...] = _field((), "Schedule", "Where schedule=steps changes.")
    lr_factors: tuple[float, ...] = _field(
        (), "Schedule",
        "Of lr: before the first milestone and after each; without: 1, 0.1, 0.01 ...",
    )  # fmt: skip
    warmup: float = _field(0.0, "Schedule", "Linear rise from 0 to lr, in `unit`.")

    label_smoothing: float = _field(0.0, "Loss", "Share given to the other classes, 0 to 1.")
    class_weights: str = _field(
        "none", "Loss",
        "none, balanced (1 / count, mean 1), or CLASS=WEIGHT,CLASS=WEIGHT; others count 1.",
    )  # fmt: skip
    mixup: float = _field(0.0, "Loss", "Alpha of mixup's Beta distribution; 0: none.")
    label_noise: float = _field(
        0.0, "Loss", "Share of training labels changed to another class (RAN, table 4)."
    )

    sampler: str = _field(
        "shuffled", "Sampling", "shuffled, or balanced: drawn with weight 1 / class count.",
        ("shuffled", "balanced"),
    )  # fmt: skip
    sampler_weights: str = _field(
        "", "Sampling", "Factors on a class's weight: CLASS=WEIGHT,CLASS=WEIGHT; others 1."
    )
    val: float = _field(0.1, "Sampling", "Share for validation where the data has no such split.")
    test: float = _field(0.2, "Sampling", "Share for the test where the data has no such split.")

    size: int | None = _field(None, "Images", "Side of the input in pixels; without: by the data.")
    resize: str = _field(
        "crop", "Images", "squash (whole image), crop (its middle) or pad (whole, with margins).",
        ("squash", "crop", "pad"),
    )  # fmt: skip
    crop_pct: float = _field(1.0, "Images", "Share of the side that the middle crop keeps.")
    normalization: str = _field(
        "data", "Images", "Mean and deviation of the data, of the model, or each image's own.",
        ("data", "model", "image"),
    )  # fmt: skip
    max_unreadable: float = _field(
        0.01, "Images", "Largest share of images that can't be read; more ends the run at once."
    )

    random_crop: str = _field(
        "none", "Augmentation", "none, shift (pad and crop), or resized (of random area).",
        ("none", "shift", "resized"),
    )  # fmt: skip
    crop_shift: float = _field(0.125, "Augmentation", "Of random_crop=shift: share of the side.")
    crop_scale: tuple[float, float] = _field(
        (0.08, 1.0), "Augmentation", "Of random_crop=resized: least and largest area."
    )
    flip: float = _field(0.5, "Augmentation", "Chance of a horizontal flip.")
    rotate: float = _field(0.0, "Augmentation", "Largest rotation, degrees either way.")
    zoom: tuple[float, float] = _field((1.0, 1.0), "Augmentation", "Least and largest zoom.")
    axis_scale: tuple[float, float] = _field(
        (1.0, 1.0), "Augmentation", "Sampling grid's scale, drawn per axis (AG-SonoNet: 0.7 1.3)."
    )
    shift: float = _field(0.0, "Augmentation", "Largest shift, share of the side either way.")
    color_jitter: float = _field(
        0.0, "Augmentation", "Largest change of brightness, contrast and saturation."
    )
    lighting: float = _field(
        0.0, "Augmentation", "Deviation of AlexNet's PCA color augmentation (the paper: 0.1)."
    )
    random_erasing: float = _field(0.0, "Augmentation", "Chance of erasing a random rectangle.")

    select: str = _field(
        "best", "Run", "Weights kept: best on validation (where there is one), or last.",
        ("best", "last"),
    )  # fmt: skip
    precision: str = _field(
        "auto", "Run", "auto (bf16 where the machine has it), fp32 or bf16.",
        ("auto", "fp32", "bf16"),
    )  # fmt: skip
    compile: str = _field(
        "no", "Run", "torch.compile: no, yes, or auto (measured at the start, if the run is long).",
        ("no", "yes", "auto"),
    )  # fmt: skip
    grad_checkpointing: bool = _field(
        False, "Run", "Less memory, more time: layers are computed again in the backward pass."
    )
    fit_memory: bool = _field(
        False, "Run", "Split each step into as few equal batches as fit in memory; BN sees those."
    )
    memory: str = _field(
        "auto", "Run", "Hold images decoded in memory: auto, yes, or no (stream them).",
        ("auto", "yes", "no"),
    )  # fmt: skip
    workers: int | None = _field(None, "Run", "Processes that decode; without: one a core.")
    eval_every: float = _field(1.0, "Run", "Epochs between evaluations.")
    save_minutes: float = _field(5.0, "Run", "Minutes between saved states, beside every epoch's.")
    faithfulness_images: int = _field(
        24, "Run", "Test images on which the report judges the attention; 0: none."
    )
    seed: int = _field(0, "Run", "Of splits, weights, order, augmentation and dropout.")

    # what is the network's, not the command line's: keys of a recipe's [model] table
    model: str | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices = f.metadata.get("choices")
            value = getattr(self, f.name)
            if choices and value not in choices:
                raise UsageError(f"{f.name}={value!r}: choose one of {', '.join(choices)}")
        _check_ranges(self)

    @property
    def augmentation(self) -> "Augmentation":
        """The fields that say how images are augmented."""
        from regard.data.augment import Augmentation  # torch, which `regard --help` must not load

        names = [f.name for f in dataclasses.fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})

    def changed(self, **changes: Any) -> "Recipe":
        """The recipe with other values; an unknown name or a value of a wrong type is a ValueError.

        Lists will do for tuples and whole numbers for others; None where a field may be None.
        """
        _known(changes, [f.name for f in dataclasses.fields(self)])
        hints = get_type_hints(Recipe)
        cast = {k: _cast(k, v, hints[k]) for k, v in changes.items()}
        return dataclasses.replace(self, **cast)


_RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (1, math.inf), "accumulate": (1, math.inf), "steps": (1, math.inf),
    "lr": (0, math.inf), "momentum": (0, 1), "weight_decay": (0, math.inf),
    "backbone_lr_scale": (0, 1),
    "clip_grad": (0, math.inf), "ema_decay": (0, 0.99999), "warmup": (0, math.inf),
    "mixup": (0, 10),
    "label_smoothing": (0, 0.999), "label_noise": (0, 1), "val": (0, 0.9), "test": (0, 0.9),
    "size": (4, 8192), "crop_pct": (0.1, 1), "max_unreadable": (0, 1), "flip": (0, 1),
    "crop_shift": (0, 1), "rotate": (0, 180), "shift": (0, 1), "color_jitter": (0, 1),
    "lighting": (0, 10), "random_erasing": (0, 1), "workers": (0, 256), "seed": (0, 2**31),
    "faithfulness_images": (0, 4096),
    "save_minutes": (0, math.inf),
}  # fmt: skip


def _check_ranges(recipe: Recipe) -> None:
    for f in fields_of():
        value = getattr(recipe, f.name)
        several = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and not math.isfinite(v) for v in several):
            raise UsageError(f"{f.name}={value}: finite numbers only")
    for name, (low, high) in _RANGES.items():
        value = getattr(recipe, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name}={value}: from {low:g} to {high:g}")
    for name in ("epochs", "eval_every"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise UsageError(f"{name}={value}: more than 0")
    if recipe.epochs is not None and recipe.steps is not None:
        raise UsageError(f"epochs={recipe.epochs:g} and steps={recipe.steps}: give one of them")
    if recipe.val + recipe.test >= 1:
        raise UsageError(f"val={recipe.val} and test={recipe.test} leave nothing to train on")
    if list(recipe.milestones) != sorted(recipe.milestones):
        raise UsageError(f"milestones={recipe.milestones}: in rising order")
    if min((*recipe.milestones, *recipe.lr_factors), default=0) < 0:
        raise UsageError(
            f"milestones={recipe.milestones} and factors={recipe.lr_factors}: none below 0"
        )
    if recipe.lr_factors and len(recipe.lr_factors) != len(recipe.milestones) + 1:
        raise UsageError(
            f"factors={recipe.lr_factors}: one more than the {len(recipe.milestones)} milestones"
        )
    for name in ("crop_scale", "zoom", "axis_scale"):
        low, high = getattr(recipe, name)
        if not 0 < low <= high:
            raise UsageError(f"{name}={getattr(recipe, name)}: least and largest, above 0")
    if recipe.crop_scale[1] > 1:
        raise UsageError(f"crop_area={recipe.crop_scale}: shares of the area, at most 1")


def fields_of() -> list[dataclasses.Field[Any]]:
    """The fields that are flags, with help, group and choices in their metadata."""
    return [f for f in dataclasses.fields(Recipe) if "help" in f.metadata]


def _known(names: Mapping[str, Any], known: list[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"a recipe has no {name!r}; {hint}")


def shipped() -> dict[str, str]:
    """The text of each shipped recipe's TOML file, by name."""
    folder = resources.files("regard.training").joinpath("recipes")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".toml"))
    return {n.removesuffix(".toml"): folder.joinpath(n).read_text(encoding="utf-8") for n in names}


def summary(text: str) -> str:
    """The first line of a recipe's header."""
    return text.splitlines()[0].lstrip("# ").strip()


def load_recipe(name: str | Path = "quick") -> Recipe:
    """A shipped recipe by name, or the one in a TOML file.

    Raises:
        UsageError: no recipe is called so, the file can't be read, or a key or value is wrong.
    """
    texts = shipped()
    if str(name) in texts:
        return parse_recipe(texts[str(name)], str(name))
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(str(name), texts, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no recipe {str(name)!r}; {hint}choose {', '.join(texts)}, or a file")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read as a recipe ({error})") from error


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe that a TOML text describes; its [model] table gives `name` and arguments.

    Raises:
        UsageError: the text is no TOML, or a key or value is wrong; the message starts with
            `name`.
    """
    try:
        values = tomllib.loads(text)
        network = values.pop("model", {})
        if not isinstance(network, dict) or not isinstance(network.get("name", ""), str):
            raise UsageError(f"model={network!r}: a table, [model], with the network's name")
        _known(values, [*(f.name for f in fields_of()), "model"])
        hints = get_type_hints(Recipe)
        cast = {key: _cast(key, value, hints[key]) for key, value in values.items()}
        return Recipe(model=network.pop("name", None), model_args=network, **cast)
    except ValueError as error:  # TOMLDecodeError is one
        raise UsageError(f"recipe {name}: {error}") from error


def _cast(key: str, value: Any, hint: Any) -> Any:
    """TOML's value as the field's type; TOML has no tuples, and writes 1 for 1.0."""
    if key == "compile" and isinstance(value, bool):  # as recipes had it before there was auto
        return "yes" if value else "no"
    kinds = [a for a in get_args(hint) if a is not type(None)] if _is_union(hint) else [hint]
    kind = kinds[0]
    if value is None and _is_union(hint):
        return None
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(_is_number(v) for v in value):
            raise UsageError(f"{key}={value!r}: a list of numbers")
        wanted = [a for a in get_args(kind) if a is not ...]
        if ... not in get_args(kind) and len(value) != len(wanted):
            raise UsageError(f"{key}={value!r}: {len(wanted)} numbers")
        return tuple(float(v) for v in value)
    if kind is float and _is_number(value):
        return float(value)
    if kind in _KINDS and type(value) is not kind:
        raise UsageError(f"{key}={value!r}: {_KINDS[kind]} is needed")
    return value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _is_union(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def recipe_toml(recipe: Recipe, header: str = "") -> str:
    """The recipe as TOML that `parse_recipe` reads back, every field written out."""
    import tomli_w

    values: dict[str, Any] = {
        f.name: list(v) if isinstance(v, tuple) else v
        for f in fields_of()
        if (v := getattr(recipe, f.name)) is not None
    }
    network = {"name": recipe.model, **recipe.model_args}
    network = {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}
    values["model"] = {k: v for k, v in network.items() if v is not None}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + tomli_w.dumps(values)
