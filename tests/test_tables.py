"""CSV faults by their line, and tables of arrays and paths that hold everything once."""

import importlib.machinery
import json
import os
import sys
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from regard.data.paths import PathList
from regard.data.sources import as_known, open_data
from regard.data.table import ImageTable, StackedArrays
from regard.training.recipe_files import load_recipe


def manifest(folder, text, *, encoding="utf-8", name="list.csv"):
    for file in ("x.png", "y.png", "sub/z.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(folder / file)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,label\nx.png,a\nsub,y.png,b\n", "line 3: 3 fields, but the header has 2"),
        ("path,label,Label\nx.png,a,b\n", "line 1: two columns are called 'label'"),
        ("path,label, path\nx.png,a,b\n", "line 1: two columns are called 'path'"),
        ("path,label\nx.png,a\ny\0.png,b\n", "line 3: a NUL byte in path"),
        ("path,label\nx.png,a\ny.png,b\0\n", "line 3: a NUL byte in label"),
        ('path,label\nx.png,a\n"y.png\n.png",b\nsub/z.png,c\n', "line 3: a line break in path"),
        ('path,label\nx.png,a\n"y.png\n,b\nsub/z.png,c\n', "line 3: is not CSV .* to line 5"),
        ('path,label,"note\nx.png,a,\ny.png,b,\n', "line 1: is not CSV .* to line 3"),
        ('path,label,note\nx.png,a,"so\ny.png,b,\nsub/z.png,c,\n', "line 2: is not CSV"),
        ('path,label,note\nx.png,a,"so\ny.png,b,see "b"\nsub/z.png,c,\n', "line 2: is not CSV"),
        ('path,label,\nx.png,a,"so\ny.png,b,4"\nsub/z.png,c,\n', "line 2: the quote in '' takes"),
        ('note,path,label\n"so,x.png,a\n4",y.png,b\n,sub/z.png,c\n', "line 2: the quote in 'note'"),
        ('path,label,note\nx.png,a,"so, or so\ny.png,b,\nsub/z.png,c,4"\n', "takes 3 lines into"),
        ("path,label,group\nx.png,a,p\ny.png,b,\n", "line 3: empty group"),
        ("path,label\n\n\nq.png,a\n", "line 4: .*q.png does not exist"),
        ("path,label\nx.png,a\n" + "y" * 200_000 + ",b\n", "line 3: is not CSV"),
        (b"path,label\nx.png,a\ny.png,s\xfc\xdf\n", "line 3: label .* is not UTF-8"),
    ],
)
def test_each_fault_has_its_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as error:
        open_data(manifest(tmp_path, text))
    assert "list.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_has_the_same_keys_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "own" / "sub").mkdir(parents=True)
    listed = f"path,label\n../x.png,a\nx.png,b\nsub/z.png,a\n{tmp_path}/sub/z.png,b\n"
    manifest(tmp_path, "")
    csv = manifest(tmp_path / "own", listed)
    keys = [f"{tmp_path}/x.png", "x.png", "sub/z.png", f"{tmp_path}/sub/z.png"]
    for place, name in (
        (tmp_path, csv),
        (tmp_path, "own/list.csv"),
        (tmp_path / "own/sub", "../list.csv"),
        (tmp_path / "own", "list.csv"),
    ):
        monkeypatch.chdir(place)
        table = open_data(name)
        assert [table.key(i) for i in range(4)] == keys
        manifest(tmp_path / "own", f"{listed}{tmp_path}/own/x.png,b\n")
        with pytest.raises(ValueError, match=r"line 6: path 'x\.png' again, after line 3"):
            open_data(name)
        manifest(tmp_path / "own", listed)


def test_a_cell_may_have_several_lines(tmp_path):
    note = "Seen twice, by A, and B.\nred, blue, green\n\nfoo, bar, baz"
    text = f'"path",label,"the\nnote"\nx.png,a,"{note}"\n\ny.png,b,\nx.png,b,\n'
    with pytest.raises(ValueError, match=r"line 9: path 'x.png' again, after line 3"):
        open_data(manifest(tmp_path, text))
    table = open_data(manifest(tmp_path, text.removesuffix("x.png,b,\n")))
    assert table.columns["the\nnote"].tolist() == [note, ""]


def test_further_columns_of_one_name_are_told(tmp_path):
    table = open_data(manifest(tmp_path, "path,label,Site,site\nx.png,a,1,3\ny.png,b,2,4\n"))
    assert table.columns["site"].tolist() == ["1", "2"]
    assert "2 columns are called 'site': the first one is used" in table.warnings


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("path\tlabel\nx.png\ta, b\ny.png\tc\n", "utf-8"),
        ("path;label\nx.png;a, b\ny.png;c\n", "utf-8"),
        ("path,label\nx.png,'a, b'\ny.png,c\n".replace("'", '"'), "utf-16"),
        ('path,label,,\nx.png,"a, b",,\ny.png,c,,,,\n', "utf-8"),
        ('\n\npath,label\r\nx.png,"a, b"\r\ny.png,c\r\n', "utf-8"),
    ],
)
def test_what_spreadsheets_write(tmp_path, text, encoding):
    table = open_data(manifest(tmp_path, text, encoding=encoding))
    assert table.classes == ["a, b", "c"]
    assert [table.key(i) for i in range(2)] == ["x.png", "y.png"]


def test_other_suffixes_and_places(tmp_path, monkeypatch):
    text = "path\tlabel\tsplit\nx.png\ta\tTraining\ny.png\tb\ttest\n"
    table = open_data(manifest(tmp_path, text, name="list.TSV"))
    assert table.splits.tolist() == ["train", "test"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_data("~/list.TSV").labels.tolist() == [0, 1]
    assert len(open_data(tmp_path / "list.TSV")) == 2


def test_lines_are_counted_from_the_top_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="line 5: empty label"):
        open_data(manifest(tmp_path, "\n\npath,label\nx.png,a\ny.png,\n"))


def test_paths_of_windows(tmp_path):
    table = open_data(manifest(tmp_path, "path,label\nsub\\z.png,a\ny.png,b\n"))
    assert table.read(0).shape == (4, 5, 3)


def test_the_splits_of_a_run_are_a_manifest(tmp_path):
    text = "path,label,split,group,content\nx.png,a,train,,00ff\ny.png,b,test,,\n"
    table = open_data(manifest(tmp_path, text))
    assert table.groups is None
    assert table.splits.tolist() == ["train", "test"]
    assert table.warnings == ()


def test_unused_columns_are_named_once(tmp_path):
    text = "age,path,label,note\n7,x.png,a,\n8,y.png,b,\n"
    (line,) = open_data(manifest(tmp_path, text)).warnings
    assert "age, note" in line


def test_paths_need_not_be_utf8(tmp_path):
    odd = tmp_path / "\udcff.png"
    manifest(tmp_path, b"")
    (tmp_path / "x.png").rename(odd)
    table = open_data(manifest(tmp_path, b"path,label\n\xff.png,a\ny.png,b\n"))
    assert table.path(0) == str(odd)
    assert table.read(0).shape == (4, 5, 3)


@pytest.mark.parametrize("data", ["a\0b", "nowhere/x.csv", "digitz", "~nobody/x"])
def test_what_is_not_there_is_said_not_to_exist(data):
    with pytest.raises(ValueError, match=r"no such folder or file|not a file name"):
        open_data(data)


@pytest.mark.parametrize("data", [None, 3, b"digits", ["digits"]])
def test_what_is_no_path_is_refused(data):
    with pytest.raises(ValueError, match="a path or a name is expected"):
        open_data(data)


def test_a_url_is_said_to_be_one():
    with pytest.raises(ValueError, match="is a URL"):
        open_data("https://example.org/list.csv")


def test_numbers_of_numpy_are_numbers():
    changes = {"epochs": np.int64(2), "lr": np.float32(0.5), "val": np.float64(0.25)}
    recipe = load_recipe("quick").changed(**changes, size=np.array([32, 48]))
    assert (recipe.epochs, recipe.lr, recipe.val, recipe.size) == (2, 0.5, 0.25, (32, 48))
    assert json.dumps([recipe.epochs, recipe.lr, recipe.val]) == "[2.0, 0.5, 0.25]"
    with pytest.raises(ValueError, match="epochs"):
        recipe.changed(epochs=np.array([1, 2]))


# ---- held once


def test_a_list_of_paths_is_a_list_of_strings():
    names = ["a/ü.png", "b/\udcff.png", "", "c"]
    paths = PathList.of(names)
    assert list(paths) == names
    assert paths[-1] == "c"
    assert list(paths[1:3]) == names[1:3]
    assert list(paths.select(np.array([3, 0]))) == ["c", "a/ü.png"]
    assert list(PathList.joined([paths, PathList.of(["d"])])) == [*names, "d"]
    assert "c" in paths
    with pytest.raises(IndexError):
        paths[4]
    assert len(PathList.of([])) == 0


def medmnist(path, write=np.savez, n=(600, 100, 300), side=64):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in zip(("train", "val", "test"), n, strict=True):
        images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
        images[:, side // 2 :] = 0  # so that it can be compressed
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
    write(path, **arrays)
    return arrays


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_medmnist_is_held_once_or_mapped(tmp_path, write):
    arrays = medmnist(tmp_path / "a.npz", write)
    size = sum(a.nbytes for k, a in arrays.items() if k.endswith("images"))
    open_data(f"medmnist:{tmp_path / 'a.npz'}")
    tracemalloc.start()
    table = open_data(f"medmnist:{tmp_path / 'a.npz'}")
    parts = [table.select(table.splits == s) for s in ("train", "val", "test")]
    again = parts[0].select(np.arange(0, 600, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # decompressed in place, and nothing but the labels where the file is mapped
    assert peak < (0.1 if write is np.savez else 1.3) * size + 3_000_000
    for part, split in zip(parts, ("train", "val", "test"), strict=True):
        expected = arrays[f"{split}_images"]
        assert np.array_equal(np.stack([part.read(i) for i in range(len(part))]), expected)
    assert np.array_equal(again.read(7), arrays["train_images"][14])
    assert again.path(7) == f"medmnist:{tmp_path / 'a.npz'}[14]"


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_cut_medmnist_file_is_one_line(tmp_path, write, cut):
    medmnist(tmp_path / "a.npz", write, n=(6, 3, 3), side=8)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ValueError, match=r"is not a readable \.npz file"):
        open_data(f"medmnist:{tmp_path / 'a.npz'}")


def test_stacked_arrays_are_as_if_concatenated():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 9, (n, 2, 2), np.uint8) for n in (3, 0, 4)]
    stacked, whole = StackedArrays(parts), np.concatenate(parts)
    assert len(stacked) == 7
    assert all(np.array_equal(stacked[i], whole[i]) for i in range(7))
    assert np.array_equal(stacked[2:6], whole[2:6])
    assert np.array_equal(np.asarray(stacked), whole)


# ---- classes


def test_many_classes_are_matched_quickly():
    names = [f"c{i}" for i in range(50_000)]
    table = ImageTable(
        "x", names, np.arange(50_000), np.array([""] * 50_000), files=[f"{n}.png" for n in names]
    )
    known = as_known(table, names[::-1])  # quadratic, it would take minutes
    assert known.labels.tolist() == list(range(49_999, -1, -1))


# ---- Hugging Face


class Column:
    def __init__(self, rows, features, keys=None):
        self.rows, self.features, self.keys = rows, features, keys
        self._fingerprint = "f"

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows]

    def __iter__(self):
        return iter(self.rows)

    def cast_column(self, *_):
        return self

    def select_columns(self, _):
        return self


def test_hugging_face_rows_without_label_or_image_are_left_out(tmp_path, monkeypatch):
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.Image = type("Image", (), {"__init__": lambda self, **_: None})
    module.ClassLabel = type("ClassLabel", (), {"names": ("cat", "dog")})
    features = {"image": module.Image(), "label": module.ClassLabel()}

    def rows(*labels):
        held = [{"bytes": b"x", "path": "x.png"}] * len(labels)
        return Column(
            [{"image": h, "label": v} for h, v in zip(held, labels, strict=True)], features
        )

    train, test, unlabeled = rows(0, None, 1, -1), rows(1, 1, 0), rows(-1, -1)
    test.rows[1]["image"] = None
    module.load_dataset = lambda *_: {"train": train, "test": test, "validation": unlabeled}
    monkeypatch.setitem(sys.modules, "datasets", module)
    table = open_data("hf:pets", root=tmp_path)
    assert table.labels.tolist() == [0, 1, 1, 0]
    assert table.splits.tolist() == ["train", "train", "test", "test"]
    said = " ".join(table.warnings)
    assert all(
        text in said
        for text in (
            "2 images of train without a label", "1 image of test without an image",
            "2 images of validation without a label",
        )
    )  # fmt: skip
    assert all(os.path.exists(path) for path in table.files)
    module.load_dataset = lambda *_: {"train": rows(None, -1)}
    with pytest.raises(ValueError, match="no image with a label"):
        open_data("hf:pets", root=tmp_path)


def test_notes_of_several_lines_are_no_rows_where_paths_have_no_suffix(tmp_path):
    for name in ("IM0001", "IM0002"):
        Image.new("L", (8, 8)).save(tmp_path / name, "PNG")
    rows = ['IM0001,a,"Mass, left\nseen again, no growth, benign"', "IM0002,b,"]
    (tmp_path / "a.csv").write_text("\n".join(["path,label,note", *rows]), encoding="utf-8")
    assert len(open_data(str(tmp_path / "a.csv"))) == 2
    rows[0] = 'IM0001,a,"Mass, left\nIM0002,b,benign"'
    (tmp_path / "a.csv").write_text("\n".join(["path,label,note", *rows]), encoding="utf-8")
    with pytest.raises(ValueError, match="look like rows"):
        open_data(str(tmp_path / "a.csv"))
