"""No image lost, no group divided, every class where it can be; and the file that keeps it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.data.sources import ImageTable, open_data
from regard.data.splits import assign_folds, assign_splits, check_groups, limit_training
from regard.data.splits_file import read_splits, write_splits
from regard.errors import UsageError


def table(labels, *, groups=None, splits=None, classes=None):
    labels = np.array(labels, np.int64)
    return ImageTable(
        name="data",
        classes=classes or [f"c{i}" for i in range(max(2, labels.max() + 1))],
        labels=labels,
        splits=np.array([""] * len(labels) if splits is None else splits, "U5"),
        groups=None if groups is None else np.array(groups),
        files=[f"data/{i}.png" for i in range(len(labels))],
        base="data",
    )


def fractions(done, c):
    mine = done.splits[done.labels == c]
    return [np.mean(mine == s) for s in ("train", "val", "test")]


def test_every_class_is_divided_alike():
    done = assign_splits(open_data("digits"), val=0.1, test=0.2, seed=0)
    for c in range(10):
        assert np.abs(np.array(fractions(done, c)) - [0.7, 0.1, 0.2]).max() < 1 / 170
    assert done.warnings == ()
    assert set(done.splits) == {"train", "val", "test"}


def test_the_seed_decides():
    data = open_data("digits")
    first, again, other = (assign_splits(data, val=0.1, test=0.1, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.splits, again.splits)
    assert 0.05 < np.mean(first.splits != other.splits) < 0.5
    train = first.splits[first.labels == 0] == "train"
    assert train[:20].any()  # shuffled: neither the first nor the last
    assert not train[:40].all()
    assert not train[-40:].all()


@pytest.mark.parametrize(
    ("have", "val", "test", "found"),
    [
        (["train"] * 30 + ["test"] * 10, 0.2, 0.5, {"train": 24, "val": 6, "test": 10}),
        (["train"] * 30 + ["val"] * 10, 0.5, 0.2, {"train": 24, "val": 10, "test": 6}),
        (["train"] * 40, 0.2, 0.1, {"train": 28, "val": 8, "test": 4}),
        (["train"] * 30 + ["test"] * 10, 0, 0.2, {"train": 30, "test": 10}),
        (["train"] * 20 + ["test"] * 10 + ["val"] * 10, 0.2, 0.2,
         {"train": 20, "val": 10, "test": 10}),
        ([""] * 40, 0, 0.2, {"train": 32, "test": 8}),
        ([""] * 40, 0, 0, {"train": 40}),
    ],
)  # fmt: skip
def test_only_what_lacks_is_made(have, val, test, found):
    before = table([0, 1] * 20, splits=have)
    done = assign_splits(before, val=val, test=test, seed=0)
    assert dict(zip(*np.unique(done.splits, return_counts=True), strict=True)) == found
    given_ones = np.isin(before.splits, ["val", "test"])
    assert np.array_equal(done.splits[given_ones], before.splits[given_ones])


@pytest.mark.parametrize(
    ("have", "val", "test", "told"),
    [
        (["test"] * 4, 0.1, 0.1, "has no train images, only test"),
        (["train", "train", "", "test"], 0.1, 0.1, "1 image without a split"),
        ([""] * 4, -0.1, 0.1, "val=-0.1: at least 0"),
        ([""] * 4, 0.1, 1, "test=1: at least 0 and less than 1"),
        ([""] * 4, 0.5, 0.5, "leave nothing to train on"),
        ([""] * 4, 0.2, 0.2, "can't be divided into train, val, test"),
    ],
)
def test_mistakes(have, val, test, told):
    with pytest.raises(ValueError, match=told) as caught:
        assign_splits(table([0, 0, 1, 1], splits=have), val=val, test=test, seed=0)
    assert "\n" not in str(caught.value)


def test_rare_classes():
    data = table([0] * 50 + [1] * 2 + [2] * 3, classes=["many", "two", "three"])
    done = assign_splits(data, val=0.1, test=0.1, seed=0)
    assert set(done.splits[done.labels == 1]) == {"train"}
    assert sorted(done.splits[done.labels == 2]) == ["test", "train", "val"]
    assert done.warnings == ("class 'two' (2 images) is not in val and test",)


@given(
    st.lists(st.integers(0, 4), min_size=3, max_size=80),
    st.floats(0, 0.49),
    st.floats(0, 0.49),
    st.integers(0, 9),
)
def test_without_groups(labels, val, test, seed):
    data = table(labels)
    shares = {"train": 1 - val - test, "val": val, "test": test}
    wanted = [s for s, f in shares.items() if f > 0]
    try:
        done = assign_splits(data, val=val, test=test, seed=seed)
    except ValueError as error:
        assert max(np.bincount(labels)) < len(wanted), error  # noqa: PT017
        return
    for c, n in enumerate(np.bincount(labels)):
        mine = done.splits[done.labels == c]
        if n >= len(wanted):
            assert set(mine) == set(wanted)
            for s in wanted:
                assert abs(np.sum(mine == s) - shares[s] * n) <= 2
        else:
            assert set(mine) <= {"train"}


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=2, max_size=80),
    st.sampled_from([0, 0.1, 0.3]),
    st.sampled_from([0, 0.1, 0.3]),
    st.integers(0, 9),
)
def test_no_group_is_divided(rows, val, test, seed):
    labels, groups = zip(*rows, strict=True)
    data = table(labels, groups=[f"p{g}" for g in groups])
    wanted = {"train", *(["val"] if val else []), *(["test"] if test else [])}
    try:
        done = assign_splits(data, val=val, test=test, seed=seed)
    except ValueError as error:
        # a class needs one group in train at most, each other split one of the rest
        assert len(set(groups)) - len(set(labels)) < len(wanted) - 1, error  # noqa: PT017
        return
    for g in set(groups):
        assert len(set(done.splits[done.groups == f"p{g}"])) == 1
    assert set(done.splits) == wanted
    assert set(done.labels[done.splits == "train"]) == set(labels)
    for c in set(labels):
        lacking = wanted - set(done.splits[done.labels == c])
        told = [line for line in done.warnings if f"'c{c}'" in line]
        assert len(told) == bool(lacking)
        assert all(s in told[0].rpartition(" in ")[2] for s in lacking)


def test_few_groups_are_divided_where_they_can_be():
    # g0 has both classes; only with it alone in train do all splits have images
    data = table([0, 0, 0, 0, 1, 1], groups=["g0", "g1", "g1", "g1", "g0", "g2"])
    done = assign_splits(data, val=0.1, test=0.3, seed=0)
    assert set(done.splits[done.groups == "g0"]) == {"train"}
    assert set(done.splits) == {"train", "val", "test"}


@pytest.mark.parametrize("patients", [3, 4, 5])
def test_equal_patients_give_every_split_every_class(patients):
    """As many patients per class as splits or a few more, each with the same number of images."""
    labels = np.repeat(np.arange(4), patients * 6)
    groups = np.repeat([f"p{i}" for i in range(4 * patients)], 6)
    for seed in range(60):
        done = assign_splits(table(labels, groups=groups), val=0.1, test=0.2, seed=seed)
        for s in ("train", "val", "test"):
            assert set(done.labels[done.splits == s]) == {0, 1, 2, 3}, (seed, s)
        assert done.warnings == ()


def most_covered(members, splits):
    """(split, class) pairs that have an image, at most, where train has every class."""
    best = 0
    classes = set().union(*members)
    for chosen in itertools.product(range(splits), repeat=len(members)):
        have = [set() for _ in range(splits)]
        for k, own in zip(chosen, members, strict=True):
            have[k] |= own
        if have[0] == classes and all(have):
            best = max(best, sum(map(len, have)))
    return best


def test_groups_cover_as_many_classes_as_is_possible():
    rng = np.random.default_rng(0)
    covered, possible = [], []
    for _ in range(60):
        count = rng.integers(3, 8)
        sizes = rng.integers(1, 4, count)
        rows = [(c, g) for g in range(count) for c in rng.choice(4, sizes[g], replace=False)]
        rows = [row for row in rows for _ in range(rng.integers(1, 5))]
        labels, groups = zip(*rows, strict=True)
        best = most_covered([{c for c, o in rows if o == g} for g in range(count)], 3)
        try:
            data = table(labels, groups=[f"p{g}" for g in groups])
            done = assign_splits(data, val=0.1, test=0.2, seed=0)
        except ValueError:
            assert best == 0
            continue
        covered.append(len(set(zip(done.splits, done.labels, strict=True))))
        possible.append(best)
    assert np.mean(np.equal(covered, possible)) > 0.95
    assert np.sum(possible) - np.sum(covered) <= 3


@pytest.mark.parametrize("groups", [False, True])
def test_splits_do_not_depend_on_the_order_of_rows(groups):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    data = table(labels, groups=[f"p{i // 4}" for i in range(90)] if groups else None)
    first = assign_splits(data, val=0.2, test=0.2, seed=3)
    order = rng.permutation(90)
    other = assign_splits(data.select(order), val=0.2, test=0.2, seed=3)
    assert np.array_equal(other.splits, first.splits[order])
    digits = open_data("digits").select(range(200))
    order = rng.permutation(200)
    first, other = (
        assign_splits(t, val=0.2, test=0.2, seed=3) for t in (digits, digits.select(order))
    )
    assert np.array_equal(other.splits, first.splits[order])


def test_groups_meet_the_fractions():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 200, 3000)
    labels = (groups % 4 == 0).astype(int) + (rng.random(3000) < 0.1)  # unlike in each group
    done = assign_splits(table(labels, groups=groups.astype(str)), val=0.1, test=0.2, seed=0)
    for c in range(3):
        assert np.abs(np.array(fractions(done, c)) - [0.7, 0.1, 0.2]).max() < 0.03


def test_a_group_on_both_sides_is_named():
    data = table(
        [0, 1, 0, 1], groups=["a", "b", "b", "c"], splits=["train", "train", "test", "val"]
    )
    with pytest.raises(ValueError, match="group 'b' is in test and in train"):
        assign_splits(data, val=0.1, test=0.1, seed=0)
    check_groups(data.select([0, 1, 3]))


# ---- the file


@pytest.mark.parametrize("groups", [None, ["p,1", "ü", "ü", "p,1"]])
def test_written_and_read_again(tmp_path, groups):
    data = table([0, 1, 1, 0], groups=groups, splits=["train", "val", "val", "train"])
    write_splits(data, tmp_path / "splits.csv")
    blank = table([0, 1, 1, 0], groups=groups)
    assert np.array_equal(read_splits(blank, tmp_path / "splits.csv").splits, data.splits)
    lines = (tmp_path / "splits.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,label,split,group"
    assert lines[1] == ('0.png,c0,train,"p,1"' if groups else "0.png,c0,train,")
    assert [p.name for p in tmp_path.iterdir()] == ["splits.csv"]


def test_the_data_may_be_moved_and_reordered(tmp_path):
    for place in ("here", "there"):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/\udcff.png"):  # the last is not UTF-8
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).touch()
    data = open_data(str(tmp_path / "here"))
    done = assign_splits(data, val=0, test=0.5, seed=0)
    write_splits(done, tmp_path / "splits.csv")
    moved = open_data(str(tmp_path / "there"))
    assert np.array_equal(read_splits(moved, tmp_path / "splits.csv").splits, done.splits)
    turned = read_splits(moved.select([3, 2, 1, 0]), tmp_path / "splits.csv")
    assert np.array_equal(turned.splits, done.splits[::-1])


def test_digits_and_their_selection(tmp_path):
    part = assign_splits(open_data("digits").select(range(900, 1000)), val=0.2, test=0.2, seed=0)
    write_splits(part, tmp_path / "s.csv")
    again = read_splits(open_data("digits").select(range(900, 1000)), tmp_path / "s.csv")
    assert np.array_equal(again.splits, part.splits)
    with pytest.raises(ValueError, match=r"are not in it, such as digits\[0\]"):
        read_splits(open_data("digits").select(range(100)), tmp_path / "s.csv")


def test_other_data_is_named(tmp_path):
    path = tmp_path / "s.csv"
    data = table([0, 1, 1], groups=["p", "q", "q"], splits=["train", "val", "val"])
    write_splits(data, path)
    with pytest.raises(ValueError, match=r"1\.png is 'c1', but in data it is 'c0'"):
        read_splits(table([0, 0, 1], groups=["p", "q", "q"]), path)
    with pytest.raises(ValueError, match=r"2 of data's images are not in it, such as 3\.png"):
        read_splits(table([0, 1, 1, 0, 1], groups=["p", "q", "q", "r", "r"]), path)
    with pytest.raises(ValueError, match=r"lists 1 image that data lacks, such as 2\.png"):
        read_splits(data.select([0, 1]), path)
    with pytest.raises(ValueError, match=r"0\.png is of group 'p', but in data of 'z'"):
        read_splits(table([0, 1, 1], groups=["z", "q", "q"]), path)
    path.write_text(path.read_text().replace("1.png,c1,val", "1.png,c1,dev"))
    with pytest.raises(ValueError, match="line 3: can't be right"):
        read_splits(data, path)
    path.write_text(path.read_text().replace("dev,q", 'dev,"q'))
    with pytest.raises(ValueError, match="line 4: is not CSV"):
        read_splits(data, path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="line 1: is not path,label,split,group"):
        read_splits(data, path)


def test_folds_test_every_image_once_and_divide_no_group():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 80])
    groups = np.array([f"p{i}" for i in np.arange(120) // 4])
    plain = table(labels)
    grouped = table(labels, groups=groups)
    for images in (plain, grouped):
        tested = np.zeros(len(images), int)
        for fold in range(1, 6):
            done = assign_folds(images, fold=fold, folds=5, val=0.1, seed=3)
            tested += done.splits == "test"
            assert set(done.splits) == {"train", "val", "test"}
            share = (done.splits == "test").mean()
            assert abs(share - 0.2) < 0.05
            if images is plain:  # stratified
                assert np.bincount(done.labels[done.splits == "test"]).tolist() == [8, 16]
            else:
                for g in set(groups):
                    assert len(set(done.splits[groups == g])) == 1
        assert (tested == 1).all()
    shuffled = plain.select(rng.permutation(120))
    one = assign_folds(plain, fold=2, folds=5, val=0.1, seed=3)
    two = assign_folds(shuffled, fold=2, folds=5, val=0.1, seed=3)
    by_name = [
        dict(zip(map(t.key, range(120)), t.splits.tolist(), strict=True)) for t in (one, two)
    ]
    assert by_name[0] == by_name[1]


def test_folds_that_can_not_be_are_refused():
    few = table([0] * 3 + [1] * 9)
    with pytest.raises(UsageError, match="3 images, fewer than 5"):
        assign_folds(few, fold=1, folds=5, val=0.1, seed=0)
    with pytest.raises(UsageError, match="6/5"):
        assign_folds(few, fold=6, folds=5, val=0.1, seed=0)
    divided = replace(few, splits=np.array(["train"] * 9 + ["test"] * 3))
    with pytest.raises(UsageError, match="already has splits"):
        assign_folds(divided, fold=1, folds=3, val=0.1, seed=0)


def test_a_limit_keeps_the_classes_in_proportion_and_the_test_whole():
    done = assign_splits(table([0] * 60 + [1] * 180), val=0.1, test=0.2, seed=0)
    less = limit_training(done, 40, seed=0)
    assert (less.splits == "train").sum() == 40
    assert np.bincount(less.labels[less.splits == "train"]).tolist() == [10, 30]
    for split in ("val", "test"):
        assert (less.splits == split).sum() == (done.splits == split).sum()
    kept = {less.key(i) for i in range(len(less))}
    order = np.random.default_rng(1).permutation(len(done))
    again = limit_training(done.select(order), 40, seed=0)
    assert {again.key(i) for i in range(len(again))} == kept
    other = limit_training(done, 40, seed=1)
    assert {other.key(i) for i in range(len(other))} != kept
    assert len(limit_training(done, 10**6, seed=0)) == len(done)
    with pytest.raises(UsageError, match="2 classes"):
        limit_training(done, 1, seed=0)
