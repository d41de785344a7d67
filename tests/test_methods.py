"""The methods paragraph and the checklists: published items, answered from the run alone."""

import csv
import math
import re
import shutil
from collections import Counter

import pytest

from regard.evaluation import Predictions, diagnose
from regard.report.checklists import CHECKLISTS
from regard.report.figures import measure
from regard.report.methods import MUST, as_markdown, methods_of
from regard.report.source import RunSource
from regard.report.words import diagnostic_rows
from regard.runs import write_predictions


@pytest.fixture(scope="module")
def methods(whole):
    source = RunSource(whole)
    return methods_of(source, measure(source, "1", 0), source.command)


def test_the_checklists_have_the_published_numbers():
    numbers = {name: [n for n, *_ in items] for name, items in CHECKLISTS.items()}
    assert numbers["CLAIM 2024"] == [str(n) for n in range(1, 45)]
    for name, last, letters in (
        ("STARD-AI", 40, {"15": "abcd", "16": "abc", "17": "ab", "26": "ab", "40": "ab"}),
        ("TRIPOD+AI", 27, {"3": "abc", "5": "ab", "6": "abc", "8": "abc", "9": "abc",
                           "12": "abcdefg", "18": "abcdef", "20": "abc", "23": "ab", "27": "abc"}),
    ):  # fmt: skip
        expected = [f"{n}{x}" for n in range(1, last + 1) for x in letters.get(str(n), [""])]
        assert numbers[name] == expected


def test_the_paragraph_says_what_the_runs_files_say(methods, whole, scans):
    with (whole / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter(row["split"] for row in rows)
    assert f"{len(rows)} images of 3 classes from {scans}" in methods.text
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        assert f"{name} {counts[split]} images" in methods.text
    assert "drawn at random (seed 0), stratified by class" in methods.text
    assert "disjoint by image only" in methods.text
    assert re.search(r"content hash [0-9a-f]{16};", methods.text)
    assert "ag_sononet8" in methods.text
    assert "regard train" in methods.text
    assert "Wilson" in methods.text


def test_items_are_answered_or_the_author_must(methods):
    for name, (origin, items) in methods.checklists.items():
        assert "doi 10." in origin
        answered = [n for n, _, answer in items if answer]
        assert 8 <= len(answered) < len(items) * 0.6, name
        by_number = {n: answer for n, _, answer in items}
        ethics = {"STARD-AI": "6", "TRIPOD+AI": "17", "CLAIM 2024": "14"}[name]
        assert by_number[ethics] is None
    stard = {n: answer for n, _, answer in methods.checklists["STARD-AI"][1]}
    assert stard["30"].startswith("1: ")
    claim = {n: answer for n, _, answer in methods.checklists["CLAIM 2024"][1]}
    assert "with attention" in claim["1"]
    assert sum(map(int, re.findall(r"(\d+) (?:true|false)", stard["30"]))) == 24


def test_one_image_has_no_intervals_and_no_nan(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    said = RunSource(whole).predictions
    one = Predictions(said.probabilities[:1], said.labels[:1], said.classes, None, said.paths[:1])
    write_predictions(run / "predictions.npz", "test", one)
    source = RunSource(run)
    other = next(name for k, name in enumerate(said.classes) if k != said.labels[0])
    found = methods_of(source, measure(source, other, 0), source.command)
    assert not re.search(r"\bnan\b", f"{found.text}{as_markdown(found)}")
    assert "One image gives no intervals" in found.text
    assert "sensitivity not defined" in found.text


def test_markdown_has_a_row_for_each_item(methods):
    files = as_markdown(methods)
    rows = [line for line in files["checklists.md"].splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == sum(map(len, CHECKLISTS.values()))
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)
    missing = sum(
        answer is None for _, items in methods.checklists.values() for *_, answer in items
    )
    assert files["checklists.md"].count(f"**{MUST}**") == missing
    assert files["methods.md"].startswith("<!-- Regard ")
    assert "**Data.**" in files["methods.md"]


def test_an_infinite_threshold_is_met_by_no_probability():
    predictions = Predictions([[0.4, 0.6], [0.7, 0.3]] * 5, [1, 0] * 5, ["a", "b"])
    found = diagnose(predictions, positive="b", threshold=math.inf, resamples=2)
    title = diagnostic_rows(found)[0][0]
    assert "no probability" in title
    assert "top-1" not in title
    assert not re.search(r"\binf\b", title)
