"""Every kind of DATA as a table, every mistake in one line, and many files in little memory."""

import functools
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from regard.data.sources import class_counts, open_data
from regard.errors import ImageError, UsageError


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


def tree(root, *paths):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return str(root)


def names(table):
    return [os.path.relpath(file, table.base) for file in table.files]


def test_digits_are_scikit_learns():
    table = open_data("digits")
    digits = load_digits()
    assert len(table) == 1797
    assert table.classes == list("0123456789")
    assert np.array_equal(table.labels, digits.target)
    assert table.labels.dtype == np.int64
    assert set(table.splits) == {""}
    assert table.arrays.dtype == np.uint8
    assert np.abs(table.arrays - digits.images * 255 / 16).max() <= 0.5
    assert table.read(3).shape == (8, 8, 1)
    assert table.read(3, channels=3).shape == (8, 8, 3)
    assert table.path(12) == "digits[12]"


def test_a_selection_keeps_the_names():
    table = open_data("digits").select([5, 12, 9])
    assert table.path(1) == "digits[12]"
    again = table.select(np.array([False, True, True]))
    assert [again.path(0), again.path(1)] == ["digits[12]", "digits[9]"]
    assert np.array_equal(again.read(0)[..., 0], open_data("digits").arrays[12])
    assert again.labels.tolist() == open_data("digits").labels[[12, 9]].tolist()


def test_a_folder_of_class_folders(tmp_path):
    root = tree(
        tmp_path, "dog/b.JPG", "dog/a.png", "cat/deep/er/x.tiff", "cat/y.webp", "cat/.hidden.png",
        "cat/notes.txt", "cat/.git/z.png", ".cache/q.png", "README.md",
    )  # fmt: skip
    table = open_data(root)
    assert table.classes == ["cat", "dog"]
    assert names(table) == ["cat/deep/er/x.tiff", "cat/y.webp", "dog/a.png", "dog/b.JPG"]
    assert table.labels.tolist() == [0, 0, 1, 1]
    assert table.splits.tolist() == [""] * 4
    assert class_counts(table) == {"": {"cat": 2, "dog": 2}}


@pytest.mark.parametrize("word", ["val", "valid", "validation", "Val"])
def test_splits_on_top(tmp_path, word):
    root = tree(tmp_path, *(f"{s}/{c}/1.png" for s in ("test", word, "train") for c in "ab"))
    table = open_data(root)
    assert table.splits.tolist() == ["train", "train", "val", "val", "test", "test"]
    assert table.labels.tolist() == [0, 1] * 3
    assert class_counts(table)["val"] == {"a": 1, "b": 1}


def test_relative_folders_and_reading(tmp_path, monkeypatch):
    picture(tmp_path / "data/a/1.png", 7)
    picture(tmp_path / "data/b/1.png", 9)
    monkeypatch.chdir(tmp_path)
    table = open_data("data")
    assert table.path(1) == os.path.join("data", "b", "1.png")
    assert table.read(1, channels=1).tolist() == np.full((4, 5, 1), 9).tolist()
    monkeypatch.chdir(tmp_path / "data")
    assert names(open_data(".")) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["a/1.png", "b/readme.txt"], r"only one class \('a'\)"),
        (["1.png"], "has no class folders"),
        (["a/1.png"], r"only one class \('a'\)"),
        (["train/a/1.png", "test/a/1.png", "raw/1.png"], "splits=yes; or as 3 classes .*raw"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "two folders for one split"),
    ],
)
def test_folders_with_a_mistake(tmp_path, paths, told):
    with pytest.raises(ValueError, match=told) as caught:
        open_data(tree(tmp_path, *paths))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "prefix"), [("a.parquet", "hf"), ("a-000.TAR", "wds"), ("a.npz", "medmnist")]
)
def test_files_that_hold_many_images_are_told_how_to_give(tmp_path, monkeypatch, file, prefix):
    monkeypatch.chdir(tree(tmp_path, f"data/{file}"))
    with pytest.raises(UsageError, match=f"is a .* file: give {prefix}:data/{file}$"):
        open_data(f"data/{file}")
    with pytest.raises(UsageError, match="has no class folders") as caught:
        open_data(".")
    assert (f"files, give {prefix}:." in str(caught.value)) == (prefix != "medmnist")  # one file


def test_links_are_followed_once(tmp_path):
    root = tree(tmp_path / "data", "a/1.png", "b/2.png")
    tree(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/self").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    table = open_data(root)
    assert [os.path.basename(f) for f in table.files] == ["1.png", "3.png", "2.png", "3.png"]
    assert table.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.slow
def test_many_files_in_little_time_and_memory(tmp_path):
    for c in range(20):
        (tmp_path / f"c{c:02d}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"c{c:02d}/{i:04d}.png", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    table = open_data(str(tmp_path))
    seconds = time.process_time() - start
    assert np.bincount(table.labels).tolist() == [1000] * 20
    assert seconds < 2  # of this process; usually 0.1: a million in some seconds
    tracemalloc.start()
    open_data(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path = sys.getsizeof(table.files[0])
    assert peak < 20_000 * (path + 60) + 2_000_000  # the names, 60 bytes each, and a class's own


# ---- CSV


def manifest(folder, text, *, encoding="utf-8"):
    for name in ("x.png", "y.png", "sub/z.png"):
        picture(folder / name)
    (folder / "list.csv").write_text(text, encoding=encoding, newline="")
    return str(folder / "list.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_manifest(tmp_path, encoding, delimiter, newline):
    lines = ["path,Label,split,group,note", "x.png,süß,train,p1,", "sub/z.png,b,valid,p2,k",
             "", "y.png,b,,p1,"]  # fmt: skip
    text = newline.join(lines).replace(",", delimiter)
    table = open_data(manifest(tmp_path, text, encoding=encoding))
    assert table.classes == ["b", "süß"]
    assert table.labels.tolist() == [1, 0, 0]
    assert table.splits.tolist() == ["train", "val", ""]
    assert table.groups.tolist() == ["p1", "p2", "p1"]
    assert names(table) == ["x.png", "sub/z.png", "y.png"]
    assert table.read(1).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("cells", "splits"),
    [
        (("train", "dev", "Eval"), ["train", "val", "test"]),
        (("Training set", "Development", "hold-out"), ["train", "val", "test"]),
        (("training", "Train", "VALIDATION"), ["train", "train", "val"]),
        (("valid", "validation", "val"), ["val"] * 3),
    ],
)
def test_a_manifest_names_splits_as_other_data_does(tmp_path, cells, splits):
    rows = zip(("x.png", "sub/z.png", "y.png"), "aba", cells, strict=True)
    text = "\n".join(["path,label,split", *map(",".join, rows)])
    assert open_data(manifest(tmp_path, text)).splits.tolist() == splits


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,label\nx.png,a\n", "line 1: no column 'path' among file, label"),
        ("path,class\nx.png,a\n", "line 1: no column 'label'"),
        ("", "line 1: no column 'path'"),
        ("path,label\n", "lists no images"),
        ("path,label\nx.png,a\ny.png,\n", "line 3: empty label"),
        ("path,label\nx.png,a\ny.png\n", "line 3: empty label"),
        ("path,label\n,a\n", "line 2: empty path"),
        ("path,label,group\nx.png,a,p\ny.png,a, \n", "line 3: empty group"),
        ("path,label,split\nx.png,a,late\n", "line 2: split 'late': choose train, val, test"),
        ("path,label,split\nx.png,a,not for training\n", "line 2: split 'not for training'"),
        (
            "path,label,split\nx.png,a,Eval\ny.png,a,test\n",
            "line 3: splits 'test' and 'eval' are both a test split",
        ),
        (
            'path,label\n"x.png",a\n\ny.png,a\n./x.png,b\n',
            r"line 5: path 'x.png' again, after line 2",
        ),
        (
            "path,label\nsub\\z.png,a\nx.png,b\nsub/z.png,b\n",  # backslashes as on Windows
            "line 4: path 'sub/z.png' again, after line 2",
        ),
        (
            "path,label\n.\\x.png,a\ny.png,b\nsub\\..\\x.png,b\n",
            "line 4: path 'x.png' again, after line 2",
        ),
        ("path,label\nx.png,a\nPath,Label\ny.png,b\n", "line 3: the header again"),
        ("path,label\nx.png,a\n\ufeffpath,label\ny.png,b\n", "line 3: the header again"),
        ("path,label\nq.png,a\nx.png,b\n", r"q\.png does not exist"),
        ("path,label\nx.png,a\ny.png,a\n", "only one class"),
    ],
)
def test_manifests_with_a_mistake(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        open_data(manifest(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "list.csv" in str(caught.value)


def test_a_cell_may_have_quotes_after_a_space(tmp_path):
    text = 'path, "label", split\nx.png, "a, b", "train"\ny.png,"a, b",train\nsub/z.png, c, test\n'
    table = open_data(manifest(tmp_path, text))
    assert table.classes == ["a, b", "c"]
    assert table.labels.tolist() == [0, 0, 1]
    assert table.splits.tolist() == ["train", "train", "test"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,label\nx.png,süß\n", "line 2: label 's"),
        ("path,label,Größe\nx.png,a,1\n", "line 1: column 'gr"),
        ("path,label,site\nx.png,a,Rom\ny.png,b,Köln\n", "line 3: site 'K"),
    ],
)
def test_a_manifest_that_is_not_utf8(tmp_path, text, told):
    """Further columns, too: they are written with the predictions once a run has ended."""
    with pytest.raises(ValueError, match=f"{told}.*is not UTF-8"):
        open_data(manifest(tmp_path, text, encoding="cp1252"))


def test_names_that_may_be_meant_as_one_are_told(tmp_path):
    text = "path,label,group\nx.png,Benign,P 007\ny.png,benign,p7\nsub/z.png,b,p70\n"
    table = open_data(manifest(tmp_path, text))
    assert table.classes == ["Benign", "b", "benign"]
    assert table.warnings == (
        "classes that are spelled alike count as different ones: 'Benign' and 'benign'",
        "groups that are spelled alike count as different ones: 'P 007' and 'p7'",
    )
    text = "path,label,group\nx.png,1,1.05\ny.png,10,1.5\nsub/z.png,100,105\n"
    assert open_data(manifest(tmp_path, text)).warnings == ()
    # pandas writes the integers of a column with gaps as floats
    text = "path,label,group\nx.png,1,7.0\ny.png,1.0,07\nsub/z.png,v1.0,v1\n"
    assert open_data(manifest(tmp_path, text)).warnings == (
        "classes that are spelled alike count as different ones: '1' and '1.0'",
        "groups that are spelled alike count as different ones: '07' and '7.0'",
    )


def test_patients_that_are_missing_are_told(tmp_path):
    text = "path,label,group\nx.png,a,p1\ny.png,b,{}\nsub/z.png,b,{}\n"
    for one, other, warned in (("NaN", "NaN", True), ("nan", "p2", False), ("nan", "NaN", False)):
        warnings = open_data(manifest(tmp_path, text.format(one, other))).warnings
        said = f"the 2 images of group {one!r} count as one group: where the group is not known"
        assert any(line.startswith(said) for line in warnings) == warned
    empty = open_data(manifest(tmp_path, text.replace("p1", "").format("", "")))
    assert (empty.groups, empty.warnings) == (None, ())


@pytest.mark.parametrize(("label", "told"), [("nan", True), ("N/A", True), ("none", False)])
def test_a_missing_label_is_a_class_that_is_told(tmp_path, label, told):
    text = f"path,label\nx.png,a\ny.png,{label}\nsub/z.png,b\n"
    warnings = open_data(manifest(tmp_path, text)).warnings
    said = f"the class {label!r} (1 image) is a class like any other: where the label is not known"
    assert any(line.startswith(said) for line in warnings) == told


def test_a_column_of_patients_that_is_not_the_groups_is_told(tmp_path):
    rows = ["x.png,a,7", "y.png,b,7", "sub/z.png,a,8"]
    told = open_data(manifest(tmp_path, "\n".join(["path,label,Patient ID", *rows]))).warnings[1]
    assert told.startswith("images with the same 'patient id' may end up in different splits")
    for head in ("path,label,group", "path,label,site"):
        assert len(open_data(manifest(tmp_path, "\n".join([head, *rows]))).warnings) < 2
    every = ["path,label,patient", "x.png,a,7", "y.png,b,9", "sub/z.png,a,8"]
    assert len(open_data(manifest(tmp_path, "\n".join(every))).warnings) == 1  # one image each


def test_a_manifest_that_excel_named_the_separator_of(tmp_path):
    text = "sep=|\r\npath|label\r\nx.png|a,b;c\r\ny.png|b\r\nsub/z.png|b\r\n"
    assert open_data(manifest(tmp_path, text)).classes == ["a,b;c", "b"]
    with pytest.raises(ValueError, match="line 3: split 'nowhere'"):
        open_data(manifest(tmp_path, "sep=;\npath;label;split\nx.png;a;nowhere\n"))


# ---- data sets


def medmnist(path, shape=(28, 28), labels=None, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *shape), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 2)[:, None] if labels is None else labels(n)
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return f"medmnist:{path}", arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_medmnist(tmp_path, shape):
    data, arrays = medmnist(tmp_path / "a.npz", shape)
    table = open_data(data)
    assert class_counts(table) == {
        "train": {"0": 3, "1": 3}, "val": {"0": 1, "1": 1}, "test": {"0": 2, "1": 1},
    }  # fmt: skip
    assert np.array_equal(table.arrays[6:8], arrays["val_images"])
    assert table.read(8).shape == (28, 28, len(shape) == 2 or 3)
    assert table.path(8) == f"{data}[8]"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": lambda n: np.zeros((n, 14), int)}, "14 labels per image: multi-label"),
        ({"shape": (28, 28, 28)}, "train images are uint8 6x28x28x28"),
        ({"val_labels": None}, "has no val_labels"),
        ({"test_labels": np.zeros((2, 1), int)}, "test has 2 int64 labels, 3 images"),
        ({"test_labels": np.full((3, 1), -1)}, "test has the label -1"),
        ({"test_labels": np.full((3, 1), 2**40)}, "the label 1099511627776, but only 11 images"),
    ],
)
def test_medmnist_mistakes(tmp_path, changes, told):
    data, _ = medmnist(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=told):
        open_data(data)
    (tmp_path / "b.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"is not a readable \.npz file"):
        open_data(f"medmnist:{tmp_path / 'b.npz'}")
    with pytest.raises(ValueError, match="no such file"):
        open_data(f"medmnist:{tmp_path / 'c.npz'}")


@pytest.fixture
def address(tmp_path):
    """tmp_path served over HTTP by this machine to itself."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def small_cifar(folder, monkeypatch, address):
    """An archive as CIFAR-10's, of 5 x 4 + 4 images, for torchvision to download."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    held, sums = {}, {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        content = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 1, 0]}
        if name == "batches.meta":
            content = {"label_names": ["plane", "car"]}
        held[name] = pickle.dumps(content)
        sums[name] = hashlib.md5(held[name]).hexdigest()
    archive = folder / "small.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in held.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if "data" in n])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return archive, [pickle.loads(held[n])["data"] for n in sums if n != "batches.meta"]


# torchvision unpacks without a filter
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_cifar_is_fetched_once_and_read(tmp_path, monkeypatch, address):
    archive, raw = small_cifar(tmp_path, monkeypatch, address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    open_data("cifar10", root=tmp_path / "cache")
    archive.unlink()
    table = open_data("cifar10", root=tmp_path / "cache")  # without another download
    assert class_counts(table) == {
        "train": {"plane": 10, "car": 10}, "test": {"plane": 2, "car": 2},
    }  # fmt: skip
    expected = np.concatenate(raw).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(table.arrays, expected)


def test_cifar_out_of_reach_says_how_to_get_it(tmp_path, monkeypatch, address):
    archive, _ = small_cifar(tmp_path, monkeypatch, address)
    archive.unlink()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OSError, match="cifar10 can't be downloaded") as caught:
        open_data("cifar10", root=tmp_path / "cache")
    told = str(caught.value)
    assert "\n" not in told
    assert f"{address}/{archive.name}" in told
    assert str(tmp_path / "cache") in told


def test_hugging_face_without_the_extra():
    code = (
        "import sys, regard.data.sources as s; sys.modules['datasets'] = None\n"
        "try: s.open_data('hf:someone/pets')\n"
        "except ValueError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'regard[hf]'" in told.stdout


def test_hugging_face_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split in ("train", "test"):
        for c in ("cat", "dog"):
            picture(tmp_path / "pets" / split / c / "1.png", ord(c[0]))
    table = open_data(f"hf:{tmp_path / 'pets'}", root=tmp_path / "cache")
    assert table.classes == ["cat", "dog"]
    assert class_counts(table) == {s: {"cat": 1, "dog": 1} for s in ("train", "test")}
    assert [table.read(i)[0, 0, 0] for i in range(4)] == [ord("c"), ord("d")] * 2


def test_hugging_face_with_the_files_inside(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    picture(tmp_path / "1.png", 42)
    held = [{"bytes": (tmp_path / "1.png").read_bytes(), "path": "1.png"}] * 3
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])}
    )
    rows = pa.Table.from_pydict({"photo": held, "kind": [1, 0, 1]}, schema=features.arrow_schema)
    (tmp_path / "pets").mkdir()
    pq.write_table(rows, tmp_path / "pets" / "train.parquet")
    table = open_data(f"hf:{tmp_path / 'pets'}", root=tmp_path / "cache")
    assert table.labels.tolist() == [1, 0, 1]
    assert all(file.startswith(str(tmp_path / "cache")) for file in table.files)
    assert table.read(2)[0, 0].tolist() == [42] * 3


# ---- anything else


@pytest.mark.parametrize("data", ["imagenet", "nowhere/at/all", "none.csv", "", "medmnist:", "hf:"])
def test_unknown_data_names_the_choices(data):
    with pytest.raises(
        ValueError, match=r"digits, a folder .*cifar10.*medmnist:FILE\.npz, .*or hf:"
    ):
        open_data(data)


def test_reading_a_broken_file_names_it(tmp_path):
    table = open_data(tree(tmp_path, "a/1.png", "b/2.png"))
    with pytest.raises(ImageError, match=r"a/1\.png: is empty"):
        table.read(0)


def test_nothing_here_imports_torch():
    code = "import regard.data, sys, json; print(json.dumps([m for m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(out.stdout))
    assert "regard.data.audit" in loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "pydicom", "rich"}
