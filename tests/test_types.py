"""The public names have types that `mypy --strict` accepts, in a program that uses them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
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


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_most_public_names_have_types_of_their_own():
    """Needs `pip install 'pyright[nodejs]'`; pyright takes the first `python` in PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--verifytypes", "regard", "--ignoreexternal",
         "--outputjson"],
        cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    report = json.loads(done.stdout)["typeCompleteness"]
    assert report["completenessScore"] > 0.95
