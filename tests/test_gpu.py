"""On a GPU, where there is one: the same answers, no waits, stop and resume. Skipped elsewhere."""

import copy
import csv
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from regard.machine import VARIABLE
from regard.models.create import create_model
from regard.predict import load
from regard.training import muon
from regard.training.config import Recipe
from regard.training.optim import make_optimizer
from tests.helpers import ENVIRONMENT, QUICK, run
from tests.test_fused import apart, end_of_a_block, maps, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
ON_GPU = {k: v for k, v in ENVIRONMENT.items() if k != VARIABLE}
GPU = torch.device("cuda")


def fused_triton():
    from regard.models import fused_triton as passes  # Triton is where CUDA is

    return passes


def read_csv(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def regard(*words: object) -> str:
    command = [sys.executable, "-m", "regard", *map(str, words)]
    done = subprocess.run(command, env=ON_GPU, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_are_the_cpus_within_the_bound_of_the_engines(whole, scans):
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    expected, found = (load(whole, d).probabilities(images) for d in ("cpu", "cuda"))
    assert (found - expected).abs().max() < 1e-4


def test_training_runs_and_its_test_is_the_cpus(tmp_path):
    out = tmp_path / "run"
    told = regard("train", "digits", *QUICK, "--steps", "60", "--out", out, "--ema-decay", "0.9",
                  "--clip-grad", "1", "--mixup", "0.2", "--accumulate", "2")  # fmt: skip
    assert "cuda x 1" in told
    assert "accuracy" in run("evaluate", out, "--device", "cpu")


def waits(steps: int, out) -> int:
    """How often a run's loop waits for the device."""
    script = (
        "import torch; torch.cuda.set_sync_debug_mode('warn'); from regard.cli import main; "
        f"main(['train', 'digits', '--model', 'resnet18', '--size', '32', '--steps', '{steps}', "
        f"'--eval-every', '9', '--compile', 'no', '--log', 'none', '--out', {str(out)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], env=ON_GPU, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"training/(?:loop|update|feed)\.py:\d+: UserWarning: .*synchron", done.stderr
    )
    return len(found)


def test_between_looks_nothing_waits(tmp_path):
    """The loss is looked at every 20 steps: there the count is read, and the loss."""
    assert 2 <= waits(80, tmp_path / "80") - waits(40, tmp_path / "40") <= 4


def test_fused_blocks_are_the_modules():
    norm, gates = end_of_a_block(200, torch.float32)
    norm, gates = norm.to(GPU), gates.to(GPU)
    y, k, t = (x.to(GPU) for x in maps((3, 200, 15, 13), torch.float32))
    wide = [copy.deepcopy(m).double() for m in (norm, gates)]
    expected = step(*wide, y.double(), k.double(), t.double())
    assert apart(step(norm, gates, y, k, t, fused_triton()), expected) < 1e-5


@pytest.mark.parametrize("name", ["cbam_resnet18", "attention56_cifar", "ag_sononet8"])
def test_recorded_passes_are_the_eager_ones(name, tmp_path):
    """Steps of a run, which kernels that add in another order move by rounding."""
    rows = {}
    for compiled in ("no", "graphs"):
        out = tmp_path / compiled
        told = regard("train", "digits", "--model", name, "--size", "32", "--steps", "12",
                      "--lr", "0.001", "--precision", "fp32", "--compile", compiled,
                      "--fuse", "no", "--eval-every", "0.1", "--faithfulness-images", "0",
                      "--log", "none", "--out", out)  # fmt: skip
        assert "accuracy" in told
        rows[compiled] = read_csv(out / "metrics.csv")
        assert json.loads((out / "run.json").read_text())["facts"]["cuda_graphs"] is (
            compiled == "graphs"
        )
    for eager, recorded in zip(rows["no"], rows["graphs"], strict=True):
        assert float(recorded["loss"]) == pytest.approx(float(eager["loss"]), rel=2e-3)


def test_muon_replayed_is_muon(monkeypatch):
    """The same products, asked for at once: the first step is eager, the second records."""
    torch.manual_seed(0)
    model = create_model("attention56_cifar").to(GPU, memory_format=torch.channels_last)
    recipe = Recipe(optimizer="muon", lr=0.015, weight_decay=0.1)
    replayed, eager = copy.deepcopy(model), copy.deepcopy(model)
    one, other = make_optimizer(replayed, recipe), make_optimizer(eager, recipe)
    for _ in range(5):
        for p, q in zip(replayed.parameters(), eager.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        with monkeypatch.context() as patch:
            patch.setattr(muon._Recording, "__call__", lambda _, *a: muon.directions(*a))
            other.step()
    assert [r.graph is not None for r in one._recordings.values()] == [True]
    for p, q in zip(replayed.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p, q)


def test_jpeg_files_are_decoded_there(tmp_path):
    """nvJPEG rounds otherwise than libjpeg, and smooths colors otherwise between their samples."""
    pytest.importorskip("torchcodec")
    from regard.data.augment import Augmentation
    from regard.data.device_decoding import DecodingLoader
    from regard.data.loading import Reader, SampleOrder, StreamingLoader
    from regard.data.preprocess import Preprocess
    from regard.data.sources import open_data

    for c, photo in enumerate(load_sample_images().images):
        (tmp_path / "photos" / str(c)).mkdir(parents=True)
        for k in range(40):
            top, left, height, width = 5 * k, 7 * k, 150 + 3 * k, 200 + k
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(tmp_path / f"photos/{c}/{k}.jpg", progressive=k % 4 == 0, quality=90)
    table = open_data(str(tmp_path / "photos"))
    preprocess = Preprocess((3, 96, 96), (0.5,) * 3, (0.25,) * 3)
    crops = Augmentation(random_crop="resized", crop_scale=(0.35, 1.0), full_decode=True)
    reader, order = Reader(table, preprocess, crops), SampleOrder(80, 0)
    spans = [(0, 40), (40, 40)]
    theirs = StreamingLoader(reader, order, 0, 0).batches(spans)
    for batch, expected in zip(
        DecodingLoader(reader, order, 0, 2).batches(spans), theirs, strict=True
    ):
        found = batch.decoded(GPU)
        assert found.images.device.type == "cuda"
        assert found.images.dtype == torch.uint8
        apart = (found.images.cpu().float() - expected.images.float()).abs()
        assert apart.mean(dim=(1, 2, 3)).max() < 2.5  # of 255

    told = regard("train", tmp_path / "photos", "--model", "cbam_resnet18", "--size", "64",
                  "--steps", "40", "--memory", "no", "--decode", "device", "--compile", "graphs",
                  "--batch-size", "16", "--out", tmp_path / "run", "--log", "none")  # fmt: skip
    assert "streamed from files" in told
