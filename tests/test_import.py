"""What a person types first works as printed: the imports, the README, the versions to install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from scripts import set_address

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
    # links are absolute, as the package index shows the README too
    assert re.findall(r"\]\((?!https://)[^)]*\)", README) == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site, home = project["urls"]["Documentation"], project["urls"]["Homepage"]
    names = [f"docs/{page}.md" for page in re.findall(rf"\]\({site}([\w/]+)\.html\)", README)]
    names += re.findall(rf"\]\({home}/blob/main/([\w/.]+)\)", README)
    raw = home.replace("github.com", "raw.githubusercontent.com")
    names += re.findall(rf"\]\({raw}/main/([\w/.]+)\)", README)
    names += re.findall(r"`((?:scripts|tests|src)/[\w/.]+)`", README)
    assert "docs/images/digits.png" in names
    names = [re.sub(r"^docs/(notebooks/\w+)\.md$", r"\1.ipynb", name) for name in names]
    for name in names:
        assert name.startswith("docs/reference/") or (ROOT / name).is_file(), name
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


@pytest.mark.slow
def test_timms_import_is_left_as_it_was():
    """regard watches for timm's import; afterwards nothing of that is left in timm's way."""
    said = python(
        "import regard, sys\n"
        "assert 'timm' not in sys.modules\n"
        "import importlib.resources, timm, timm.models\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('regard')]\n"
        "assert type(timm.__spec__.loader) is type(timm.models.__spec__.loader)\n"
        "assert importlib.resources.files('timm').joinpath('version.py').is_file()\n"
        "print(len(timm.list_models('*', module='attention_resnet')), timm.is_model('ag_sononet8'))"
    )
    assert said.split() == ["24", "True"]  # three kinds of eight ResNets


LOOK = "assert importlib.util.find_spec('timm').loader.get_filename('timm').endswith('.py')"
CREATE = "assert len(timm.create_model('cbam_resnet18', channels=(4, 8, 8, 8)).state_dict()) > 100"
ORDERS = {
    "look, import": ["import regard", LOOK, "import timm"],
    "look, look, import": ["import regard", LOOK, LOOK, "import timm"],
    "look, import, look": ["import regard", LOOK, "import timm", LOOK],
    "look before": [LOOK, "import regard", LOOK, "import timm"],
    "timm first": ["import timm", LOOK, "import regard", LOOK],
    "by a submodule": ["import regard", LOOK, "import timm.data", "import timm"],
    "look for a submodule": ["import regard", "importlib.util.find_spec('timm.models')",
                             "import timm"],
    "in a thread": ["import regard, threading", LOOK,
                    "t = threading.Thread(target=importlib.util.find_spec, args=('timm',))",
                    "t.start(); t.join()", "import timm"],
}  # fmt: skip


@pytest.mark.slow
def test_looking_for_timm_leaves_the_networks_registered():
    """In processes of their own, forked from one that has all of timm's imports but timm."""
    script = "import importlib.util, os, sys, torch, torchvision\n"
    for name, lines in ORDERS.items():
        body = "; ".join([*lines, CREATE, "os._exit(0)"])
        script += (
            f"pid = os.fork()\n"
            f"if pid == 0:\n"
            f"    try:\n        {body}\n"
            f"    except BaseException as error:\n"
            f"        print({name!r}, repr(error), flush=True); os._exit(1)\n"
            f"assert os.waitpid(pid, 0)[1] == 0, {name!r}\n"
        )
    python(script)


def test_a_spawned_process_has_the_networks(tmp_path):
    (tmp_path / "spawned.py").write_text(
        "import importlib.util, multiprocessing\n"
        "import regard\n"
        "importlib.util.find_spec('timm')\n"
        "def work(name):\n"
        "    import timm\n"
        "    return len(timm.create_model(name).state_dict())\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, ['ag_sononet8']))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "spawned.py"], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.strip("[]\n")) > 50


def test_the_version_stands_in_the_package_and_agrees_elsewhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {regard.__version__}\n" in citation
    for number in ("1704.06904", "1807.06521", "1808.08114"):
        assert number in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {regard.__version__}" in changes


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return names or pytest.skip("not a git repository")


OURS = re.compile(
    rb"https://(?:github\.com/[\w-]+/regard\b|raw\.githubusercontent\.com/[\w-]+/regard/"
    rb"|[\w-]+\.github\.io/regard/)"
)


def test_the_address_is_the_same_in_every_file_and_one_command_changes_it(tmp_path):
    home, site = set_address.addresses(ROOT)
    raw = home.replace(*set_address.RAW)
    named = []
    for name in tracked():
        if name.startswith("tests/"):
            continue  # this one names others
        content = (ROOT / name).read_bytes()
        if found := {address.decode() for address in OURS.findall(content)}:
            assert found <= {home, f"{raw}/", site}, name
            named.append(name)
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert {"README.md", "CITATION.cff", "mkdocs.yml", "pyproject.toml"} <= set(named)
    new = ("https://github.com/o/regard", "https://o.example/docs")
    changed = set_address.replace(tmp_path, named, *new)
    assert changed == named
    assert set_address.addresses(tmp_path) == (new[0], f"{new[1]}/")
    for name in named:
        content = (tmp_path / name).read_bytes()
        assert home.encode() not in content
        assert site.encode() not in content
        assert raw.encode() not in content
    assert (
        b"https://raw.githubusercontent.com/o/regard/main/docs/images/digits.png"
        in (tmp_path / "README.md").read_bytes()
    )


def test_no_file_names_a_package_registry():
    hosts = ("pypi" + ".org", "files.python" + "hosted", "registry.npm" + "js", "/whl" + "/cpu")
    for name in tracked():
        text = (ROOT / name).read_bytes()
        assert not [host for host in hosts if host.encode() in text], name
