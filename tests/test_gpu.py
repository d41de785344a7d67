"""On a GPU, where there is one: the same answers, no waits, stop and resume. Skipped elsewhere."""

import re
import subprocess
import sys

import pytest
import torch

from regard.machine import VARIABLE
from regard.predict import load
from tests.helpers import ENVIRONMENT, QUICK, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
ON_GPU = {k: v for k, v in ENVIRONMENT.items() if k != VARIABLE}


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


def test_between_looks_nothing_waits(tmp_path):
    script = (
        "import torch; torch.cuda.set_sync_debug_mode('warn'); from regard.cli import main; "
        f"main(['train', 'digits', '--model', 'resnet18', '--size', '32', '--steps', '40', "
        f"'--eval-every', '9', '--log', 'none', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], env=ON_GPU, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    waits = re.findall(
        r"training/(?:loop|update|feed)\.py:\d+: UserWarning: .*synchron", done.stderr
    )
    assert len(waits) <= 10  # two looks, and the ends
