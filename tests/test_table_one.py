"""Table 1 of a paper, and the sentence about images of one patient without groups."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from regard.cli import run_command
from regard.data.advice import group_risk
from regard.data.sources import open_data
from regard.data.table import ImageTable


@pytest.fixture
def manifest(tmp_path):
    lines = ["path,label,split,group,site,age"]
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
        site, age = ("", "Kö|n", "B")[i % 3], "" if i == 3 else str(30 + i)
        split = ("train", "test")[i >= 8]
        lines.append(f"{i}.png,{'ab'[i % 4 == 0]},{split},p{i // 2},{site},{age}")
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "a.csv"


def test_counts_shares_and_quartiles(manifest, tmp_path, capsys):
    made = tmp_path / "table 1.csv"
    wanted = ["data", str(manifest), "--val", "0", "--table1", str(made)]
    assert run_command(wanted) == 0
    rows = {row[0]: row[1:] for row in csv.reader(made.read_text(encoding="utf-8").splitlines())}
    assert rows[""] == ["Overall", "Training", "Test"]
    assert rows["Images, n"] == ["12", "8", "4"]
    assert rows["Groups, n"] == ["6", "4", "2"]
    assert rows["Images per group, median (range)"] == ["2 (2 to 2)"] * 3
    assert rows["  b"] == ["3 (25.0)", "2 (25.0)", "1 (25.0)"]
    assert rows["  Kö|n"] == ["4 (33.3)", "3 (37.5)", "1 (25.0)"]
    assert rows["  (missing)"] == ["4 (33.3)", "3 (37.5)", "1 (25.0)"]
    low, middle, high = np.percentile([a for a in range(30, 42) if a != 33], [25, 50, 75])
    assert rows["age, median (quartiles)"][0] == f"{middle:.4g} ({low:.4g} to {high:.4g})"
    assert rows["  (missing), n"] == ["1", "1", "0"]
    assert run_command(wanted) == 2  # nothing is replaced
    assert "not replaced" in capsys.readouterr().err
    assert run_command([*wanted[:-1], str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "| Images, n | 12 | 8 | 4 |" in text
    assert "Kö\\|n" in text
    assert run_command([*wanted[:-1], str(tmp_path / "t.xlsx")]) == 2


def test_images_that_can_not_be_read_are_not_counted(manifest, tmp_path):
    (tmp_path / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    made = tmp_path / "t.md"
    assert run_command(["data", str(manifest), "--val", "0", "--table1", str(made)]) == 0
    assert "| Images, n | 11 | 7 | 4 |" in made.read_text(encoding="utf-8")


def test_codes_are_no_numbers_and_missing_is_said_in_many_ways():
    from regard.data.table_one import table_one

    columns = {
        "visit": [f"4_{i}" for i in range(12)],  # Python reads 41 in 4_1
        "dose": ["NA", "n/a", "inf", ""] + [str(100_000 + i) for i in range(8)],
        "grade": ["nan", "", *(["high", "low"] * 5)],
    }
    table = replace(
        table_of([f"{i}.png" for i in range(12)]),
        columns={name: np.array(cells) for name, cells in columns.items()},
    )
    rows = table_one(table)
    names = [row[0] for row in rows]
    assert not any("visit" in name and "median" in name for name in names)
    dose = names.index("dose, median (quartiles)")
    assert rows[dose][1] == "100004 (100002 to 100005)"
    assert rows[dose + 1][:2] == ["  (missing), n", "4"]
    grade = names.index("grade, n (%)")
    assert [row[:2] for row in rows[grade + 1 :]] == [
        ["  high", "5 (41.7)"], ["  low", "5 (41.7)"], ["  (missing)", "2 (16.7)"]
    ]  # fmt: skip


def table_of(names, classes=2, groups=None):
    count = len(names)
    return ImageTable(
        name="x", classes=list("abcdefghij"[:classes]), labels=np.arange(count) % classes,
        splits=np.full(count, ""), files=[f"/x/{name}" for name in names], groups=groups,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "risk"),
    [
        ([f"P{i // 3:04d}_{i % 3}.png" for i in range(60)], "P0000_0.png and P0000_1.png"),
        ([f"case {i // 2}-{'ab'[i % 2]}.jpg" for i in range(40)], "case 0-a.jpg"),
        ([f"{i}.dcm" for i in range(20)], "DICOM"),
        ([f"benign ({i}).png" for i in range(60)], None),
        ([f"n0210204{i % 2}_{i}.JPEG" for i in range(60)], None),  # a prefix for each class
        ([f"{i:04d}.jpg" for i in range(60)], None),
        ([f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(60)], None),
    ],
)
def test_images_of_patients_without_groups(names, risk):
    line = group_risk(table_of(names))
    assert (line is None) == (risk is None)
    if risk is not None:
        assert risk in line
        assert "column group" in line
    assert group_risk(table_of(names, groups=np.array(names))) is None


def test_the_check_says_so(tmp_path):
    from regard.data.audit import check_data

    for i in range(24):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 9 * i).save(tmp_path / "ab"[i % 2] / f"P{i // 4}_{i % 4}.png")
    lines = check_data(open_data(str(tmp_path))).warnings
    assert sum("column group" in line for line in lines) == 1
