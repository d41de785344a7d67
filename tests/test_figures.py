"""Parameters and multiply-adds: counted again, and equal to the papers' to the last digit."""

import importlib.util
from pathlib import Path

import pytest

import regard
from regard.models.zoo import figures

ROOT = Path(__file__).parent.parent

# (parameters, 10^9 multiply-adds) where both are given exactly
EXACT = {
    "attention56": (31_810_728, "6.271"),
    "attention92": (52_466_344, "10.534"),
    "attentionnext56": (31_318_824, "6.419"),
}
# the authors' code has the stride on the 3x3 convolution, the paper counts it on the 1x1
STRIDE_ON_3X3 = {
    "cbam_resnet50": "4.096",
    "cbam_resnet101": "7.813",
    "cbam_resnext50_32x4d": "4.237",
    "cbam_resnext101_32x4d": "7.981",
}
SONONET = {8: "0.163", 16: "0.648", 32: "2.584", 64: "10.321"}
AG_SONONET = {
    8: ("0.177", "0.310"), 16: ("0.701", "1.233"), 32: ("2.788", "4.913"), 64: ("11.122", "19.617"),
}  # fmt: skip
CIFAR = {"attention92_cifar": "1.89", "attention236_cifar": "4.87"}

BY_NAME = {row.name: row for row in figures()}


def millions(name: str, digits: int) -> str:
    return f"{BY_NAME[name].parameters / 1e6:.{digits}f}"


def gmacs(name: str) -> str:
    return f"{BY_NAME[name].macs / 1e9:.3f}"


def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_what_is_counted_and_the_readme_shows_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_tables.py", "--check"])
    assert tables().main() == 0, capsys.readouterr().out
    assert list(BY_NAME) == [r.name for r in figures("*")]
    assert set(BY_NAME) == set(regard.list_models())


def test_residual_attention_counts():
    for name, (parameters, macs) in EXACT.items():
        assert BY_NAME[name].parameters == parameters
        assert gmacs(name) == macs
    for name, expected in CIFAR.items():
        assert millions(name, 2) == expected


@pytest.mark.parametrize("row", figures("*res*"), ids=lambda row: row.name)
def test_resnet_counts_are_the_papers(row):
    assert millions(row.name, 2) == row.paper_parameters
    if row.note:
        assert row.name not in STRIDE_ON_3X3 or gmacs(row.name) == STRIDE_ON_3X3[row.name]
    else:
        assert gmacs(row.name) == row.paper_gmacs


def test_sononet_counts():
    for f, expected in SONONET.items():
        assert millions(f"sononet{f}", 3) == expected
    for f, expected in AG_SONONET.items():
        assert (millions(f"ag_sononet{f}", 3), gmacs(f"ag_sononet{f}")) == expected


def test_patterns():
    assert [r.name for r in figures("cbam_resnet1*")] == ["cbam_resnet18", "cbam_resnet101"]
    assert len(figures("sononet")) == 8
    with pytest.raises(ValueError, match=r"no network matches 'vgg'.*all 36"):
        figures("vgg")
