"""`regard shrink`: smaller copies that are the same data set."""

import csv
import io
import itertools
import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from regard.cli import run_command
from regard.data import assign_splits, open_data, read_image
from regard.data import shrink as module
from regard.data.content import ORIGINALS, content_hashes
from regard.data.loading import StreamingLoader
from regard.data.shrink import shrink
from regard.errors import FileError, UsageError
from regard.evaluation.intervals import Estimate
from regard.run_data import run_table
from regard.runs import RunFolder
from regard.trained_on import known_images
from tests.helpers import start


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture, which survives being made smaller."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Train and test folders of two classes; 300 x 400 pixels."""
    seeds = itertools.count()
    for split, count in (("train", 4), ("test", 2)):
        for label in "ab":
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                picture(300, 400, seed=next(seeds)).save(folder / f"{k}.jpg")
    return tmp_path / "photographs"


def files_below(folder: Path) -> list[str]:
    """Names of all but the hidden record of the originals."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ORIGINALS)
    return sorted(p.relative_to(folder).as_posix() for p in files)


def test_a_folder_becomes_the_same_folder_with_smaller_images(photographs, tmp_path, capsys):
    assert run_command(["shrink", str(photographs), str(tmp_path / "out"), "--side", "100"]) == 0
    said = capsys.readouterr().out
    assert "8 made smaller, 4 copied as they are" in said
    assert f"next: regard train {tmp_path / 'out'}\n" in said
    assert files_below(tmp_path / "out") == files_below(photographs)
    before, after = open_data(photographs), open_data(tmp_path / "out")
    assert after.classes == before.classes
    assert after.labels.tolist() == before.labels.tolist()
    assert after.splits.tolist() == before.splits.tolist()
    assert after.warnings == ()
    for i in range(len(before)):
        old, new = before.read(i).astype(float), after.read(i)
        if before.splits[i] == "test":
            assert Path(after.path(i)).read_bytes() == Path(before.path(i)).read_bytes()
            continue
        assert new.shape == (100, 133, 3)
        wanted = np.asarray(Image.fromarray(old.astype(np.uint8)).resize((133, 100), 3))
        assert np.abs(wanted.astype(float) - new).mean() < 2.5  # of JPEG
    assert not (tmp_path / "out.unfinished").exists()


def test_the_test_is_made_smaller_where_that_is_asked_for(photographs, tmp_path):
    done = shrink(open_data(photographs), tmp_path / "out", side=100, test_too=True)
    assert (done.smaller, done.copied) == (12, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "webp", "jp2"])
def test_a_copy_has_the_name_and_the_format_of_the_original(tmp_path, suffix):
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        picture(200, 200).save(tmp_path / "in" / label / f"ä 1.{suffix}")
    done = shrink(open_data(tmp_path / "in"), tmp_path / "out", side=50)
    assert done.smaller == 2
    assert files_below(tmp_path / "out") == [f"a/ä 1.{suffix}", f"b/ä 1.{suffix}"]
    with (
        Image.open(tmp_path / "in/a" / f"ä 1.{suffix}") as old,
        Image.open(tmp_path / "out/a" / f"ä 1.{suffix}") as new,
    ):
        assert (new.format, new.size) == (old.format, (50, 50))


def test_names_may_be_as_long_as_the_disk_takes_them(tmp_path):
    name = "n" * 251 + ".jpg"
    (tmp_path / "in" / "a").mkdir(parents=True)
    picture(100, 100).save(tmp_path / "in" / "a" / name)
    assert shrink(open_data(tmp_path / "in", min_classes=1), tmp_path / "out", side=50).smaller == 1
    assert files_below(tmp_path / "out") == [f"a/{name}"]


def one(tmp_path: Path, name: str, **options):
    """The copy of a single image, as it is read."""
    table = open_data(tmp_path, min_classes=1)
    done = shrink(table, tmp_path.with_name("out"), side=50, **options)
    copies = files_below(tmp_path.with_name("out"))
    assert copies == [f"a/{name}"]
    return done, read_image(tmp_path.with_name("out") / "a" / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in" / "a").mkdir(parents=True)
    return tmp_path / "in"


def test_a_copy_is_upright_over_white_and_gray_where_the_original_is(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = picture(100, 200)
    ImageDraw.Draw(turned).rectangle((0, 0, 40, 99), fill="white")  # left, which becomes the top
    turned.save(folder / "a" / "x.jpg", exif=exif)
    _, copy = one(folder, "x.jpg")
    assert copy.shape == (100, 50, 3)
    assert copy[:15].mean() > 240 > copy[40:].mean()


def test_transparency_becomes_white(folder):
    see_through = picture(100, 100).convert("RGBA")
    see_through.putalpha(0)
    see_through.save(folder / "a" / "x.png")
    _, copy = one(folder, "x.png")
    assert copy.shape == (50, 50, 3)
    assert copy.min() == 255


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_gray_stay_sixteen(folder, suffix):
    rows = np.linspace(1000, 50001, 100).astype(np.uint16)[:, None].repeat(100, 1)
    Image.fromarray(rows).save(folder / "a" / f"x.{suffix}")
    _, copy = one(folder, f"x.{suffix}")
    assert (copy.shape, copy.dtype) == ((50, 50, 1), np.uint16)
    wanted = rows.reshape(50, 2, 100).mean(1)[:, :50]
    assert np.abs(copy[2:-2, :, 0] - wanted[2:-2]).max() < 30  # of 65,535


def test_measurements_and_small_images_are_copied_byte_for_byte(folder):
    values = np.linspace(-3, 900, 10_000, dtype=np.float32).reshape(100, 100)
    Image.fromarray(values).save(folder / "a" / "x.tif")
    done = shrink(open_data(folder, min_classes=1), folder.with_name("out"), side=50)
    assert (done.smaller, done.copied) == (0, 1)
    assert (folder.with_name("out") / "a/x.tif").read_bytes() == (folder / "a/x.tif").read_bytes()
    picture(40, 300).save(folder / "a" / "y.jpg", quality=30)
    done = shrink(open_data(folder, min_classes=1), folder.with_name("2"), side=50)
    assert (folder.with_name("2") / "a/y.jpg").read_bytes() == (folder / "a/y.jpg").read_bytes()


def test_dicom_becomes_png_of_what_its_window_shows(folder):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    original = Path(str(get_testdata_file("CT_small.dcm")))
    dataset = pydicom.dcmread(original)
    dataset.WindowCenter, dataset.WindowWidth = 1000, 2000
    dataset.save_as(folder / "a" / "scan.dcm")
    _, copy = one(folder, "scan.dcm.png")
    assert (copy.shape, copy.dtype) == ((50, 50, 1), np.uint16)
    shown = read_image(folder / "a" / "scan.dcm")[..., 0]
    wanted = np.asarray(Image.fromarray(shown).resize((50, 50), Image.Resampling.BICUBIC)).clip(
        0, 1
    )
    assert np.abs(copy[..., 0] / 65535 - wanted).max() < 1e-4
    Image.new("L", (9, 9)).save(folder / "a" / "scan.dcm.png")
    with pytest.raises(UsageError, match=r"scan.dcm and a/scan.dcm.png"):
        shrink(open_data(folder, min_classes=1), folder.with_name("2"))


def test_a_csv_file_keeps_its_splits_groups_and_columns(tmp_path):
    (tmp_path / "in").mkdir()
    lines = ["path,label,split,group,site"]
    for k in range(8):
        path = Path("in", f"{k}.jpg") if k else tmp_path / "elsewhere.jpg"
        picture(80, 90, k).save(tmp_path / path)
        split = ("train", "val", "test")[k % 3]
        lines.append(f"{path},{'ab'[k % 2]},{split},p{k},{'north' if k < 4 else ''}")
    (tmp_path / "table").mkdir()
    manifest = tmp_path / "table" / "images.csv"
    manifest.write_text("\n".join(lines).replace("in/", "../in/"), encoding="utf-8")
    done = shrink(open_data(manifest), tmp_path / "out", side=40)
    assert done.data == tmp_path / "out" / "images.csv"
    assert (done.smaller, done.copied) == (6, 2)
    before, after = open_data(manifest), open_data(done.data)
    for name in ("labels", "splits", "groups"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist()
    assert after.columns["site"].tolist() == before.columns["site"].tolist()
    assert all(min(after.read(i).shape[:2]) == (80 if i % 3 == 2 else 40) for i in range(8))
    with done.data.open(encoding="utf-8", newline="") as file:
        assert all(not Path(row["path"]).is_absolute() for row in csv.DictReader(file))


def test_images_of_one_name_next_to_and_below_a_csv_file_are_two(tmp_path, monkeypatch):
    for folder in ("scans", "own/scans"):
        (tmp_path / folder).mkdir(parents=True)
    lines = ["path,label"]
    for k in range(12):
        picture(60, 60, k).save(tmp_path / f"scans/{k}.jpg")
        picture(60, 60, 100 + k).save(tmp_path / f"own/scans/{k}.jpg")
        lines += [f"../scans/{k}.jpg,a", f"scans/{k}.jpg,b"]
    (tmp_path / "own/all.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    table = open_data("own/all.csv")
    copies = open_data(shrink(table, tmp_path / "out", side=60).data)
    assert (len(copies), copies.labels.tolist()) == (24, table.labels.tolist())
    for i in range(24):
        assert copies.path(i).startswith(f"{tmp_path}/out/")
        assert Path(copies.path(i)).read_bytes() == Path(table.path(i)).read_bytes()
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    done = assign_splits(table, val=0.2, test=0.2, seed=0)
    run.start({"recipe": {}, "data": "own/all.csv"}, "", done)
    monkeypatch.chdir("/")
    assert run_table(run.path, None, None).splits.tolist() == done.splits.tolist()


def test_tar_files_and_arrays_become_images_and_a_csv_file(tmp_path):
    with tarfile.open(tmp_path / "in-train-0.tar", "w") as tar:
        for k in range(4):
            file = io.BytesIO()
            picture(80, 90, k).save(file, "JPEG")
            content = json.dumps({"label": "ab"[k % 2], "group": f"p{k}"}).encode()
            for name, data in ((f"x/{k}.jpg", file.getvalue()), (f"x/{k}.json", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    done = shrink(open_data(f"wds:{tmp_path}/in-train-0.tar"), tmp_path / "out", side=40)
    table = open_data(done.data)
    assert (table.labels.tolist(), table.groups.tolist()) == (
        [0, 1, 0, 1],
        ["p0", "p1", "p2", "p3"],
    )
    assert table.splits.tolist() == ["train"] * 4
    assert {table.read(i).shape for i in range(4)} == {(40, 45, 3)}
    digits = open_data("digits")
    after = open_data(shrink(digits, tmp_path / "digits", side=8).data)
    assert len(after) == len(digits)
    assert np.array_equal(after.read(1234), digits.read(1234))  # PNG, and no smaller than 8 x 8


def test_splits_of_the_copies_are_those_of_the_originals(tmp_path):
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        for k in range(12):
            picture(60, 60, k).save(tmp_path / "in" / label / f"{k}.{('jpg', 'png')[k % 2]}")
    before = open_data(tmp_path / "in")
    after = open_data(shrink(before, tmp_path / "out", side=30).data)
    for seed in range(3):
        both = [assign_splits(t, val=0.2, test=0.2, seed=seed) for t in (before, after)]
        assert both[0].splits.tolist() == both[1].splits.tolist()


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_splits_are_the_same_where_images_can_not_be_read(tmp_path, kind):
    lines = ["path,label"]
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        for k in range(20):
            path = tmp_path / "in" / label / f"{k}.jpg"
            picture(40, 40, k).save(path)
            if k % 7 == 0:
                path.write_bytes(b"" if k == 7 else b"no image")
            lines.append(f"{label}/{k}.jpg,{label}")
    lines.append("b/gone.jpg,b")  # not a byte of it can be read
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines[:1] + lines[2:]), encoding="utf-8")
    before = open_data(tmp_path / "in" if kind == "folder" else tmp_path / "in/list.csv")
    done = shrink(before, tmp_path / "out", side=30)
    after = open_data(done.data)
    assert len(done.unreadable) == 6
    for seed in range(3):
        both = [assign_splits(t, val=0.2, test=0.2, seed=seed) for t in (before, after)]
        keys = [dict(zip(map(t.key, range(len(t))), t.splits.tolist(), strict=True)) for t in both]
        assert keys[0] == keys[1]


def test_where_nothing_was_begun_nothing_is_resumed(photographs, tmp_path):
    with pytest.raises(UsageError, match=r"out\.unfinished: no such folder, .* nothing to resume"):
        shrink(open_data(photographs), tmp_path / "out", side=100, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_resumed_call_copies_what_is_there_now(photographs, tmp_path):
    folder, work = photographs / "train/a", tmp_path / "out.unfinished/train/a"
    (folder / "3.jpg").write_bytes(b"no image")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink(open_data(photographs), tmp_path / "out", side=100, progress=stop)
    times = {k: (folder / f"{k}.jpg").stat().st_mtime_ns for k in range(3)}
    picture(40, 50, 70).save(folder / "0.jpg")  # is copied now
    (folder / "1.jpg").write_bytes(b"no image either")
    for k, time_ns in times.items():
        os.utime(folder / f"{k}.jpg", ns=(time_ns, time_ns))
    (work / "2.jpg").write_bytes(b"cut short")
    with (tmp_path / "out.unfinished" / module.MADE).open("a") as record:
        record.write('\n{"i": 5, "ho')
    done = shrink(open_data(photographs), tmp_path / "out", side=100, resume=True)
    assert (done.earlier, done.smaller, done.copied, len(done.unreadable)) == (8, 1, 1, 2)
    undisturbed = shrink(open_data(photographs), tmp_path / "again", side=100)
    assert done.unreadable == undisturbed.unreadable
    assert files_below(tmp_path / "out") == files_below(tmp_path / "again")
    for name in (*files_below(tmp_path / "out"), ORIGINALS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(("kind", "side"), [("folder", 4), ("arrays", 4), ("arrays", 16)])
def test_a_run_that_was_trained_on_copies_knows_the_originals(tmp_path, kind, side):
    if kind == "folder":
        originals = str(tmp_path / "in")
        for label in "ab":
            (tmp_path / "in" / label).mkdir(parents=True)
            for k in range(12):
                picture(60, 60, 100 * (label == "b") + k).save(tmp_path / "in" / label / f"{k}.jpg")
    else:
        originals = "digits"
    table = open_data(originals)
    data = shrink(table, tmp_path / "out", side=side).data
    copies = assign_splits(open_data(data), val=0.2, test=0.2, seed=0)
    assert copies.warnings == ()
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.start({"recipe": {}}, "", copies)
    known = known_images(run.path)
    assert known.splits_of(content_hashes(copies)).tolist() == copies.splits.tolist()
    of_originals = known.splits_of(content_hashes(table))
    assert sorted(of_originals) == sorted(copies.splits)
    if kind == "folder":  # in the same order
        assert of_originals.tolist() == copies.splits.tolist()
    assert run_table(run.path, originals, None).splits.tolist() == of_originals.tolist()
    moved = Path(shutil.move(tmp_path / "out", tmp_path / "moved"))
    moved = moved if kind == "folder" else moved / "images.csv"
    assert run_table(run.path, str(moved), None).splits.tolist() == copies.splits.tolist()
    assert run.read_plan()["location"] == str(moved)  # where the run's own images are now


def test_what_can_not_be_read_is_named_and_copied_as_it_is(photographs, tmp_path, capsys):
    (photographs / "train/a/0.jpg").write_bytes(b"no image")
    assert run_command(["shrink", str(photographs), str(tmp_path / "out"), "--side", "100"]) == 1
    said = capsys.readouterr()
    assert f"{photographs}/train/a/0.jpg: is not a PNG" in said.err
    assert "7 made smaller, 4 copied as they are, 1 can't be read" in said.out
    assert (tmp_path / "out/train/a/0.jpg").read_bytes() == b"no image"
    assert files_below(tmp_path / "out") == files_below(photographs)
    keys = [line.split(",")[0] for line in (tmp_path / "out" / ORIGINALS).read_text().splitlines()]
    assert "train/a/0.jpg" not in keys  # its bytes are the original's
    assert len(keys) == 7
    for path in photographs.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(FileError, match="no image can be read"):
        shrink(open_data(photographs), tmp_path / "2", test_too=True)
    assert not list(tmp_path.glob("2*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"side": 0}, "side=0: a number from 1"),
        ({"quality": 101}, "quality=101"),
        ({"workers": 0}, "workers=0: at least 1"),
    ],
)
def test_wrong_values_are_refused(photographs, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        shrink(open_data(photographs), tmp_path / "out", **more)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_replaced_and_nothing_is_written_into_the_data(photographs, tmp_path):
    table = open_data(photographs)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        shrink(table, tmp_path / "out")
    with pytest.raises(UsageError, match="lies within"):
        shrink(table, photographs / "small")
    assert files_below(tmp_path / "out") == []
    assert not (photographs / "small.unfinished").exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_call_that_was_stopped_goes_on_to_the_same_folder(photographs, tmp_path, kind):
    for k in range(150):
        picture(500, 600, k).save(photographs / "train/a" / f"more {k}.jpg")
    arguments = ("shrink", photographs, tmp_path / "out", "--side", "100", "--workers", "1")
    process = start(*arguments)
    work = tmp_path / "out.unfinished"
    while not (work / "train/a").exists() or len(os.listdir(work / "train/a")) < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-kind if kind == signal.SIGKILL else 128 + kind)
    assert kind == signal.SIGKILL or "--resume" in said
    assert not (tmp_path / "out").exists()
    table = open_data(photographs)
    with pytest.raises(UsageError, match="resume it"):
        shrink(table, tmp_path / "out", side=100)
    with pytest.raises(UsageError, match="other values"):
        shrink(table, tmp_path / "out", side=90, resume=True)
    done = shrink(table, tmp_path / "out", side=100, resume=True)
    assert done.earlier >= 20
    assert done.earlier + done.smaller + done.copied == len(table)
    undisturbed = shrink(table, tmp_path / "again", side=100)
    assert done.size == undisturbed.size
    assert files_below(tmp_path / "out") == files_below(tmp_path / "again")
    for name in files_below(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_full_disk_ends_it_and_loses_nothing(photographs, tmp_path, monkeypatch):
    real, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > 5:
            real(path, content[:10])
            raise OSError(28, "No space left on device", str(path))
        return real(path, content)

    monkeypatch.setattr(module.Path, "write_bytes", full)
    table = open_data(photographs)
    with pytest.raises(OSError, match="No space left"):
        shrink(table, tmp_path / "out", side=100, workers=1)
    monkeypatch.undo()
    assert not [name for name in files_below(tmp_path / "out.unfinished") if "writing" in name]
    done = shrink(table, tmp_path / "out", side=100, resume=True)
    assert done.earlier >= 1
    assert len(open_data(tmp_path / "out")) == len(table)


@pytest.mark.parametrize(("waited", "named"), [(1.0, False), (3.0, True)])
def test_a_run_that_waits_much_for_files_names_it(tmp_path, caplog, waited, named):
    from regard.training.finish import _report

    source = StreamingLoader(None, None, 0, workers=0)
    trainer = SimpleNamespace(waited=waited, seconds=10.0, source=source)
    evaluation = SimpleNamespace(n=10, metrics={"top1": Estimate(0.5, 0.4, 0.6)})
    with caplog.at_level("INFO"):
        _report(SimpleNamespace(path=tmp_path), trainer, "test", evaluation)
    assert ("regard shrink" in caplog.text) == named
