"""The public names have types that `mypy --strict` accepts, in a program that uses them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_program_that_uses_the_public_names_passes_strictly():
    # the same cache as `mypy` of the whole, which is checked before
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
         "src/regard/__init__.pyi", "tests/public_types.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
