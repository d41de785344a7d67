"""Parameters and multiply-adds: counted again, and equal to the papers' to the last digit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import regard
from regard import papers
from regard.cli import run_command
from regard.models.arguments import arguments
from regard.models.residual_attention import PreActUnit
from regard.models.zoo import figures
from regard.papers import load_table

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
    "plain_resnet50": "4.089",
    "plain_resnet101": "7.801",
}
SONONET = {8: "0.163", 16: "0.648", 32: "2.584", 64: "10.321"}
AG_SONONET = {
    8: ("0.177", "0.310"), 16: ("0.701", "1.233"), 32: ("2.788", "4.913"), 64: ("11.122", "19.617"),
}  # fmt: skip
# Attention-n for CIFAR: millions of parameters with a head of 100 and of 10 classes, and the
# paper's, where it prints one
CIFAR = {
    56: ("1.057", "1.034", ""),
    92: ("1.871", "1.848", "1.9"),
    128: ("2.685", "2.662", ""),
    164: ("3.500", "3.477", ""),
    236: ("5.128", "5.105", "5.1"),
    452: ("7.999", "7.976", "8.6"),
}

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


@pytest.mark.slow
def test_the_figures_are_what_is_counted_and_the_readme_shows_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_tables.py", "--check"])
    assert tables().main() == 0, capsys.readouterr().out
    assert list(BY_NAME) == [r.name for r in figures("*")]
    assert set(BY_NAME) == set(regard.list_models())


def test_residual_attention_counts():
    for name, (parameters, macs) in EXACT.items():
        assert BY_NAME[name].parameters == parameters
        assert gmacs(name) == macs


def test_mobilenet_counts_are_the_papers():
    rows = load_table("cbam-5").rows
    assert len(rows) == 6
    for row in rows:
        assert gmacs(row.network) == f"{row.paper['gmacs']:.3f}"
        if row.network != "se_mobilenet_070":  # 2.7047 M where 2.71 is printed
            assert millions(row.network, 2) == f"{row.paper['parameters']:.2f}"
    assert BY_NAME["se_mobilenet_070"].parameters == 2_704_661


def test_a_mobilenet_has_a_gate_after_every_convolutions_relu():
    with torch.device("meta"):
        model = regard.create_model("cbam_mobilenet_100")
    order = [type(m).__name__ for m in model.modules()]
    convs = [i for i, name in enumerate(order) if name == "GatedConv"]
    assert len(convs) == 27
    for i in convs:
        assert order[i + 1 : i + 5] == ["Conv2d", "BatchNorm2d", "ReLU", "CBAM"]


@pytest.mark.parametrize("depth", CIFAR)
def test_cifar_residual_attention_counts(depth):
    hundred, ten, paper = CIFAR[depth]
    name = f"attention{depth}_cifar"
    assert (millions(name, 3), BY_NAME[name].paper_parameters) == (ten, paper)
    with torch.device("meta"):
        model = regard.create_model(name, num_classes=100)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == hundred
    # the longest chain of convolutions, one linear layer at its end: the depth in the name
    units = sum(isinstance(m, PreActUnit) and ".mask." not in n for n, m in model.named_modules())
    assert 1 + 3 * units + 1 == depth
    assert [len(model.get_submodule(f"layer{s}.1.mask.down")) for s in (1, 2, 3)] == [2, 1, 0]
    assert [type(m).__name__ for m in model.layer3[1].mask.bottom] == ["PreActUnit"] * 3


@pytest.mark.parametrize("row", figures("*_res*") + figures("wide_*"), ids=lambda row: row.name)
def test_resnet_counts_are_the_papers(row):
    if row.name == "preact_resnet164_cifar":
        assert millions(row.name, 1) == "1.7"  # He et al., arXiv 1603.05027, table 4
        return
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
    with pytest.raises(ValueError, match=rf"no network matches 'vgg'.*all {len(BY_NAME)}"):
        figures("vgg")


def test_the_papers_figures_are_those_of_the_tables_as_printed():
    printed = {
        "attention92": ("51.3", "10.4", "top-1 / top-5 error 19.5 / 4.8 % at 320x320"),
        "attention452_cifar": ("8.6", "", "CIFAR-10 / 100 error 3.90 / 20.45 %"),
        "attention56_cifar": ("", "", "CIFAR-10 error 5.52 %"),
        "se_resnet50": ("28.09", "3.860", "top-1 / top-5 error 23.14 / 6.70 %"),
        "ag_sononet32": ("", "", "accuracy / F1 0.980 / 0.933"),
        "ag_sononet64": ("", "", ""),
        "attentionnext56": ("31.9", "6.3", "top-1 / top-5 error 21.2 / 5.6 %"),
    }
    for name, expected in printed.items():
        row = BY_NAME[name]
        assert (row.paper_parameters, row.paper_gmacs, row.paper_result) == expected
    noisy = BY_NAME["preact_resnet164_cifar"].paper_result
    assert noisy.endswith("10 / 30 / 50 / 70 % label noise 5.93 / 6.61 / 8.35 / 17.21 %")


def test_a_number_that_two_tables_print_is_the_same_in_both():
    seen = {}
    for key in papers.tables():
        table = papers.load_table(key)
        for row in table.rows:
            told = (row.network, str(row.arguments), str(row.changes), row.data or table.data)
            for metric, value in row.paper.items():
                assert seen.setdefault((*told, metric), str(value)) == str(value), (key, row.name)


KINDS = [
    "attention56",
    "attentionnext56",
    "attention56_cifar",
    "attention92_cifar",
    "plain_attention56_cifar",
    "preact_resnet164_cifar",
    "cbam_resnet18",
    "se_resnet18",
    "plain_resnet18",
    "wide_resnet18_2",
    "ag_sononet8",
    "ag_sononet16",
    "sononet8",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_argument_that_is_listed_is_the_networks(name):
    """Its default changes no tensor, each of its choices is taken, and others are refused."""

    def tensors(**given):
        with torch.device("meta"):
            return {k: v.shape for k, v in regard.create_model(name, **given).state_dict().items()}

    own, found = tensors(), arguments(name)
    assert found
    assert tensors(**{a.name: a.default for a in found}) == own
    for argument in found:
        if isinstance(argument.choices, str):
            continue
        assert str(argument.default) in argument.choices
        if isinstance(argument.default, str):
            with pytest.raises(ValueError, match=f"{argument.name}='x'"):
                tensors(**{argument.name: "x"})
            if name in ("cbam_resnet18", "attention56_cifar", "ag_sononet8"):
                for choice in argument.choices:
                    tensors(**{argument.name: choice})


def test_every_argument_of_the_papers_tables_is_listed_with_its_table(capsys):
    for key in papers.tables():
        for row in papers.load_table(key).rows:
            if row.arguments:
                assert set(row.arguments) <= {a.name for a in arguments(row.network)}
    assert run_command(["models", "cbam_resnet18", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    by_name = {a["name"]: a for a in content["arguments"]}
    assert content["parameters"] == BY_NAME["cbam_resnet18"].parameters
    assert by_name["kernel_size"]["default"] == 7
    assert by_name["kernel_size"]["tables"] == ["cbam-2"]
    assert by_name["order"]["choices"][0] == by_name["order"]["default"]
    assert by_name["reduction"]["tables"] == []
    assert run_command(["models", "attention56_cifar"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "mask_activation" in x]
    for word in ("mixed", "channel", "spatial", "ran-1"):
        assert word in line
    assert run_command(["models", "cbam_resnet"]) == 0  # a pattern is a list, as ever
    assert "--arg" not in capsys.readouterr().out
