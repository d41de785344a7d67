"""What a check finds in real files: numbers against numpy, leaks, faults, in processes too."""

import json
import multiprocessing
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from regard.commands.data import print_check
from regard.commands.flags import progress_bar
from regard.data.audit import check_data
from regard.data.sources import open_data
from regard.data.splits import assign_splits

PHOTOS = load_sample_images().images  # two of (427, 640, 3)


def crop(k, size=(24, 30)):
    y, x = 7 * k % 380, 11 * k % 600
    return PHOTOS[k % 2][y : y + size[0], x : x + size[1]]


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """train and test of two classes, 6 and 2 images each."""
    k = 0
    for split, n in (("train", 6), ("test", 2)):
        for c in ("china", "flower"):
            for i in range(n):
                k += 1
                save(tmp_path / "data" / split / c / f"{i}.png", crop(k))
    return tmp_path / "data"


def test_a_clean_folder(folder):
    calls = []
    check = check_data(open_data(str(folder)), progress=lambda *done: calls.append(done))
    assert calls == [(i, 16) for i in range(1, 17)]
    assert (check.images, check.checked) == (16, 16)
    assert check.counts == {s: {"china": n, "flower": n} for s, n in (("train", 6), ("test", 2))}
    assert check.sizes["height"] == {"min": 24, "median": 24, "max": 24}
    assert check.sizes["common"] == [[24, 30, 16]]
    assert (check.channels, check.depths) == ({"3": 16}, {"8 bit": 16})
    assert not check.unreadable
    assert not check.leaks
    assert not check.duplicates
    train = np.stack([crop(k) for k in range(1, 13)]) / 255
    assert np.allclose(check.mean, train.mean((0, 1, 2)), rtol=0, atol=1e-12)
    assert np.allclose(check.std, train.std((0, 1, 2)), rtol=0, atol=1e-12)
    assert check.warnings == ["2 classes with fewer than 20 training images"]
    assert check.suggestion == {
        "size": 24, "channels": 3, "class_weights": {"china": 1.0, "flower": 1.0}, "resize": "crop",
    }  # fmt: skip


def test_leaks_and_duplicates_are_found_under_any_name_and_format(folder):
    leaked = folder / "test/flower/other name.bmp"
    save(leaked, crop(1))  # train/china/0.png, and under another label
    shutil.copy(folder / "train/flower/2.png", folder / "train/flower/copy.png")
    save(folder / "test/china/turned.png", crop(1)[::-1])  # is another picture
    reshaped = crop(1).reshape(30, 24, 3)  # the same bytes in another shape, too
    save(folder / "test/china/reshaped.png", reshaped)
    check = check_data(open_data(str(folder)))
    assert check.leaks == [[(str(folder / "train/china/0.png"), "train"), (str(leaked), "test")]]
    assert check.duplicates == [
        [(str(folder / f"train/flower/{name}.png"), "train") for name in ("2", "copy")]
    ]
    assert "1 picture in more than one split: scores would be too good" in check.warnings
    assert "1 picture more than once in one split" in check.warnings
    assert "1 picture with different labels in different places" in check.warnings


def test_unreadable_files_are_listed_and_the_rest_counts(folder):
    whole = (folder / "train/china/3.png").read_bytes()
    (folder / "train/china/3.png").write_bytes(whole[:200])
    (folder / "test/flower/1.png").write_text("a text")
    (folder / "test/flower/empty.jpg").touch()
    check = check_data(open_data(str(folder)))
    told = {path.removeprefix(f"{folder}/"): reason for path, reason in check.unreadable}
    assert list(told) == ["train/china/3.png", "test/flower/1.png", "test/flower/empty.jpg"]
    assert told["test/flower/empty.jpg"] == "is empty (0 bytes)"
    assert check.sizes["common"] == [[24, 30, 14]]
    train = np.stack([crop(k) for k in range(1, 13) if k != 4]) / 255
    assert np.allclose(check.mean, train.mean((0, 1, 2)), rtol=0, atol=1e-12)
    assert "3 images can't be read" in check.warnings


def test_nothing_readable_at_all(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        (tmp_path / c / "1.png").touch()
    check = check_data(open_data(str(tmp_path)))
    assert len(check.unreadable) == 2
    assert check.sizes["height"] is None
    print_check(check)


def test_processes_find_the_same(folder):
    (folder / "train/china/5.png").write_text("broken")
    table = open_data(str(folder))
    many = table.select(np.tile(np.arange(16), 9))  # several chunks, the last one shorter
    alone = check_data(many, workers=1)
    assert check_data(many, workers=2) == alone
    assert len(alone.unreadable) == 9
    assert len(alone.duplicates) == 15
    assert not multiprocessing.active_children()


def test_gray_and_color_and_depths(tmp_path):
    gray = crop(1)[..., 0]
    save(tmp_path / "a/8.png", gray)
    save(tmp_path / "a/16.png", gray.astype(np.uint16) * 16)
    save(tmp_path / "b/rgb.png", np.stack([gray] * 3, 2)[::-1])
    check = check_data(open_data(str(tmp_path)))
    assert check.channels == {"1": 2, "3": 1}
    assert check.depths == {"16 bit": 1, "8 bit": 2}
    assert check.suggestion["channels"] == 1  # the color image is gray
    values = np.concatenate(
        [(gray / 255).ravel(), (gray * 16.0 / 65535).ravel(), gray.ravel() / 255]
    )
    assert check.mean == pytest.approx([values.mean()], abs=1e-12)
    assert check.std == pytest.approx([values.std()], abs=1e-12)
    assert "images of different depth: 1 16 bit, 2 8 bit" in check.warnings
    assert any(f"values up to {int(gray.max()) * 16}" in line for line in check.warnings)
    save(tmp_path / "b/color.png", crop(2))
    mixed = check_data(open_data(str(tmp_path)))
    assert mixed.suggestion["channels"] == 3
    grays = np.stack([values.reshape(-1, 1)[:, 0]] * 3, 1)
    both = np.concatenate([grays, crop(2).reshape(-1, 3) / 255])
    assert np.allclose(mixed.mean, both.mean(0), rtol=0, atol=1e-12)
    assert "grayscale: 2 images, in color: 2" in mixed.warnings


@pytest.mark.parametrize(
    ("sizes", "suggested", "resize"),
    [
        ([(28, 28)] * 4, 28, "none"),
        ([(64, 64)] * 4, 64, "none"),
        ([(100, 120), (100, 130), (110, 100), (90, 95)], 96, "crop"),
        ([(300, 310), (500, 400), (400, 400), (300, 400)], 224, "crop"),
        ([(60, 200), (60, 60), (60, 70), (60, 80)], 60, "pad"),
    ],
)
def test_suggested_sizes(tmp_path, capsys, sizes, suggested, resize):
    for i, size in enumerate(sizes):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", np.full(size, i, np.uint8))
    check = check_data(open_data(str(tmp_path)))
    assert (check.suggestion["size"], check.suggestion["resize"]) == (suggested, resize)
    print_check(check)
    flag = "" if resize == "none" else f", resize {resize}"  # train has no --resize none
    assert capsys.readouterr().out.endswith(f"suggestion: size {suggested}, channels 1{flag}\n")
    heights = sorted(h for h, _ in sizes)
    assert check.sizes["height"]["median"] == heights[1]  # the lower one


def test_digits_with_splits():
    table = assign_splits(open_data("digits"), val=0.1, test=0.2, seed=0)
    check = check_data(table)
    train = table.arrays[table.splits == "train"] / 255
    assert check.mean == pytest.approx([train.mean()], abs=1e-12)
    assert check.std == pytest.approx([train.std()], abs=1e-12)
    assert check.suggestion["size"] == 8
    assert sum(check.suggestion["class_weights"].values()) == pytest.approx(10, rel=0.01)
    assert not check.leaks


def test_imbalance_groups_and_missing_classes(tmp_path):
    lines = ["path,label,split,group"]
    for i in range(44):
        save(tmp_path / f"{i}.png", crop(i))
        split = "test" if i >= 42 else "train"
        lines.append(f"{i}.png,{'rare' if i < 2 else 'usual'},{split},p{i // 3}")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    check = check_data(open_data(str(tmp_path / "a.csv")))
    assert check.groups == {
        "number": 15, "smallest": 2, "median": 3, "largest": 3, "divided": [],
    }  # fmt: skip
    assert check.suggestion["class_weights"] == {"rare": 42 / 4, "usual": 42 / 80}
    assert "test has no images of rare" in check.warnings
    assert "unbalanced: 2 to 40 images per class; see the class weights" in check.warnings
    lines[1] = lines[1].replace("train", "test")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    divided = check_data(open_data(str(tmp_path / "a.csv")))
    assert divided.groups["divided"] == ["p0"]
    assert "1 group in more than one split" in divided.warnings


def test_a_limit_is_spread_evenly(folder):
    check = check_data(open_data(str(folder)), limit=4)
    assert (check.images, check.checked) == (16, 4)
    assert check.channels == {"3": 4}
    assert check.counts["train"] == {"china": 6, "flower": 6}
    for name in ("limit", "workers"):
        with pytest.raises(ValueError, match=f"{name}=0: at least 1"):
            check_data(open_data(str(folder)), **{name: 0})


def test_memory_does_not_grow_with_the_images(tmp_path):
    # 60 images of 768 KB: one or two at a time
    for i in range(60):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", np.full((512, 512, 3), i, np.uint8))
    table = open_data(str(tmp_path))
    check_data(table, limit=2, workers=1)
    tracemalloc.start()
    check_data(table, workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 512 * 512 * 3


def test_nothing_is_written(folder):
    def state():
        return {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}

    before = state()
    check_data(open_data(str(folder)), workers=2)
    assert state() == before


def test_printing(folder, capsys):
    save(folder / "test/china/[bold] \udcff.png", crop(1))  # markup, and not UTF-8
    (folder / "train/china/1.png").write_text("broken")
    check = check_data(open_data(str(folder)))
    print_check(check)
    shown = capsys.readouterr().out
    assert "[bold] \\udcff.png (test)" in shown
    assert "china" in shown
    assert "warning: 1 image can't be read" in shown
    assert "suggestion: size 24, channels 3, resize crop" in shown
    assert len(shown.splitlines()) < 40
    print_check(check, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["leaks"][0][1] == [str(folder / "test/china/[bold] \udcff.png"), "test"]
    assert set(told) == set(check.__dataclass_fields__)
    assert told["mean"] == check.mean


def test_a_picture_with_many_copies_is_one_short_line(folder, capsys):
    """A blank image may be there a thousand times; each of its splits has an example."""
    for i in range(10):
        shutil.copy(folder / "train/china/0.png", folder / f"train/china/copy{i}.png")
    shutil.copy(folder / "train/china/0.png", folder / "test/china/0.png")
    check = check_data(open_data(str(folder)), near_duplicates=False)
    assert len(check.leaks[0]) == 12
    print_check(check)
    lines = capsys.readouterr().out.splitlines()
    line = lines[lines.index("in several splits:") + 1]
    assert line.count(".png") == 4
    assert "test/china/0.png (test)" in line
    assert "train/china/0.png (train)" in line
    assert line.endswith(" = 8 more")


def test_without_a_terminal_a_line_every_half_minute(folder, monkeypatch, caplog, capsys):
    now = iter(range(0, 1000, 7))  # seconds; a call each 7
    monkeypatch.setattr("regard.log.time.monotonic", lambda: next(now))
    with caplog.at_level("INFO", "regard"), progress_bar("looking at the images") as progress:
        check_data(open_data(str(folder)), progress=progress)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"looking at the images: {n} of 16" for n in (5, 10, 15)]
    assert capsys.readouterr().out == ""  # standard output is for results
