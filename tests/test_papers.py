"""The papers' tables as data: complete, made of networks that exist, and refused when wrong."""

import pytest
import timm

from regard.errors import UsageError
from regard.models.arguments import arguments
from regard.papers import PAPERS, load_table, parse_table, tables, train_command
from regard.training.recipe_files import load_recipe

ROW = '[[rows]]\nname = "a"\nnetwork = "cbam_resnet18"\n'


def test_every_table_is_there_with_its_rows():
    counts = {key: len(load_table(key).rows) for key in tables()}
    assert counts == {
        "ag-classes": 2, "ag-main": 6, "cbam-1": 4, "cbam-2": 4, "cbam-3": 4, "cbam-4": 24,
        "cbam-5": 6, "ran-1": 3, "ran-2": 2, "ran-3": 8, "ran-4": 2, "ran-5": 8, "ran-6": 6,
        "ran-7": 6,
    }  # fmt: skip
    assert all(load_table(key).paper in PAPERS for key in tables())


def test_some_numbers_of_the_papers():
    by_name = {row.name: row for row in load_table("cbam-4").rows}
    assert by_name["ResNet-50 + CBAM"].paper["top1_error"] == 22.66
    assert by_name["ResNet-50 + CBAM"].paper["gmacs"] == 3.864
    errors = [row.paper["top1_error"] for row in load_table("ran-3").rows]
    assert errors == [5.52, 5.89, 4.99, 5.35, 4.44, 5.57, 4.31, 7.18]


def test_a_rows_command_has_its_arguments_and_changes():
    table = load_table("ran-5")
    assert train_command(table, table.rows[0]) == [
        "train", "cifar10", "--recipe", "attention-cifar", "--model", "preact_resnet164_cifar",
        "--label-noise", "0.1",
    ]  # fmt: skip
    table = load_table("cbam-2")
    words = train_command(table, table.rows[0], "photos")
    assert words[1] == "photos"
    assert words[words.index("--arg") :] == ["--arg", "spatial_pool=conv", "--arg", "kernel_size=3"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rows = 3", "rows"),
        ('title = "x"', "rows"),
        ("[[rows]]\nname = 'a'", "network"),
        (f"{ROW}{ROW}", "'a'"),
        (f"{ROW}argument = 3", "arguments"),
        (f"{ROW}evaluation = 320", "evaluation"),
        (f"{ROW}evaluation = {{ crop = 320 }}", "evaluation"),
        (f"{ROW}evaluation = {{ size = [1, 2, 3] }}", "evaluation"),
        (f"{ROW}evaluation = {{ size = true }}", "evaluation"),
        (f"{ROW}evaluation = {{ ten_crop = 10 }}", "evaluation"),
        (f"{ROW}arguments = [1]", r"row 1: arguments = \[1\]; give a table"),
        (f"{ROW}changes = 5", "row 1: changes = 5; give a table"),
        (f"{ROW}recipe = 5", "row 1: recipe = 5; give a string"),
        (f"{ROW}data = 1979-05-27", "row 1: data = .*; give a string"),
        (f"{ROW}paper = {{ top1_error = true }}", "row 1: paper = .*; give a table of numbers"),
        (f"{ROW}paper = 'CBAM'", "row 1: paper = 'CBAM'; give a table of numbers"),
        (f"recipe = 5\n{ROW}", "table x: recipe = 5; give a string"),
        (f"metrics = 'top1'\n{ROW}", "table x: metrics = 'top1'; give a list of strings"),
        (f"tilte = 'x'\n{ROW}", "title"),
        ("[[rows", "TOML|table x"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(text, word):
    with pytest.raises(UsageError, match=word):
        parse_table(text, "x")


def test_a_number_with_underscores_is_a_flag():
    table = parse_table(f"{ROW}changes = {{ lr = 0.000_5 }}", "x")
    words = train_command(table, table.rows[0], "photos")
    assert words[-2:] == ["--lr", "0.0005"]


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(UsageError, match="cbam-4"):
        load_table("cbm-4")


def test_every_row_is_a_recipe_and_a_network_that_can_be_made():
    """As benchmarks/paper_rows.py starts them, with one step."""
    for key in tables():
        table = load_table(key)
        for row in table.rows:
            recipe = load_recipe(row.recipe or table.recipe)
            short = recipe.changed(**row.changes, steps=1, schedule="constant", size=64)
            assert (short.steps, short.epochs, short.milestones) == (1, None, ())
            assert short.label_noise == row.changes.get("label_noise", 0)
            assert timm.is_model(row.network)
            assert set(row.arguments) <= {a.name for a in arguments(row.network)}
