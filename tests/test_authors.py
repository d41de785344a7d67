"""Reading the authors' checkpoints: layouts, files, and what does not fit."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import regard
from regard.models.original_weights import arguments_of, authors_names
from tests.golden import authors_networks, fill

NETWORKS = authors_networks()
SMALL = {n: fill(n, s) for n, s in NETWORKS["ag_sononet8_concat"]["tensors"]}


def model_and_input():
    model = regard.create_model("ag_sononet8", aggregation="concat").eval()
    return model, torch.from_numpy(fill("input", (1, 1, 64, 64)))


@torch.no_grad()
def answer(source):
    model, x = model_and_input()
    regard.load_authors_weights(model, source)
    return model(x)


def test_every_layout_of_a_file_gives_the_same_network(tmp_path):
    tensors = {n: torch.from_numpy(a) for n, a in SMALL.items()}
    counts = {"conv1.conv1.1.num_batches_tracked": torch.tensor(7)}
    torch.save(tensors | counts, tmp_path / "plain.pth")
    wrapped = {"state_dict": {f"module.{n}": t for n, t in tensors.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    np.savez(tmp_path / "weights.npz", **SMALL)
    wanted = answer(SMALL)
    assert wanted.std() > 0.01
    for source in (tensors, *tmp_path.iterdir(), str(tmp_path / "weights.npz")):
        assert torch.equal(answer(source), wanted), source


def test_caffe_keeps_vectors_with_leading_ones():
    tensors = {n: fill(n, s) for n, s in NETWORKS["attention56"]["tensors"]}
    odd = {n: a[None, :, None, None] if a.ndim == 1 else a for n, a in tensors.items()}
    odd["classifier/weight"] = odd["classifier/weight"][None, None]
    a, b = (regard.create_model("attention56") for _ in range(2))
    regard.load_authors_weights(a, tensors)
    regard.load_authors_weights(b, odd)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_everything_that_does_not_fit_is_named_and_nothing_is_loaded():
    wrong = dict(SMALL)
    del wrong["classifier.bias"], wrong["conv2.conv1.0.weight"]
    wrong["surprise"] = np.zeros(3, np.float32)
    wrong["classifier.weight"] = np.zeros((9, 160), np.float32)
    model, _ = model_and_input()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(regard.CheckpointError) as caught:
        regard.load_authors_weights(model, wrong)
    message = str(caught.value)
    for part in ("missing: classifier.bias, conv2.conv1.0.weight", "extra: surprise", "(9, 160)"):
        assert part in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("run by unpickling",))


def test_files_that_are_no_checkpoint(tmp_path, capsys):
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name in ("evil.pth", "noise.pth", "epoch.pth", "empty.pth", "absent.pth"):
        with pytest.raises(regard.CheckpointError, match=name):
            answer(tmp_path / name)
    assert "run by unpickling" not in capsys.readouterr().out


def test_no_layout_for_networks_that_the_authors_did_not_publish():
    with pytest.raises(regard.CheckpointError, match="CIFAR"):
        regard.load_authors_weights(regard.create_model("attention56_cifar"), SMALL)
    with pytest.raises(regard.CheckpointError, match="VGG"):
        regard.load_authors_weights(regard.create_model("vgg11", num_classes=2), SMALL)


def test_names_of_networks_beyond_the_golden_ones():
    with torch.device("meta"):
        names = authors_names(regard.create_model("attentionnext92"))
    # read in AttentionNeXt-92-deploy.prototxt
    assert names["layer3.3.mask.tail.0.weight"] == ("AttentionC_3/mask/linear_1/weight")
    assert names["layer2.2.mask.skip.0.bn3.running_var"] == (
        "AttentionB_2/mask/skip/res1/branch1/conv3_1x1/bn/var"
    )
    assert names["layer1.1.mask.up.0.0.conv2.weight"] == (
        "AttentionA_1/mask/up/res2_1/branch1/conv2_3x3/weight"
    )
    assert len(set(names.values())) == len(names)
    with torch.device("meta"):
        names = authors_names(regard.create_model("cbam_resnet101"))
    assert names["layer3.22.se.channel.mlp.2.bias"] == "layer3.22.cbam.ChannelGate.mlp.3.bias"


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("sononet16", {"num_classes": 5, "in_chans": 3, "convs": [2, 2, 3, 3, 3]}),
        ("ag_sononet8", {"num_classes": 6, "in_chans": 1, "aggregation": "ft"}),
        ("ag_sononet8", {"num_classes": 6, "in_chans": 2, "aggregation": "deep_sup"}),
        ("ag_sononet8", {"num_classes": 6, "in_chans": 1, "aggregation": "mean"}),
        ("ag_sononet8", {"num_classes": 6, "in_chans": 1, "aggregation": "concat"}),
        ("cbam_resnet18", {"num_classes": 100, "in_chans": 3, "stem": "cifar"}),
        ("attention56", {"num_classes": 10, "in_chans": 1}),
    ],
)
def test_arguments_are_seen_from_the_checkpoint(network, arguments):
    with torch.device("meta"):
        model = regard.create_model(network, **arguments)
        names = authors_names(model)
        tensors = {names[k]: v for k, v in model.state_dict().items() if k in names}
    assert arguments_of(network, tensors) == arguments


def test_nested_and_foreign_contents(tmp_path):
    tensors = {n: torch.from_numpy(a) for n, a in SMALL.items()}
    torch.save({"model": {"state_dict": tensors}}, tmp_path / "nested.pth")
    np.savez(tmp_path / "big-endian.npz", **{n: a.astype(">f4") for n, a in SMALL.items()})
    wanted = answer(SMALL)
    assert torch.equal(answer(tmp_path / "nested.pth"), wanted)
    assert torch.equal(answer(tmp_path / "big-endian.npz"), wanted)
    np.savez(tmp_path / "words.npz", **SMALL, note=np.array("text"))
    with pytest.raises(regard.CheckpointError, match=r"words\.npz"):
        answer(tmp_path / "words.npz")


@pytest.mark.parametrize("prefix", ["module.module.", "_orig_mod.", "backbone.", "a.b.c."])
def test_a_foreign_prefix_is_named_once(prefix):
    model, _ = model_and_input()
    with pytest.raises(regard.CheckpointError) as caught:
        regard.load_authors_weights(model, {prefix + n: a for n, a in SMALL.items()})
    rest = prefix.removeprefix("module.")
    assert repr(rest) in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("page.pth", b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        ("page.npz", b"<html></html>", "HTML"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        ("plain.pth", pickle.dumps({"weights": Fraction(1, 2)}), "only tensors"),
        ("noise.safetensors", b"12345678", "damaged"),
        ("photo.jpg", b"\xff\xd8\xff\xe0 and so on", "an image, not a checkpoint"),
        ("empty.pth", b"", "empty"),
    ],
)
def test_a_file_of_another_kind_is_said_in_our_words(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(regard.CheckpointError, match=word) as caught:
        answer(tmp_path / name)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert "weights_only" not in message


def test_weights_that_are_not_finite_are_refused():
    broken = {n: a.copy() for n, a in SMALL.items()}
    broken["conv1.conv1.0.weight"][0, 0, 0, 0] = np.nan
    broken["classifier.bias"][0] = np.inf
    model, _ = model_and_input()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(regard.CheckpointError, match=r"NaN or infinite.*conv1\.conv1\.0\.weight"):
        regard.load_authors_weights(model, broken)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arguments", [{"mask": "local"}, {"attention": "none"}])
def test_ablations_have_no_layout(arguments):
    with torch.device("meta"):
        model = regard.create_model("attention56", **arguments)
    with pytest.raises(regard.CheckpointError, match="no definition"):
        regard.load_authors_weights(model, SMALL)
