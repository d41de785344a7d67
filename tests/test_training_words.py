"""The sentences on how a run was trained: every recipe entry that changes a result is in one."""

import re
import shutil
from dataclasses import asdict

import pytest
import timm
import torch

from regard.report.figures import measure
from regard.report.methods import methods_of
from regard.report.source import RunSource
from regard.report.training_words import (
    imbalance,
    partitions,
    preprocessing,
    selection,
    technology,
    training,
    with_defaults,
)
from regard.training.config import Recipe, fields_of
from regard.training.steps import StepPlan
from tests.helpers import run

PREPROCESS = {"input_size": (3, 32, 32), "resize": "crop", "crop_pct": 1.0, "value_range": None}
COUNTS = {"train": 40, "val": 9, "test": 18}
FACTS = {
    "steps": 12, "epochs": 3.0, "seconds": 2.0, "device": "cpu", "processes": 1,
    "batches": [8, 1], "precision": "fp32",
    "selected": {"by": "highest validation accuracy", "epoch": 2.0},
}  # fmt: skip
# Entries whose result the run's files have: what was done is said from those.
_MEASURED = {
    "epochs", "steps", "batch_size", "accumulate", "fit_memory", "precision", "size", "channels",
    "resize", "crop_pct", "resize_first", "graft", "pretrained", "select", "val", "test",
}  # fmt: skip
# Entries that change no result, or that say when a run stops.
_OPERATIONAL = {
    "compile", "fuse", "grad_checkpointing", "memory", "workers", "save_minutes",
    "faithfulness_images", "max_unreadable",
}  # fmt: skip
_OTHER = {
    "momentum": 0.5, "nesterov": False, "milestones": (1.0,), "lr_factors": (1.0, 0.3),
    "warmup": 1.0, "schedule_unit": "steps", "crop_shift": 0.3, "crop_scale": (0.5, 1.0),
    "optimizer": "muon", "schedule": "constant", "normalization": "image", "sampler": "balanced",
    "class_weights": "a=2", "sampler_weights": "a=5", "random_crop": "shift", "limit": 40,
    "decode": "device",
    "fold": "2/10", "zoom": (0.9, 1.1), "axis_scale": (0.9, 1.1), "decay_norm_and_bias": False,
}  # fmt: skip
_WITH = {
    "milestones": {"schedule": "steps"}, "warmup": {"schedule": "cosine"},
    "lr_factors": {"schedule": "steps", "milestones": (2.0,)},
    "schedule_unit": {"schedule": "cosine", "warmup": 1.0},
    "crop_shift": {"random_crop": "shift"}, "crop_scale": {"random_crop": "resized"},
    "sync_bn": {"processes": 4},
}  # fmt: skip


def _recipe(**changes):
    return with_defaults(asdict(Recipe(**changes)))


def _all(recipe, processes=1, given=()):
    facts = FACTS | {"processes": processes}
    return " ".join([
        partitions(recipe, COUNTS, given, False), preprocessing(recipe, PREPROCESS),
        training(recipe, facts, channel_gates=True), imbalance(recipe), selection(recipe, facts),
    ])  # fmt: skip


def _other(field):
    if field.name in _OTHER:
        return _OTHER[field.name]
    if isinstance(field.default, bool):
        return not field.default
    return 0.25 if field.default == 1 else (field.default or 0) + 0.25


@pytest.mark.parametrize("field", fields_of(), ids=lambda field: field.name)
def test_an_entry_that_changes_the_result_changes_the_text(field):
    if field.name in _MEASURED | _OPERATIONAL:
        return
    beside = dict(_WITH.get(field.name, {}))
    processes = beside.pop("processes", 1)
    value = 7 if field.name in ("seed", "split_seed") else _other(field)
    changed = _all(_recipe(**beside, **{field.name: value}), processes)
    assert changed != _all(_recipe(**beside), processes)


def test_entries_that_a_file_lacks_have_the_recipes_defaults():
    defaults = with_defaults({})
    assert {name: getattr(Recipe(), name) for name in defaults} == defaults


def test_channel_gates_are_named_where_muon_leaves_them_to_adamw():
    said = "(0.01 of it for the channel gates, by AdamW)"
    muon = with_defaults(asdict(Recipe(optimizer="muon").for_start(random=True)))
    assert said in training(muon, FACTS, channel_gates=True)
    assert said not in training(muon, FACTS)
    assert "channel gates" not in training(_recipe(), FACTS, channel_gates=True)
    before = {name: value for name, value in muon.items() if name != "gate_lr_scale"}
    assert "channel gates" not in training(with_defaults(before), FACTS, channel_gates=True)
    sgd = training(_recipe(gate_lr_scale=0.5), FACTS, channel_gates=True)
    assert "(0.5 of it for the channel gates)" in sgd


def test_the_networks_own_mean_is_named_by_where_it_comes_from():
    recipe = _recipe(normalization="model")
    assert "starting weights" in preprocessing(recipe, PREPROCESS, started=True)
    assert "starting weights" not in preprocessing(recipe, PREPROCESS)


def test_resizing_before_the_crop_is_not_called_squashing():
    """`resize_first` keeps the image's aspect, as torchvision's Resize does."""
    said = preprocessing(_recipe(), {**PREPROCESS, "resize": "crop", "resize_first": True})
    assert "the whole image resized, then cropped" in said
    assert "squash" not in said


def test_a_step_is_of_all_batches_and_processes():
    accumulated = training(_recipe(batch_size=8, accumulate=2), FACTS | {"batches": [8, 2]})
    assert "steps of 16 images (2 batches of 8)" in accumulated
    parallel = training(_recipe(batch_size=8), FACTS | {"processes": 4})
    assert "steps of 32 images" in parallel
    assert "batch size 8," in training(_recipe(batch_size=8), FACTS)


def test_an_epoch_ends_as_its_images_are_divided():
    for count, batches, steps, epochs, said in (
        (52, [7, 1], 20, 2.5, "20 steps (2.5 epochs, each ending with a smaller batch)"),
        (52, [13, 1], 8, 2.0, "8 steps (2 epochs)"),
        (52, [17, 1], 6, 2.0, "6 steps (2 epochs, each without its last 1 image)"),
        (52, [8, 2], 8, 2.0, "8 steps (2 epochs, each ending with a smaller batch)"),
        (52, [7, 1], 3, 3 / 8, "3 steps (0.375 epochs)"),
    ):
        facts = {"counts": {"train": count}, "batches": batches, "steps": steps, "epochs": epochs}
        plan = StepPlan(count, *batches, partial=True)
        assert plan.an_epoch == steps / epochs
        assert said in training(_recipe(partial_batch=True), FACTS | facts)
        assert "each" not in training(_recipe(), FACTS | facts)


def test_the_decay_of_an_average_is_what_its_steps_had():
    """0.999 is not reached before step 8,990."""
    said = training(_recipe(ema_decay=0.999), FACTS)
    assert "(decay 0.999, but at most (1 + t) / (10 + t) at step t from 0)" in said


def test_images_are_normalized_as_the_starting_weights_were():
    own = {**PREPROCESS, "normalization": "image"}
    said = preprocessing(_recipe(normalization="model"), own, started=True)
    assert "normalized with each image's own mean and deviation" in said


def test_weights_are_chosen_once_a_step_at_most():
    """Two batches of all images are a step of two epochs."""
    assert "measured every 0.5 epochs" in selection(_recipe(eval_every=0.5), FACTS)
    few = FACTS | {"steps": 2, "epochs": 4.0}
    assert "measured every 2 epochs" in selection(_recipe(eval_every=0.5), few)


@pytest.mark.parametrize(
    ("changes", "given", "said", "unsaid"),
    [
        ({"fold": "2/10"}, set(), ["fold 2 of 10", "from the other folds"], ["0.2", "0.1"]),
        ({"limit": 40}, set(), ["limited to 40", "drawn at random"], ["0.2", "0.1"]),
        ({"limit": 50}, set(), ["drawn at random"], ["limited"]),
        ({}, {"train", "val"}, ["training and validation images were given",
                                "test images were drawn"], []),
        ({}, {"train", "test"}, ["training and test images were given",
                                 "validation images were drawn"], []),
        ({}, {"train", "val", "test"}, ["partitions were given"], ["drawn"]),
        ({}, None, ["splits.csv"], ["given", "drawn"]),
    ],
)  # fmt: skip
def test_partitions_are_as_they_were_made(changes, given, said, unsaid):
    text = partitions(_recipe(**changes), COUNTS, given, False)
    assert "training 40 images, validation 9 images, test 18 images" in text
    assert all(each in text for each in said), text
    assert not any(each in text for each in unsaid), text


@pytest.mark.parametrize(
    ("name", "convolutional", "attention"),
    [("vit_tiny_patch16_224", False, True), ("resnet18", True, False), ("seresnet18", True, True),
     ("cbam_resnet18", True, True), ("plain_resnet18", True, False)],
)  # fmt: skip
def test_the_technology_is_the_networks(name, convolutional, attention):
    with torch.device("meta"):
        network = timm.create_model(name)
    words = technology(network)
    assert ("convolutional" in words, "attention" in words) == (convolutional, attention)


@pytest.fixture(scope="module")
def unusual(scans, tmp_path_factory):
    """A run of a network without attention, on data without a test split."""
    data, out = tmp_path_factory.mktemp("unusual") / "data", tmp_path_factory.mktemp("out") / "run"
    for k, file in enumerate(sorted(scans.glob("*/*.png"))):
        copy = data / ("val" if k % 4 == 0 else "train") / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    run("train", data, "--model", "plain_resnet18", "--arg", "channels=(8,8,8,8)", "--size", 16,
        "--optimizer", "muon", "--select", "last", "--sampler-weights", "1=5", "--ema-decay", 0.9,
        "--label-noise", 0.2, "--accumulate", 2, "--batch-size", 8, "--epochs", 1,
        "--faithfulness-images", 0, "--log", "none", "--out", out)  # fmt: skip
    return out


def test_an_unusual_run_is_described_as_it_was(unusual):
    source = RunSource(unusual)
    methods = methods_of(source, measure(source, None, 0), source.command)
    for said in ("training and validation images were given", "test images were drawn",
                 "=5", "moving average", "decay 0.9", "0.2 of the training labels",
                 "momentum 0.9", "steps of 16 images"):  # fmt: skip
        assert said in methods.text, said
    assert "Nothing was done about class imbalance" not in methods.text
    assert not re.search(r"weights are those", methods.text)
    claim = {n: answer for n, _, answer in methods.checklists["CLAIM 2024"][1]}
    assert "network" in claim["1"]
    assert "attention" not in claim["1"]
