"""`wds:`: tar files of images, read in place as if they were files."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regard.data import ImageError, content, open_data, read_image
from regard.data.members import Member
from regard.data.survey import survey
from regard.errors import FileError, UsageError
from tests.helpers import QUICK, run


def write(shard: Path, files: dict[str, bytes]) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shard


def picture(value: int, size: int = 24) -> bytes:
    pixels = np.full((size, size, 3), value, np.uint8)
    pixels[: size // 2] = 255 - value
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def numbered(values: list[int], **more: bytes) -> dict[str, bytes]:
    """Samples whose class is the parity of their value."""
    files = {}
    for v in values:
        files |= {f"a/{v:03d}.jpg": picture(v), f"a/{v:03d}.cls": str(v % 2).encode()}
    return files | more


@pytest.fixture
def shards(tmp_path) -> Path:
    write(tmp_path / "in-train-000.tar", numbered(list(range(0, 12))))
    write(tmp_path / "in-train-001.tar", numbered(list(range(12, 24))))
    write(tmp_path / "in-test-000.tar", numbered(list(range(100, 108))))
    return tmp_path


def test_images_labels_and_splits_are_those_of_the_files(shards):
    table = open_data(f"wds:{shards}/in-{{train,test}}-*.tar")
    assert len(table) == 32
    assert table.classes == ["0", "1"]
    assert table.labels.tolist() == [v % 2 for v in (*range(24), *range(100, 108))]
    assert table.splits.tolist() == ["train"] * 24 + ["test"] * 8
    assert table.key(12) == "in-train-001.tar/a/012.jpg"
    for row, value in ((0, 0), (13, 13), (31, 107)):
        assert np.array_equal(table.read(row), read_image(picture(value)))
    some = table.select(np.array([31, 0, 13]))
    assert [some.key(i)[-7:] for i in range(3)] == ["107.jpg", "000.jpg", "013.jpg"]
    assert np.array_equal(some.read(2), table.read(13))
    assert list(some.files[1:]) == [table.path(0), table.path(13)]


@pytest.mark.parametrize(
    "pattern", ["in-train-{000..001}.tar", "in-train-00?.tar", "in-train-00[01].tar"]
)
def test_patterns_name_the_same_shards(shards, pattern):
    assert len(open_data(f"wds:{shards}/{pattern}")) == 24


def test_a_folder_is_all_shards_below_it(shards):
    (shards / "more").mkdir()
    write(shards / "more" / "in-test-001.tar", numbered([200, 201]))
    assert len(open_data(f"wds:{shards}")) == 34


def test_labels_come_from_json_folders_and_a_list_of_classes(tmp_path):
    def sample(**more) -> bytes:
        return json.dumps(more).encode()

    files = {"x.jpg": picture(1), "x.json": sample(label="cat", group="p1"),
             "y.JPG": picture(2), "y.json": sample(label="dog", group="p2")}  # fmt: skip
    table = open_data(f"wds:{write(tmp_path / 'a' / 'a.tar', files)}")
    assert table.classes == ["cat", "dog"]
    assert table.groups.tolist() == ["p1", "p2"]
    folders = {"cat/x.png": picture(1), "dog/x.webp": picture(2)}
    table = open_data(f"wds:{write(tmp_path / 'b' / 'b.tar', folders)}")
    assert (table.classes, table.labels.tolist()) == (["cat", "dog"], [0, 1])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "classes.txt").write_text("cat\ndog\nnewt\n", encoding="utf-8")
    table = open_data(f"wds:{write(tmp_path / 'c' / 'c.tar', numbered([0, 1]))}")
    assert table.classes == ["cat", "dog", "newt"]


def test_what_is_no_labeled_image_is_left_out_and_counted(tmp_path):
    files = numbered([0, 1]) | {
        "lonely.cls": b"0", "unlabeled.jpg": picture(3), "._a.jpg": b"Finder", "__m.json": b"{}"
    }  # fmt: skip
    table = open_data(f"wds:{write(tmp_path / 'a.tar', files)}")
    assert len(table) == 2
    assert table.warnings == ("left out: 1 samples without an image, 1 images without a label",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"0"}, "a has several images"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "no UTF-8"),
        ({"a.jpg": b"x", "a.json": b"{"}, "a: its .json can't be read"),
        ({"a.jpg": b"x"}, "no image with a label"),
        ({"a.jpg": b"x", "a.json": b'{"label": "c", "group": "g"}', "b.jpg": b"x", "b.cls": b"d"},
         "1 image without a group"),
    ],
)  # fmt: skip
def test_samples_that_can_not_be_understood_are_refused(tmp_path, files, message):
    with pytest.raises(UsageError, match=message):
        open_data(f"wds:{write(tmp_path / 'a.tar', files)}")


def test_shards_that_can_not_be_read_are_refused(shards, tmp_path):
    shard = shards / "in-train-000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        image = tar.getmembers()[8]
    damaged = bytearray(whole)
    damaged[image.offset + 150] ^= 1  # its header's checksum
    ends = (image.offset + 100, image.offset_data + 1)  # within a header, within an image
    for content_of in (bytes(damaged), b"", *(whole[:end] for end in ends)):
        shard.write_bytes(content_of)
        with pytest.raises(FileError, match=r"in-train-000\.tar: is no tar file, or is cut short"):
            open_data(f"wds:{shard}")
    for pattern, message in (
        ("in-train-{000..007}.tar", "no such file: .*in-train-002.tar"),
        ("missing-*.tar", "no such file"),
        ("s3://bucket/a.tar", "download"),
    ):
        where = pattern if "://" in pattern else f"{shards}/{pattern}"
        with pytest.raises(UsageError, match=message):
            open_data(f"wds:{where}")
    packed = shards / "a.tar.gz"
    packed.write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match="is compressed"):
        open_data(f"wds:{packed}")
    write(shards / "more.tar", numbered([1, 2]))
    with pytest.raises(UsageError, match=r"more\.tar has no train, val or test in its name"):
        open_data(f"wds:{shards}/{{in-test-000,more}}.tar")


def test_a_shard_that_shrinks_afterwards_is_an_unreadable_image(shards):
    table = open_data(f"wds:{shards}/in-test-*.tar")
    shard = shards / "in-test-000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"107\.jpg: .*cut short"):
        table.read(7)


def test_members_are_hashed_looked_at_and_sent_to_processes_as_files_are(shards):
    table = open_data(f"wds:{shards}/in-train-*.tar")
    hashes = content.content_hashes(table)
    file = shards / "000.jpg"
    file.write_bytes(picture(0))
    assert int(hashes[0]) == content.file_hash(file)
    assert (hashes != content.UNREADABLE).all()
    assert survey(table).shorter_sides == [24] * 24
    member = pickle.loads(pickle.dumps(table.path(3)))
    assert isinstance(member, Member)
    assert member == table.path(3)
    assert member.read() == picture(3)


def test_a_run_trains_on_shards_as_on_files_and_finds_them_again(shards, tmp_path):
    for k in range(2):  # the same images as files
        for name, data in numbered([*range(k * 12, k * 12 + 12)]).items():
            if name.endswith(".jpg"):
                folder = tmp_path / "files" / "train" / str(int(name[2:5]) % 2)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{k}-{name[2:]}").write_bytes(data)
    for value in range(100, 108):
        folder = tmp_path / "files" / "test" / str(value % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{value}.jpg").write_bytes(picture(value))
    out = tmp_path / "run"
    words = [*QUICK, "--size", "24", "--steps", "3", "--memory", "no", "--workers", "2"]
    run("train", f"wds:{shards}", *words, "--out", out)
    assert "8 images" in run("evaluate", out)
    assert "8 images" in run("evaluate", out, f"wds:{shards}/in-test-*.tar")
    assert "in-test-000.tar/a/107.jpg" in (out / "splits.csv").read_text(encoding="utf-8")
    run("report", out)
    run("train", f"wds:{shards}", *words, "--out", out, "--resume")
    assert "8 images" in run("evaluate", out, tmp_path / "files" / "test")
