"""Folders as people have them: splits or classes, masks, results of ours, what is skipped."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from regard.data.folders import split_word
from regard.data.sources import class_counts, images_below, open_data


def tree(root, *paths):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return str(root)


def names(table):
    return [os.path.relpath(file, table.base) for file in table.files]


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 15), np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, values=(0, 255), soft=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((40, 50), values[0], np.uint8)
    pixels[10:25, 10:30] = values[-1]
    if soft:
        pixels[10, 10:30] = 120  # an antialiased border
    Image.fromarray(pixels).save(path)


# ---- splits or classes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("my_train_set", "train"), ("TRAIN2", "train"),
        ("trainingData", "train"), ("01-train", "train"), ("imagesTr", "train"), ("trn", "train"),
        ("Testing", "test"), ("TestSet", "test"), ("test images", "test"), ("eval", "test"),
        ("imagesTs", "test"), ("holdout", "test"), ("Val", "val"), ("validation_split", "val"),
        ("dev", "val"), ("val2017", "val"),
        ("strain", None), ("protest", None), ("oval", None), ("cat", None), ("contrast", None),
        ("valley", None), ("_", None), ("42", None),
    ],
)  # fmt: skip
def test_words_for_splits(name, split):
    assert split_word(name) == split


@pytest.mark.parametrize(
    "tops",
    [
        ("Training", "Testing"), ("my_train_set", "my_test_set"), ("TRAINING", "validation"),
        ("train", "Testing"), ("set1", "set2"), ("train", "test", "extra"), ("train_1", "other"),
    ],
)  # fmt: skip
def test_two_possible_readings_are_asked_about(tmp_path, tops):
    root = tree(tmp_path, *(f"{t}/{c}/1.png" for t in tops for c in ("glioma", "healthy")))
    with pytest.raises(ValueError, match=r"top folders can be read as splits.*splits=no") as error:
        open_data(root)
    assert "\n" not in str(error.value)
    assert all(top in str(error.value) for top in tops)
    assert open_data(root, splits="no").classes == sorted(tops)


def test_the_answer_decides(tmp_path):
    tops = {"Training": "train", "Testing": "test"}
    root = tree(
        tmp_path, *(f"{t}/{c}/1.png" for t in tops for c in "ab"), "extra/a/1.png", "extra/b/2.png"
    )
    table = open_data(root, splits="yes")
    assert class_counts(table) == {s: {"a": 1, "b": 1} for s in ("train", "test")}
    assert any("extra" in line for line in table.warnings)
    assert open_data(root, splits="no").classes == ["Testing", "Training", "extra"]
    with pytest.raises(ValueError, match="splits=maybe: choose auto, yes, no"):
        open_data(root, splits="maybe")
    tree(tmp_path, "train/a/1.png")
    with pytest.raises(ValueError, match=r"two folders for one split \(train\)"):
        open_data(root, splits="yes")


def test_split_folders_without_classes_are_no_classes_unasked(tmp_path):
    root = tree(tmp_path, "train/1.png", "test/1.png")
    with pytest.raises(ValueError, match="splits=no"):
        open_data(root)
    with pytest.raises(ValueError, match="no class folders"):
        open_data(root, splits="yes")


@pytest.mark.parametrize(
    "classes", [("train", "car", "bus"), ("test tube", "flask"), ("valve", "oval"), ("test", "x")]
)
def test_a_class_may_be_called_as_a_split(tmp_path, classes):
    table = open_data(tree(tmp_path, *(f"{c}/1.png" for c in classes)))
    assert table.classes == sorted(classes)
    assert set(table.splits) == {""}


def test_classes_may_have_folders_of_their_own(tmp_path):
    root = tree(tmp_path, "cat/here/1.png", "cat/there/2.png", "dog/there/1.png")
    assert open_data(root).classes == ["cat", "dog"]
    assert open_data(tree(tmp_path / "one", "cat/x/1.png", "dog/x/1.png")).classes == ["cat", "dog"]


# ---- what goes on with a warning


def test_folders_without_images_and_classes_that_a_split_lacks(tmp_path):
    root = tree(
        tmp_path, "train/a/1.png", "train/b/1.png", "train/c/none.txt", "test/a/1.png",
        "__MACOSX/train/a/._1.png", "logs/events.out", "train/stray.png",
    )  # fmt: skip
    table = open_data(root)
    assert class_counts(table) == {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 0}}
    said = "\n".join(table.warnings)
    assert "test has no images of b" in said
    assert os.path.join("train", "c") in said
    assert "logs" in said
    assert f"directly in {tmp_path / 'train'}" in said
    assert "__MACOSX" not in said


def test_links_that_lead_nowhere_end_nothing(tmp_path):
    root = tree(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/loop").symlink_to("loop")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a/gone.png").symlink_to("nowhere")
    table = open_data(root)
    assert names(table) == ["a/1.png", "a/gone.png", "b/1.png"]
    with pytest.raises(ValueError, match="no such file"):
        table.read(1)


def test_what_is_skipped_is_counted(tmp_path):
    root = tree(tmp_path, "a/1.png", "b/1.png", *(f"a/{i}.bak" for i in range(12)), "b/x/n.txt")
    (line,) = open_data(root).warnings
    assert "12 .bak" in line
    assert "1 .txt" in line


def test_files_without_suffix_are_known_by_content(tmp_path):
    root = tree(tmp_path, "a/1.png", "b/README")
    (tmp_path / "b/IM0001").write_bytes(bytes(128) + b"DICM" + bytes(10))
    (tmp_path / "b/1.2.840.10008").write_bytes(bytes(128) + b"DICM" + bytes(10))
    photo(tmp_path / "b/picture.png")
    (tmp_path / "b/picture.png").rename(tmp_path / "b/picture")
    table = open_data(root)
    assert names(table) == ["a/1.png", "b/1.2.840.10008", "b/IM0001", "b/picture"]
    assert any("1 without suffix" in line for line in table.warnings)


# ---- masks


@pytest.mark.parametrize(
    "name",
    ["{}_mask.png", "{}_mask_1.png", "{}_seg.png", "{}_gt.bmp", "{}-label.tif",
     "{}_segmentation.png", "masks/{}.png", "masks/{}_mask.png"],
)  # fmt: skip
def test_masks_beside_images_are_left_out(tmp_path, name):
    for c in ("benign", "normal"):
        for i in range(3):
            photo(tmp_path / c / f"{c} ({i}).png", i)
            mask(tmp_path / c / name.format(f"{c} ({i})"), (0, 255) if c == "benign" else (0, 0))
    table = open_data(str(tmp_path))
    assert names(table) == [f"{c}/{c} ({i}).png" for c in ("benign", "normal") for i in range(3)]
    (line,) = table.warnings
    assert "6 masks" in line
    assert "--masks" in line


def test_masks_whose_image_is_missing_are_no_images(tmp_path):
    for c in "ab":
        for i in range(3):
            photo(tmp_path / c / f"{i}.png", i)
            mask(tmp_path / c / f"{i}_mask.png")
        (tmp_path / c / "1.png").unlink()
    photo(tmp_path / "a/theatre_mask.png")  # a photograph
    assert names(open_data(str(tmp_path))) == [
        "a/0.png", "a/2.png", "a/theatre_mask.png", "b/0.png", "b/2.png",
    ]  # fmt: skip


def test_a_folder_of_all_masks_is_no_class(tmp_path):
    for c in ("benign", "malignant"):
        photo(tmp_path / c / f"{c}1.png")
        mask(tmp_path / "masks" / f"{c}1.png", soft=True)
    assert open_data(str(tmp_path)).classes == ["benign", "malignant"]


def test_folders_of_images_and_masks_in_each_class_are_no_splits(tmp_path):
    for c in ("covid", "normal"):
        photo(tmp_path / c / "images" / f"{c}-1.png")
        mask(tmp_path / c / "masks" / f"{c}-1.png")
    assert names(open_data(str(tmp_path))) == [f"{c}/images/{c}-1.png" for c in ("covid", "normal")]


def test_images_that_are_only_called_masks_stay(tmp_path):
    photo(tmp_path / "a/1.png")
    photo(tmp_path / "a/1_mask.png", 1)  # no mask: a photograph
    mask(tmp_path / "b/carnival_mask.png")  # no image is called carnival
    photo(tmp_path / "b/1.png")
    assert len(open_data(str(tmp_path))) == 4


# ---- results of ours


def results(folder):
    for file in ("x/state/step-1.pt", "x/report.html", "y/tensorboard/events"):
        tree(folder / "runs", file)
    (folder / "runs/x/run.json").write_text(json.dumps({"status": "running"}))
    (folder / "runs/y/config.json").write_text("{}")
    (folder / "runs/y/model.safetensors").touch()
    for place in (folder / "explained", folder / "cat/explained"):
        photo(place / "1.png")
        photo(place / "contact-sheet.png")
        np.savez(place / "1.npz", about=np.array("{}"), box=np.zeros(4))


def test_results_inside_the_data_are_left_out(tmp_path):
    root = tree(tmp_path, "cat/2.png", "dog/1.png")
    results(tmp_path)
    table = open_data(root)
    assert table.classes == ["cat", "dog"]
    assert names(table) == ["cat/2.png", "dog/1.png"]
    assert any("Regard's results" in line and "runs" in line for line in table.warnings)


def test_arrays_beside_images_are_no_results(tmp_path):
    root = tree(tmp_path, "cat/2.png", "dog/1.png")
    np.savez(tmp_path / "cat/2.npz", pixels=np.zeros(4))
    np.savez(tmp_path / "dog/1.npz", pixels=np.zeros(4))
    assert open_data(root).classes == ["cat", "dog"]


def test_prediction_lists_folders_as_training_does(tmp_path, caplog):
    root = tree(tmp_path, "cat/2.png", "cat/10.bak", "dog/1.png", "cat/.hidden.png")
    (tmp_path / "dog/more").symlink_to(tmp_path / "cat")
    photo(tmp_path / "dog/3.png")
    mask(tmp_path / "dog/3_mask.png")
    results(tmp_path)
    table = open_data(root)
    with caplog.at_level(logging.INFO, "regard"):
        below = [str(path) for path in images_below([tmp_path / "cat", tmp_path / "dog"])]
    assert below == list(table.files)
    assert "2 .bak" in caplog.text  # cat's own, and through the link
    assert "1 mask " in caplog.text
    one = tmp_path / "dog/3_mask.png"  # named by the user: taken
    assert list(images_below([one])) == [one]
