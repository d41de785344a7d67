"""`regard train --graft`: attention inserted into plain networks, which are saved and load."""

import json

import pytest
import timm
import torch

import regard
from regard.attention import attention_kinds
from regard.cli import run_command
from regard.models.create import make_model
from regard.models.io import save_model
from regard.studies import runner

X = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def made(name="resnet10t", weights=None, graft="none", channels=1):
    torch.manual_seed(3)
    weights = None if weights is None else str(weights)
    return make_model(name, {}, 10, (channels, 32, 32), False, weights, graft=graft)


@pytest.mark.slow
@pytest.mark.report  # without which a run of a study is not finished
def test_the_shipped_study_trains_saves_and_compares(tmp_path, monkeypatch, capsys):
    def in_process(runs, after_each, **_):
        for run in runs:
            assert run_command(list(run.command)) == 0
        progress = runner.Progress(len(runs), done=len(runs))
        after_each(progress)
        return progress

    monkeypatch.setattr(runner, "run_all", in_process)
    call = ["study", "insert", "digits", "--model", "resnet10t", "--seeds", "1", "--size", "32"]
    call += ["--epochs", "0.2", "--faithfulness-images", "0", "--out", str(tmp_path)]
    assert run_command(call) == 0
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [len(row["seeds"]) for row in rows] == [1, 1, 1]
    assert "accuracy" in rows[2]["differences"]
    plain, se, cbam = (
        regard.load(tmp_path / "runs" / row / "seed-0")
        for row in ("resnet10t", "resnet10t-se", "resnet10t-cbam")
    )
    assert set(attention_kinds(se.model).values()) == {"channel"}
    assert set(attention_kinds(cbam.model).values()) == {"channel", "spatial"}
    gates = [name for name in cbam.model.state_dict() if ".se." in name]
    assert set(plain.model.state_dict()) == set(cbam.model.state_dict()) - set(gates)
    folder = tmp_path / "runs" / "resnet10t-cbam" / "seed-0"
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(X), cbam.model(X))  # which is in channels_last
    assert "resnet10t + CBAM" in (folder / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "convnext_atto"])
def test_inserted_attention_starts_neutral_and_draws_nothing_of_the_training(name, tmp_path):
    plain, then = made(name).eval(), torch.rand(1)
    for kind in ("se", "cbam"):
        grafted = made(name, graft=kind).eval()
        assert torch.equal(torch.rand(1), then)
        assert torch.equal(grafted(X), plain(X))
        assert attention_kinds(grafted)
    save_model(grafted, tmp_path / "grafted")  # of one channel: loaded with one again
    loaded = timm.create_model(f"local-dir:{tmp_path}/grafted", pretrained=True).eval()
    assert torch.equal(loaded(X), plain(X))


@torch.no_grad()
def test_it_goes_onto_the_weights_that_training_starts_from(tmp_path):
    plain = made().eval()
    for norm in (m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.weight.add_(0.1)  # the last one of each branch starts at 0
    save_model(plain, tmp_path / "plain", class_names=[str(i) for i in range(10)])
    grafted = made(weights=tmp_path / "plain", graft="cbam").eval()
    assert torch.equal(grafted(X), plain(X))
    # weights of a network that has the attention already, to train it further
    for name, p in grafted.named_parameters():
        if ".se.channel." in name:
            p.add_(0.1)
    save_model(grafted, tmp_path / "gated", class_names=[str(i) for i in range(10)])
    again = made(weights=tmp_path / "gated", graft="cbam").eval()
    assert torch.equal(again(X), grafted(X))
    assert not torch.equal(again(X), plain(X))


@pytest.mark.parametrize(
    ("model", "word"), [("cbam_resnet18", "attention already"), ("vit_tiny_patch16_224", "map")]
)
def test_where_it_can_not_be_inserted_nothing_is_written(tmp_path, scans, capsys, model, word):
    call = ["train", str(scans), "--model", model, "--graft", "se", "--out", str(tmp_path / "o")]
    assert run_command([*call, "--size", "32"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert word in lines[-1]
    assert not (tmp_path / "o").exists()
