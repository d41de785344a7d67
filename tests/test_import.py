"""What a person types first works as printed: the imports, the README, the versions to install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import regard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_python_prints_what_its_comments_say():
    block, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    said = python(f"{block}\nprint(tuple(logits.shape))").splitlines()
    logits, attention = re.findall(r"# (\(\d[\d, ]*\))", block)
    assert said == [f"torch.Size([{attention[1:-1]}])", logits]


def test_the_readmes_commands_files_and_picture_are_there():
    help_text = python("from regard.cli import run_command\nrun_command(['--help'])")
    for command in re.findall(r"(?:bin/|`|^)regard (\w+)", README, re.M):
        assert re.search(rf"\b{command}\b", help_text), command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
    names = re.findall(r"\]\(([^):]+)\)", README)
    names += re.findall(r"`((?:scripts|tests|src)/[\w/.]+)`", README)
    assert "docs/images/digits.png" in names
    for name in names:
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`regard\.(\w+)", README):
        assert callable(getattr(regard, name)), name
    assert (ROOT / "docs/images/digits.png").stat().st_size < 150_000


def test_a_tested_version_is_named_for_all_that_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    asked = [Requirement(text) for text in project["dependencies"]]
    asked += [Requirement(text) for text in project["optional-dependencies"]["test"]]
    assert not {r.name.lower() for r in asked} - set(pins)
    for requirement in asked:
        assert pins[requirement.name] in requirement.specifier, requirement


def test_every_public_name_is_there_and_another_is_refused():
    for name in regard.__all__:
        assert callable(getattr(regard, name)), name
        assert name in dir(regard)
    with pytest.raises(AttributeError, match="creat_model"):
        regard.creat_model  # noqa: B018


def test_timms_import_is_left_as_it_was():
    """regard watches for timm's import; afterwards nothing of that is left in timm's way."""
    said = python(
        "import regard, sys\n"
        "assert 'timm' not in sys.modules\n"
        "import importlib.resources, timm, timm.models\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('regard')]\n"
        "assert type(timm.__spec__.loader) is type(timm.models.__spec__.loader)\n"
        "assert importlib.resources.files('timm').joinpath('version.py').is_file()\n"
        "print(len(timm.list_models('*', module='cbam')), timm.is_model('ag_sononet8'))"
    )
    assert said.split() == [str(len(regard.list_models("*res*"))), "True"]
