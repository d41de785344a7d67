"""Every network and ablation answers what it answered before, and each answers its own."""

import importlib.util
import itertools

import numpy as np
import pytest

import regard
from tests import golden

GOLDEN = golden.golden_variants()
VARIANTS = golden.variants()
ROOT = golden.FOLDER.parent.parent


def make_golden():
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts/make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_network_and_ablation_is_kept():
    assert list(GOLDEN) == list(VARIANTS)
    assert set(regard.list_models()) <= set(GOLDEN)


# hundreds of layers, of the same modules as the others; the authors' attention92 is in
# test_parity.py
DEEPEST = {
    "attention92", "attention164_cifar", "attention236_cifar", "attention452_cifar",
    "attentionnext92", "cbam_resnet101", "cbam_resnext101_32x4d", "plain_attention92",
    "plain_attention164_cifar", "plain_attention236_cifar", "plain_attention452_cifar",
    "plain_attentionnext92", "plain_resnet101", "plain_resnext101_32x4d", "se_resnet101",
    "se_resnext101_32x4d",
}  # fmt: skip


@pytest.mark.parametrize(
    "label", [pytest.param(x, marks=pytest.mark.slow) if x in DEEPEST else x for x in VARIANTS]
)
def test_the_outputs_are_what_they_were(label):
    ours = golden.variant_outputs(*VARIANTS[label])
    assert np.isfinite(ours).all()
    assert golden.relative_error(ours, GOLDEN[label]) < 1e-7


@pytest.mark.parametrize("label", ["attention56_cifar", "cbam_resnet18", "ag_sononet8"])
def test_the_default_written_out_is_the_default(label):
    defaults = {
        "attention56_cifar": {
            "attention": "residual", "mask_activation": "mixed", "mask": "encoder_decoder",
            "p": 1, "t": 2, "r": 1, "unit": "preact", "in_chans": 3,
        },
        "cbam_resnet18": {
            "channel_pool": "both", "spatial_pool": "avg_max", "kernel_size": 7,
            "order": "channel_spatial", "reduction": 16, "stem": "imagenet", "in_chans": 3,
        },
        "ag_sononet8": {
            "aggregation": "mean", "normalize": "mean_flow", "in_chans": 1,
        },
    }  # fmt: skip
    ours = golden.variant_outputs(label, defaults[label])
    assert golden.relative_error(ours, GOLDEN[label]) < 1e-7


def test_no_two_variants_answer_alike():
    for (a, rows), (b, others) in itertools.combinations(GOLDEN.items(), 2):
        assert golden.relative_error(rows, others) > 1e-3, f"{a} and {b}"


def test_the_arguments_are_read_by_the_twin_of_squeeze_and_excitation():
    arguments = {"order": "channel", "channel_pool": "avg"}
    ours = golden.variant_outputs("cbam_resnet18", arguments)
    assert golden.relative_error(ours, GOLDEN["se_resnet18"]) < 1e-7


def test_the_script_tells_what_changed_and_writes_whole_files(tmp_path, monkeypatch, capsys):
    script = make_golden()
    path = tmp_path / "variants.json"
    path.write_text(golden.VARIANTS.read_text("utf-8"), "utf-8")
    few = {label: VARIANTS[label] for label in ("ag_sononet8", "sononet8")}
    monkeypatch.setattr(golden, "VARIANTS", path)
    monkeypatch.setattr(golden, "variants", lambda: few)
    monkeypatch.setattr("sys.argv", ["make_golden.py", "--check"])
    before = path.read_bytes()
    assert script.main() == 1  # all but the two are gone
    assert "attention56: gone" in capsys.readouterr().out
    assert path.read_bytes() == before

    monkeypatch.setattr("sys.argv", ["make_golden.py"])
    assert script.main() == 0
    kept = golden.golden_variants()
    assert list(kept) == list(few)
    assert all(np.array_equal(kept[label], GOLDEN[label]) for label in few)

    moved = path.read_text("utf-8").replace(f"{GOLDEN['sononet8'][0, 0]}", "-0.2701875")
    assert moved != path.read_text("utf-8")
    path.write_text(moved, "utf-8")
    monkeypatch.setattr("sys.argv", ["make_golden.py", "--check"])
    capsys.readouterr()
    assert script.main() == 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert told[0].startswith("sononet8: changed by 3.")
    assert [p.name for p in tmp_path.iterdir()] == ["variants.json"]
