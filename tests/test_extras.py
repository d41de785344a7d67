"""Optional packages: each missing one is reported with the command that installs it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from regard.errors import UsageError
from regard.extras import EXTRAS, missing, require

ROOT = Path(__file__).parents[1]


def test_the_extras_are_those_of_the_package():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = content["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        packages = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in declared[extra]}
        assert set(modules) <= packages


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_names_one_command(extra, monkeypatch):
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None)
    assert missing(extra) == list(EXTRAS[extra])
    with pytest.raises(UsageError, match=re.escape(f": pip install 'regard[{extra}]'")) as found:
        require(extra, "this")
    assert EXTRAS[extra][0] in str(found.value)


def test_looking_imports_nothing_slow():
    code = (
        "import sys, regard.extras as e; [e.missing(x) for x in e.EXTRAS];"
        "print(*(m for m in ('torch', 'numpy', 'onnxruntime', 'openvino') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
