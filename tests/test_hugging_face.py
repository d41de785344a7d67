"""`hf:NAME`: what `datasets` loads becomes a table of labeled images."""

import os
import sys
import types

import pytest

from regard.data import hugging_face
from regard.data.hugging_face import name_and_configuration, open_hugging_face
from regard.data.sources import class_counts, open_data
from regard.errors import FileError, UsageError
from regard.trained_on import own_data
from tests.test_sources import picture


class Picture:
    """Stands for `datasets.Image`."""

    def __init__(self, decode: bool = True) -> None:
        pass


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class Part:
    """Stands for `datasets.Dataset`: columns of values with a feature each."""

    _fingerprint = "0123"

    def __init__(self, **columns: tuple[object, list]) -> None:
        self.features = {name: feature for name, (feature, _) in columns.items()}
        self.values = {name: values for name, (_, values) in columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, column: str) -> list:
        return self.values[column]

    def cast_column(self, *_: object) -> "Part":
        return self

    def select_columns(self, names: list[str]) -> list[dict]:
        return [{name: self.values[name][i] for name in names} for i in range(len(self))]


def pictures(*names: str) -> tuple[Picture, list]:
    return Picture(), [{"bytes": name.encode(), "path": name} for name in names]


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """Has `datasets` give these splits, or raise this error, to `open_hugging_face`."""
    module = types.ModuleType("datasets")
    module.Image, module.ClassLabel = Picture, ClassLabel
    module.exceptions = types.SimpleNamespace(DatasetGenerationError=BrokenError)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hugging_face, "require", lambda *_: None)

    def load(splits):
        def loaded(_, configuration):
            if isinstance(splits, Exception):
                raise splits
            return splits

        module.load_dataset = loaded
        return open_hugging_face("hf:pets", "someone/pets", tmp_path / "cache")

    return load


class BrokenError(Exception):
    """Stands for `datasets.exceptions.DatasetGenerationError`, which is no ValueError."""


@pytest.mark.parametrize(
    ("feature", "values", "classes", "labels"),
    [
        (Value("string"), ["cat", None, "ant", ""], ["ant", "cat"], [1, 0]),
        (Value("int64"), [10, 9, -1, 10], ["9", "10"], [1, 0, 1]),
        (Value("bool"), [True, False, None, True], ["False", "True"], [1, 0, 1]),
        (Value("float64"), [10.0, 9.0, float("nan"), -1.0], ["9", "10"], [1, 0]),  # by pandas
        (ClassLabel("b", "a"), [1, 0, None, -1], ["b", "a"], [1, 0]),
    ],
)
def test_labels_of_any_kind_are_classes(loads, feature, values, classes, labels):
    table = loads({"train": Part(img=pictures(*"1234"), label=(feature, values))})
    assert table.classes == classes
    assert table.labels.tolist() == labels
    assert f"{4 - len(labels)} image" in table.warnings[0]


@pytest.mark.parametrize(
    ("key", "feature", "values", "splits", "told"),
    [
        ("train", Value("string"), ["train", "Validation", "test", None],
         ["train", "val", "test", ""], None),
        ("full", ClassLabel("test", "train"), [0, 1, 1, -1], ["test", "train", "train", ""], None),
        ("train", Value("string"), ["a", "b", "a", " "], ["train"] * 4, "holds 'a', 'b'"),
        ("test", Value("string"), ["eval", "holdout", "test", "dev"], ["test"] * 4, "are test by"),
        ("train", Value("string"), [None] * 4, ["train"] * 4, None),
        ("test", Value("string"), ["test", "train", "test", "test"], ["test"] * 4, "are test by"),
        ("test", Value("string"), ["test"] * 4, ["test"] * 4, None),
        ("train", Value("float32"), [0.5] * 4, ["train"] * 4, None),
    ],
)  # fmt: skip
def test_a_column_called_split_is_that_of_a_csv_file(loads, key, feature, values, splits, told):
    """A file has no splits of its own: `datasets` calls all of it train, also the test images."""
    label = (ClassLabel("a", "b"), [0, 1, 0, 1])
    table = loads({key: Part(image=pictures(*"1234"), label=label, split=(feature, values))})
    assert table.splits.tolist() == splits
    assert [line for line in table.warnings if "'split'" in line] == list(table.warnings)
    assert told is None or told in table.warnings[0]
    assert bool(table.warnings) == (told is not None)


def test_rows_of_another_split_are_left_out_and_counted(loads):
    """Also where the column says it: the test image does not become a training image."""
    label, words = (ClassLabel("a", "b"), [0, 1, 0, 1]), ["train", "extra", "test", "extra"]
    part = Part(image=pictures(*"1234"), label=label, split=(Value("string"), words))
    table = loads({"train": part})
    assert table.splits.tolist() == ["train", "test"]
    assert "2 images of a split that is not train, validation or test" in table.warnings[0]


def test_each_split_is_read_with_its_own_names(loads):
    table = loads({
        "train": Part(image=pictures("1", "2"), label=(ClassLabel("a", "b"), [0, 1])),
        "dev": Part(image=pictures("3", "4"), label=(ClassLabel("b", "c"), [0, 1])),
        "extra": Part(image=pictures("5"), label=(ClassLabel("a", "b"), [0])),
    })  # fmt: skip
    assert table.classes == ["a", "b", "c"]
    assert [table.classes[i] for i in table.labels] == ["a", "b", "b", "c"]
    assert table.splits.tolist() == ["train", "train", "val", "val"]
    assert "1 image of extra" in table.warnings[0]
    only = loads({"full": Part(image=pictures("1", "2"), label=(ClassLabel("a", "b"), [0, 1]))})
    assert only.splits.tolist() == ["", ""]


@pytest.mark.parametrize("first", [True, False])
def test_a_split_that_is_left_out_orders_no_classes(loads, first):
    extra = {"extra": Part(image=pictures("5"), size=(Value("int64"), [3]))}
    splits = {
        name: Part(image=pictures(name, name + "2"), label=(ClassLabel("zebra", "ant"), [0, 1]))
        for name in ("train", "test")
    }
    table = loads(extra | splits if first else splits | extra)
    assert table.classes == ["zebra", "ant"]


@pytest.mark.parametrize(
    ("feature", "values", "groups"),
    [
        (Value("string"), ["p1", " p1", "lost", "p2"], ["p1", "p1", "p2"]),
        (Value("int64"), [7, 7, 9, 0], ["7", "7", "0"]),
        (Value("float64"), [7.0, 7.0, float("nan"), 10.0], ["7", "7", "10"]),  # by pandas
        (ClassLabel("x", "y"), [1, 1, 0, 0], ["y", "y", "x"]),
        (Value("string"), [None, "", "lost", None], None),
    ],
)
def test_a_column_called_group_holds_the_groups(loads, feature, values, groups):
    label = (ClassLabel("a", "b"), [0, 1, -1, 0])
    table = loads({"train": Part(image=pictures(*"1234"), label=label, group=(feature, values))})
    assert (None if table.groups is None else table.groups.tolist()) == groups


def test_an_image_without_a_group_and_groups_of_another_type_are_refused(loads):
    def part(feature, values):
        return Part(image=pictures("1", "2"), label=(ClassLabel("a", "b"), [0, 1]),
                    group=(feature, values))  # fmt: skip

    with pytest.raises(UsageError, match="1 image without a group"):
        loads({"train": part(Value("string"), ["p1", None])})
    with pytest.raises(UsageError, match="1 image without a group"):
        loads({"train": part(ClassLabel("p", "q"), [-1, 1])})
    with pytest.raises(UsageError, match="'group' holds numbers that are not whole"):
        loads({"train": part(Value("float64"), [1.5, 2.0])})
    with pytest.raises(UsageError, match="'group' holds neither"):
        loads({"train": part(Value("binary"), [b"1", b"2"])})
    without = Part(image=pictures("3"), label=(ClassLabel("a", "b"), [0]))
    with pytest.raises(UsageError, match="1 image without a group"):
        loads({"train": part(Value("int64"), [1, 2]), "test": without})


def test_a_label_called_group_is_no_group(loads):
    table = loads({"train": Part(image=pictures(*"12"), group=(ClassLabel("a", "b"), [0, 1]))})
    assert table.classes == ["a", "b"]
    assert table.groups is None


def test_a_column_of_patients_that_is_not_called_group_is_told(loads):
    def table(**more):
        label = (ClassLabel("a", "b"), [0, 1, 0, 1])
        return loads({"train": Part(image=pictures(*"1234"), label=label, **more)})

    told = table(Patient_ID=(Value("int64"), [1, 1, 2, 2]))
    assert told.warnings[0].startswith("images with the same 'Patient_ID' may end up in different")
    assert told.groups is None
    assert table(patient=(Value("int64"), [1, 2, 3, 4])).warnings == ()
    both = table(patient=(Value("int64"), [1, 1, 2, 2]), group=(Value("int64"), [1, 1, 2, 2]))
    assert both.warnings == ()


def test_of_several_columns_the_usual_names_are_taken(loads):
    table = loads({
        "train": Part(
            mask=pictures("8", "9"), image=pictures("1", "2"),
            sex=(ClassLabel("f", "m"), [0, 0]), label=(ClassLabel("a", "b"), [0, 1]),
        )
    })  # fmt: skip
    assert table.classes == ["a", "b"]
    with open(table.files[0], "rb") as file:
        assert file.read() == b"1"
    struct = {"bytes": Value("binary"), "path": Value("string")}
    plain = Part(image=(struct, pictures("1")[1]), label=(ClassLabel("a"), [0]))
    assert len(loads({"train": plain}).files) == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": Part(image=pictures("1"), label=(ClassLabel("a", "b"), [7]))}, "label 7, but"),
        ({"train": Part(image=pictures("1"), kind=(Value("string"), ["a"]))}, "has none"),
        ({"train": Part(image=pictures("1"), label=(Value("float32"), [0.5]))}, "not whole"),
        ({"train": Part(image=pictures("1"), label=(Value("binary"), [b"a"]))}, "has none"),
        (
            {"train": Part(
                image=pictures("1"), fine=(ClassLabel("a"), [0]), coarse=(ClassLabel("b"), [0]),
            )},
            "fine, coarse",
        ),
        ({"train": Part(label=(ClassLabel("a"), [0]))}, "Image, has none"),
        ({"validation": Part(a=(Value("x"), [])), "dev": Part(a=(Value("x"), []))}, "and dev"),
        ({"x": Part(a=(Value("x"), [])), "y": Part(a=(Value("x"), []))}, "x, y"),
    ],
)  # fmt: skip
def test_what_can_not_be_used_is_named(loads, splits, message):
    with pytest.raises(UsageError, match=message):
        loads(splits)


def test_whatever_the_loader_raises_is_one_line_with_its_cause(loads):
    broken = BrokenError("An error occurred")
    broken.__cause__ = ValueError("can't cast\nlabel")
    for error, message in (
        (broken, r"can't cast label\)"),
        (LookupError("no\nsuch"), r"no such\)"),
        (
            ValueError("Config name is missing: ['a']\nExample of usage: load()"),
            r"\['a'\]\); add it: hf:pets:C",
        ),
    ):
        with pytest.raises(FileError, match=message) as caught:
            loads(error)
        assert "\n" not in str(caught.value)
        assert "Example of usage" not in str(caught.value)


def test_names_within_the_data_name_no_files(loads):
    paths = ["../../x.png", "b." + "x" * 300, "c.p\0g", None]
    held = [{"bytes": b"1", "path": path} for path in paths] + [{"bytes": None, "path": None}]
    part = Part(image=(Picture(), held), label=(ClassLabel("a"), [0] * 5))
    table = loads({"train": part})
    names = [os.path.basename(path) for path in table.files]
    assert names == ["train-00000000.png", *(f"train-{i:08d}" for i in (1, 2, 3))]
    assert "1 image of train without an image" in table.warnings[0]


def test_several_processes_may_unpack_the_same_files(loads, monkeypatch):
    splits = {"train": Part(image=pictures("1", "2"), label=(ClassLabel("a", "b"), [0, 1]))}
    replace, others = os.replace, []

    def meanwhile(old, new):
        if not others:  # another process, between the writing and the renaming
            others.append(True)
            others.append(loads(splits))
        replace(old, new)

    monkeypatch.setattr(os, "replace", meanwhile)
    table = loads(splits)
    assert list(table.files) == list(others[1].files)
    for path, content in zip(table.files, (b"1", b"2"), strict=True):
        with open(path, "rb") as file:
            assert file.read() == content
    assert len(os.listdir(os.path.dirname(table.files[0]))) == 2


def test_a_cache_that_can_not_be_written_and_a_file_are_one_line(loads, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(FileError, match="can't be written"):
        loads({"train": Part(image=pictures("1"), label=(ClassLabel("a"), [0]))})
    with pytest.raises(UsageError, match="is a file"):
        open_hugging_face("hf:pets", str(tmp_path / "cache"), tmp_path)


def test_parquet_files_without_the_types_of_datasets(tmp_path, monkeypatch):
    """As pandas and pyarrow write them: a file's bytes, alone or in a struct."""
    datasets = pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    pandas = pytest.importorskip("pandas")
    picture(tmp_path / "0.png", 40)
    content = (tmp_path / "0.png").read_bytes()
    for name, image in (("plain", content), ("struct", {"bytes": content, "path": "0.png"})):
        rows = {"image": [image] * 3, "label": [1, 0, None], "split": ["test", "train", "train"]}
        (tmp_path / name).mkdir()
        pandas.DataFrame(rows).to_parquet(tmp_path / name / "data.parquet")
        for source in (tmp_path / name, tmp_path / name / "data.parquet"):
            table = open_data(f"hf:{source}", root=tmp_path / "cache")
            assert class_counts(table) == {"train": {"0": 1, "1": 0}, "test": {"0": 0, "1": 1}}
            assert table.read(0)[0, 0, 0] == 40


def test_a_column_of_bytes_is_of_images_where_no_other_is(loads):
    held, label = pictures("1")[1], (ClassLabel("a"), [0])
    bytes_ = (Value("binary"), [b"x"])
    assert len(loads({"train": Part(x=(Value("binary"), held), label=label)}).files) == 1
    two = {"mask": bytes_, "image": (Value("large_binary"), held), "label": label}
    assert len(loads({"train": Part(**two)}).files) == 1
    with pytest.raises(UsageError, match="Image, has none"):
        loads({"train": Part(x=bytes_, image=(Value("string"), ["a.png"]), label=label)})


def test_what_save_to_disk_wrote_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    for c in ("cat", "dog"):
        for i in range(2):
            picture(tmp_path / "pets" / "train" / c / f"{i}.png", ord(c[0]))
    loaded = datasets.load_dataset(str(tmp_path / "pets"), cache_dir=str(tmp_path / "hf"))
    loaded.save_to_disk(str(tmp_path / "all"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("all", "one"):
        table = open_data(f"hf:~/{name}", root=tmp_path / "cache")
        assert class_counts(table) == {"train": {"cat": 2, "dog": 2}}
        assert table.read(0)[0, 0, 0] == ord("c")
    # a folder's images keep their names in it wherever it is
    table = open_data(f"hf:{tmp_path / 'pets'}", root=tmp_path / "cache")
    assert table.key(0) == os.path.join("train", "cat", "0.png")


def test_a_configuration_follows_the_name(tmp_path, monkeypatch):
    """Two configurations of a local data set, and the run's data are found again."""
    datasets = pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    pets = tmp_path / "pets"
    for configuration, classes in (("small", "ab"), ("large", "abc")):
        for c in classes:
            picture(pets / configuration / "train" / c / "0.png", ord(c))
    configurations = "".join(
        f"- config_name: {c}\n  drop_labels: false\n  data_files:\n"
        f"  - split: train\n    path: {c}/train/**\n"
        for c in ("small", "large")
    )
    (pets / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n", encoding="utf-8")
    for name, classes in (("small", 2), ("large", 3)):
        table = open_data(f"hf:{pets}:{name}", root=tmp_path / "cache")
        assert len(table.classes) == classes
        plan = {"data": f"hf:{pets}:{name}", "location": table.location}
        assert len(own_data(tmp_path, plan, tmp_path / "cache").classes) == classes
    with pytest.raises(FileError, match=r"small.*; add it: hf:.*pets:CONFIG"):
        open_data(f"hf:{pets}", root=tmp_path / "cache")
    with pytest.raises(FileError, match="medium"):
        open_data(f"hf:{pets}:medium", root=tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("someone/pets", ("someone/pets", None)),
        ("someone/pets:small", ("someone/pets", "small")),
        ("C:\\pets", ("C:\\pets", None)),
        ("C:\\pets:small", ("C:\\pets", "small")),
    ],
)
def test_the_last_colon_separates_name_and_configuration(source, parts):
    assert name_and_configuration(source) == parts


def test_a_folder_with_a_colon_in_its_name_is_a_folder(tmp_path):
    (tmp_path / "pets:small").mkdir()
    source = str(tmp_path / "pets:small")
    assert name_and_configuration(source) == (source, None)
