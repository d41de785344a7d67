"""The example of a diagnostic study runs to its end, on images that are made here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Two classes of smooth noise with shapes, one of them brighter."""
    rng = np.random.default_rng(0)
    for name, level in (("bright", 150), ("dark", 90)):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for i in range(230):
            noise = rng.normal(level, 70, (30, 40, 3)).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(noise).resize((200, 150), Image.Resampling.BICUBIC)
            for _ in range(6):
                x, y, w, h = rng.integers((0, 0, 15, 15), (180, 130, 60, 60)).tolist()
                image.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y, x + w, y + h))
            image.filter(ImageFilter.GaussianBlur(0.7)).save(folder / f"{i:03d}.jpg", quality=92)
    return tmp_path / "photographs"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_journey_holds_what_it_promises(photographs, tmp_path):
    out = tmp_path / "my study"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/diagnostic_study.py", photographs, out,
         "--images", "400", "--epochs", "1", "--size", "32", "--model", "ag_sononet8"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓") == 8
    again = subprocess.run(
        [sys.executable, ROOT / "examples/diagnostic_study.py", photographs, out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 1
    assert "exists" in again.stderr
