"""Calibration, threshold and subgroups in the report: the numbers of the evaluation, by place."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import regard
from regard.cli import run_command
from regard.evaluation import Predictions, diagnose, diagnose_class, evaluate, with_temperature
from regard.explanations.inputs import is_ours
from regard.explanations.print_style import for_print
from regard.report import Report, write_report
from regard.report.figures import charts, measure
from regard.report.methods import as_text, methods_of
from regard.report.page import _code
from regard.report.reliability import calibration_chart
from regard.report.sections import calibration_section, subgroup_section
from regard.report.source import RunSource
from regard.report.subgroups import file_of
from regard.report.words import number_range, percent, percent_range
from regard.runs import RunFolder, write_predictions


@pytest.fixture(scope="module")
def source(whole, tmp_path_factory) -> RunSource:
    """A calibrated run, whose 24 test images have sites and ages."""
    run = Path(shutil.copytree(whole, tmp_path_factory.mktemp("sections") / "run"))
    split, said = RunFolder(run).read_predictions()
    columns = {
        "site": np.array(["Bern, Insel", "Zürich"])[(np.arange(24) % 5 > 2).astype(int)],
        "age": np.arange(24), "note": np.array([f"note {i} " * 50 for i in range(24)]),
    }  # fmt: skip
    columns["site"][:2] = "<b>Genf"
    write_predictions(run / "predictions.npz", split, replace(said, columns=columns))
    regard.calibrate(run, positive="1", rule="sensitivity=0.95")
    return RunSource(run)


@pytest.fixture(scope="module")
def measured(source):
    return measure(source, None, 0, {"age": [12]})


def rows_of(table) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


def test_images_are_found_by_their_names_in_the_data_where_one_could_not_be_read(
    whole, scans, tmp_path
):
    """Of DATA "scans" the stored paths are relative, wherever the report is made."""
    run = shutil.copytree(whole, tmp_path / "run")
    split, said = RunFolder(whole).read_predictions()
    paths = [str(Path(path).relative_to(scans.parent)) for path in said.paths]
    some = replace(said, paths=paths).select(np.arange(1, len(said)))
    write_predictions(run / "predictions.npz", split, some)
    found = RunSource(run)
    assert [found.name(i) for i in range(3)] == [p.removeprefix("scans/") for p in paths[1:4]]
    assert found.pixels(0).shape == (24, 24, 1)


def test_a_run_stores_the_columns_that_make_subgroups(source):
    assert source.predictions.columns.keys() == {"site", "age"}
    assert source.predictions.columns["age"].tolist()[:2] == ["0", "1"]


def test_calibration_is_shown_before_and_after_the_temperature(source, measured):
    table, threshold = calibration_section(source, measured).tables
    rows = rows_of(table)
    t = source.calibration.temperature
    before = evaluate(source.predictions, seed=0).metrics["ece"]
    after = evaluate(with_temperature(source.predictions, t), seed=0).metrics["ece"]
    assert rows["calibration error (ECE)"] == [
        f"{before.value:.3f}", number_range(before), f"{after.value:.3f}", number_range(after),
    ]  # fmt: skip
    assert {"Brier score", "1: Brier score", "1: calibration slope (ideal 1)"} <= rows.keys()
    brier = diagnose(source.predictions, resamples=2).metrics["brier"]
    assert rows["Brier score"][0] == f"{brier.value:.3f}"
    one = diagnose_class(
        source.calibrated, "1", threshold=source.calibration.threshold.value, seed=0
    )
    stored, found = source.calibration.threshold, one.metrics["specificity"]
    assert rows_of(threshold)["specificity"][:3] == [
        percent(stored.specificity), percent(found.value), percent_range(found),
    ]  # fmt: skip
    assert rows_of(threshold)["true positives"][1] == str(one.counts["tp"])
    assert "sensitivity=0.95" in threshold.caption


def test_each_column_has_a_file_of_its_own():
    columns = ["site", "a b", "a-b", "a/b", "größe", "/", "\\", "x" * 300, "x" * 301]
    files = [file_of(c) for c in columns]
    assert len(set(files)) == len(files)
    assert max(map(len, files)) < 110
    assert all(Path(f).name == f for f in files)
    assert [files[0], files[2], files[4]] == ["subgroups-site", "subgroups-a-b", "subgroups-größe"]


def test_without_a_calibration_the_page_says_how_to_get_one(source, measured):
    plain = replace(measured, calibrated=measured.plain)
    run = RunSource(source.run.path)
    run.calibration = None
    section = calibration_section(run, plain)
    assert len(section.tables) == 1
    assert section.tables[0].headings[1:] == ["test images", "95 % interval"]
    assert "regard calibrate" in section.sentences[0]


def test_a_threshold_of_another_class_is_said_not_applied(source):
    section = calibration_section(source, measure(source, "2", 0))
    assert len(section.tables) == 1
    assert any("threshold is one of 1" in s for s in section.sentences)


def test_subgroups_have_rows_with_counts_intervals_and_the_largest_gap(source, measured):
    section = subgroup_section(measured.subgroups, "1")
    site, age = section.tables
    assert [row[0] for row in age.rows] == ["<12", ">=12"]
    rows = rows_of(site)
    part = measured.subgroups[0].parts["Bern, Insel"]
    accuracy = part.metrics["top1"]
    assert rows["Bern, Insel"][:3] == [
        str(part.n), percent(accuracy.value), percent_range(accuracy)
    ]  # fmt: skip
    assert rows["<b>Genf"][:2] == ["2", "too small"]
    high, low, gap = measured.subgroups[1].gap("top1")
    if gap:
        assert any(f"{100 * gap:.1f} points, {high} over {low}" in n for n in age.notes)
    assert subgroup_section([], None) is None


def test_parts_that_are_all_too_small_are_counted(measured):
    found = measured.subgroups[0]
    small = {name: replace(part, evaluation=None, metrics={}) for name, part in found.parts.items()}
    (table,) = subgroup_section([replace(found, parts=small)], "1").tables
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert {row[-1] for row in table.rows} == {"too small"}


def test_the_page_has_both_sections_with_their_figures(source, measured, tmp_path):
    drawn = charts(source, measured)
    names = [chart.name for chart in drawn]
    assert {"calibration", "decision-curve", "subgroups-site", "subgroups-age"} <= set(names)
    site = next(c for c in drawn if c.name == "subgroups-site").figure
    with for_print():
        site.draw_without_rendering()
    (point,) = [line for line in site.axes[0].get_lines() if line.get_marker() == "o"][:1]
    shown = next(p for p in measured.subgroups[0].parts.values() if not p.too_small)
    assert point.get_xdata()[0] == shown.metrics["sensitivity"].value
    write_report(
        Report(
            title="t", model="m", summary={}, evaluation=source.evaluation, charts=drawn,
            calibration=calibration_section(source, measured),
            subgroups=subgroup_section(measured.subgroups, "1"),
        ),
        tmp_path / "page.html",
    )  # fmt: skip
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    calibration = page[page.index('id="calibration"') : page.index('id="subgroups"')]
    assert 'download="reliability.svg"' in calibration
    subgroups = page[page.index('id="subgroups"') : page.index('id="confusion"')]
    assert 'download="subgroups-site.svg"' in subgroups
    assert "&lt;b&gt;Genf" in subgroups
    assert page.count('download="') == len(drawn)


def test_the_methods_are_one_text_file_that_regard_knows_again(source, measured, tmp_path):
    found = methods_of(source, measured, source.command)
    for name in ("m.md", "m.txt"):
        text = as_text(found, name.endswith("md"))
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert is_ours(tmp_path / name)
        assert all(item in text for item in ("STARD-AI", "TRIPOD+AI", "CLAIM 2024", "40b"))
        assert "Accuracy by site: " in text
        assert text.count("<!--") == name.endswith("md")
    tripod = {n: answer for n, _, answer in found.checklists["TRIPOD+AI"][1]}
    assert "Bern, Insel" in tripod["23b"]
    assert "Temperature scaling" in tripod["24"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "m.pdf"], ".md or .txt"), (["--methods", "no/m.md"], "does not exist"),
        (["--bands", "age=9,1"], "increasing"), (["--bands", "size=1"], "no such column"),
        (["--overwrite"], "only with --methods"), (["--methods", "mine.txt"], "not written by"),
    ],
)  # fmt: skip
def test_wrong_calls_of_report_are_one_line(source, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("my own\n", encoding="utf-8")
    assert run_command(["report", str(source.run.path), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert Path("mine.txt").read_text(encoding="utf-8") == "my own\n"


def test_commands_in_a_sentence_are_code_and_nothing_else_is():
    assert _code("`regard calibrate <b>` fits") == ("<code>regard calibrate &lt;b&gt;</code> fits")
    assert _code("a ` alone, 5 < 6") == "a ` alone, 5 &lt; 6"


def test_a_slope_that_is_not_defined_is_no_number():
    """Of classes that are told apart without an error there is no calibration slope."""
    score = np.array([0.1, 0.2, 0.3, 0.8, 0.9])
    said = Predictions(np.stack([1 - score, score], 1), [0, 0, 0, 1, 1], ["well", "ill"])
    chart = calibration_chart(said, said, "ill", 3.4)
    texts = [text.get_text() for legend in chart.figure.legends for text in legend.get_texts()]
    assert len(texts) == 1
    assert "nan" not in texts[0]
    assert "intercept" in texts[0]
