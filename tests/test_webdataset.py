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
    assert table.warnings == ("left out: 1 sample without an image, 1 image without a label",)


def test_patients_that_are_not_called_group_are_told(tmp_path):
    def table(key, patients):
        files = {}
        for i, patient in enumerate(patients):
            more = {"label": "ab"[i % 2], key: patient, "age": 7}
            files |= {f"{i}.jpg": picture(i), f"{i}.json": json.dumps(more).encode()}
        return open_data(f"wds:{write(tmp_path / 'a.tar', files)}")

    told = table("patient", [1, 1, 2, 2])
    assert len(told.warnings) == 1
    assert told.warnings[0].startswith("images with the same 'patient' may end up in different")
    assert table("patient", [1, 2, 3, 4]).warnings == ()
    assert table("group", [1, 1, 2, 2]).warnings == ()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"0"}, "a has several images"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "is not UTF-8"),
        ({"a.jpg": b"x", "a.json": b"{"}, "a: its .json can't be read"),
        ({"a.jpg": b"x"}, "no image with a label"),
        ({"a.1.jpg": b"x", "a.cls": b"c", "b.jpg": b"x", "b.cls": b"d"},
         r"only one class \('d'\); .* \(left out: 1 image with another dot"),
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
        with pytest.raises(FileError, match=r"train-000\.tar: is not a tar file, or is cut short"):
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


# ------------------------------------------------------------------------ tars as people make them
def test_a_label_that_is_missing_is_no_folder_and_parts_may_lie_apart(tmp_path):
    images = {f"./p{k}/{k}.jpg": picture(k) for k in range(4)}
    labels = {f"./p{k}/{k}.cls": str(k % 2).encode() for k in range(3)}
    table = open_data(f"wds:{write(tmp_path / 'a.tar', images | labels)}")
    assert (table.classes, table.labels.tolist()) == (["0", "1"], [0, 1, 0])
    assert table.warnings == ("left out: 1 image without a label",)
    assert table.key(2) == "a.tar/./p2/2.jpg"
    flat = {"./a.jpg": picture(1), "./b.jpg": picture(2)}
    with pytest.raises(UsageError, match="no image with a label"):
        open_data(f"wds:{write(tmp_path / 'b.tar', flat)}")


def test_of_two_members_of_one_name_the_last_counts_as_tar_unpacks_them(tmp_path):
    shard = write(tmp_path / "a.tar", numbered([0, 1]))
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("a/000.jpg")
        member.size = len(picture(9))
        tar.addfile(member, io.BytesIO(picture(9)))
    table = open_data(f"wds:{shard}")
    assert [table.key(i) for i in range(len(table))] == ["a.tar/a/000.jpg", "a.tar/a/001.jpg"]
    assert np.array_equal(table.read(0), read_image(picture(9)))
    assert "1 member replaced by a later one of the same name" in table.warnings[0]


def test_hard_links_are_the_files_before_them_and_other_links_are_counted(tmp_path):
    shard = write(tmp_path / "a.tar", {"x/1.jpg": picture(1), "x/1.cls": b"0"})
    with tarfile.open(shard, "a") as tar:
        for name, target, kind in (
            ("y/2.jpg", "x/1.jpg", tarfile.LNKTYPE), ("y/2.cls", "x/1.cls", tarfile.LNKTYPE),
            ("y/3.jpg", "x/1.jpg", tarfile.SYMTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    with tarfile.open(shard, "a") as tar:
        for name, data in numbered([7]).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    table = open_data(f"wds:{shard}")
    assert table.labels.tolist() == [0, 0, 1]
    assert np.array_equal(table.read(1), read_image(picture(1)))
    assert table.path(1).endswith("a.tar/y/2.jpg")
    assert "1 member other than a regular file" in table.warnings[0]


def test_what_follows_the_end_of_a_tar_is_not_lost_without_a_word(tmp_path):
    one, two = (write(tmp_path / f"{k}.tar", numbered([k, k + 1])) for k in (0, 2))
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(FileError, match="cut short or damaged"):
        open_data(f"wds:{tmp_path}/both.tar")


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        ((1.0, 0.0, None), ["0", "1"], [1, 0]),  # as pandas writes numbers with gaps
        ((10, 11, 13), ["10", "11", "13"], [0, 1, 2]),  # codes, not indices
        ((20231104, 20231105, 20231104), ["20231104", "20231105"], [0, 1, 0]),
        (("9" * 30, "b", "b"), ["b", "9" * 30], [1, 0, 0]),
        (("01", "1", "1"), ["1", "01"], [1, 0, 0]),
    ],
)
def test_numbers_are_indices_only_where_they_can_be(tmp_path, values, classes, labels):
    files = {}
    for k, value in enumerate(values):
        about = {"label": value, "group": None}
        files |= {f"d/{k}.jpg": picture(k), f"d/{k}.json": json.dumps(about).encode()}
    table = open_data(f"wds:{write(tmp_path / 'a.tar', files)}")
    assert (table.classes, table.labels.tolist(), table.groups) == (classes, labels, None)


@pytest.mark.parametrize("value", [1.5, True, ["a"], {"a": 1}])
def test_other_values_are_refused(tmp_path, value):
    files = {"a.jpg": picture(1), "a.json": json.dumps({"label": value}).encode()}
    with pytest.raises(UsageError, match=r"a: label is .*neither text nor a whole number"):
        open_data(f"wds:{write(tmp_path / 'a.tar', files)}")


@pytest.mark.parametrize(
    ("text", "labels", "classes", "expected"),
    [
        ("\ufeffcat \ndog\n\n\n", ["cat", "dog"], ["cat", "dog"], [0, 1]),
        ("1\n2\n3\n", ["1", "2"], ["1", "2", "3"], [0, 1]),  # these are its lines, not indices
        ("cat\ndog\nnewt\n", ["2", "0"], ["cat", "dog", "newt"], [2, 0]),
    ],
)
def test_classes_are_the_lines_of_the_file(tmp_path, text, labels, classes, expected):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    files = {}
    for k, label in enumerate(labels):
        files |= {f"{k}.jpg": picture(k), f"{k}.cls": label.encode()}
    table = open_data(f"wds:{write(tmp_path / 'a.tar', files)}")
    assert (table.classes, table.labels.tolist()) == (classes, expected)
    (tmp_path / "classes.txt").write_text("cat\ncat\n", encoding="utf-8")
    with pytest.raises(UsageError, match="names 'cat' twice"):
        open_data(f"wds:{tmp_path}/a.tar")
    for text, line in (("cat\n\ndog\n", 2), ("\ncat\ndog\n", 1)):  # which would shift the others
        (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=f"line {line} is empty"):
            open_data(f"wds:{tmp_path}/a.tar")


def test_damaged_headers_are_refused(tmp_path):
    shard = write(tmp_path / "a.tar", numbered([0, 1]))
    whole = bytearray(shard.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = whole.copy()
        broken[124:136] = b"\x80" + rng.bytes(11)  # the first member's size, in base 256
        total = sum(broken[:512]) - sum(broken[148:156]) + 8 * ord(" ")
        broken[148:156] = b"%06o\0 " % total
        shard.write_bytes(bytes(broken))
        with pytest.raises((FileError, UsageError)):
            open_data(f"wds:{shard}")


def test_splits_are_as_they_are_asked_for(shards):
    assert set(open_data(f"wds:{shards}", splits="no").splits.tolist()) == {""}
    write(shards / "more" / "x.tar", numbered([1, 2]))
    with pytest.raises(UsageError, match=r"x\.tar has no train, val or test in its name"):
        open_data(f"wds:{shards}/more/x.tar", splits="yes")


def test_names_with_braces_and_brackets_are_found_again(tmp_path, monkeypatch):
    folder = tmp_path / "set [1] br{v}"
    for split, values in (("train", list(range(8))), ("test", [8, 9])):
        write(folder / f"in-{split}.tar", numbered(values))
    assert len(open_data(f"wds:{folder}/in-train.tar")) == 8
    monkeypatch.chdir(folder)
    table = open_data("wds:in-*.tar")
    assert len(table) == 10
    assert table.location == ""  # a pattern that holds in this folder alone
    monkeypatch.chdir(tmp_path)
    assert len(open_data(f"wds:{folder}")) == 10


def test_compressed_shards_in_a_folder_and_dotted_names_are_counted(tmp_path):
    write(tmp_path / "A.TAR", numbered([0, 1]) | {"scan.001.jpg": picture(3)})
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    table = open_data(f"wds:{tmp_path}")
    assert len(table) == 2
    assert "1 compressed shard" in table.warnings[0]
    assert "1 image with another dot in the name" in table.warnings[1]
