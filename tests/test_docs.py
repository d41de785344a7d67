"""The documentation: its site builds strictly, its commands exist, and its guides' code runs."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regard.cli import app
from tests.helpers import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
GUIDES = ["start.md", "guides/practitioner.md", "guides/researcher.md", "guides/medical.md",
          "concepts/twins.md"]  # fmt: skip
# a network and a length that take seconds
CHEAP = ["--model", "ag_sononet8", "--size", "16", "--epochs", "1", "--faithfulness-images", "0",
         "--recipe", "quick"]  # fmt: skip
PARSED_ONLY = ("serve", "export", "demo")  # tested elsewhere, and slow


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    return [(kind, code) for kind, code in BLOCK.findall(text) if kind in languages]


def commands(page: Path) -> list[list[str]]:
    """The tokens of each line of a block of `bash` that starts with `regard`."""
    lines = [line for _, code in blocks(page, "bash") for line in code.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("regard ")]


def test_every_command_of_every_page_is_a_command_with_these_flags():
    count = 0
    for page in PAGES:
        for _, *tokens in commands(page):
            app.parse_args(tokens, exit_on_error=False, print_error=False)
            count += 1
    assert count > 20


def test_every_python_block_can_be_compiled():
    for page in PAGES:
        for _, code in blocks(page, "python"):
            ast.parse(code, page.name)


def cheaper(tokens: list[str]) -> list[str]:
    """The same in a second or two: a small network, one epoch; a study's plan; no scores."""
    if tokens[0] == "study":
        return [*tokens, "--dry-run"]
    if tokens[0] != "train":
        return [token for token in tokens if token != "--score"]
    given = [t for i, t in enumerate(tokens) if {t, tokens[i - 1]}.isdisjoint(CHEAP[::2])]
    return [*given, *CHEAP]


@pytest.fixture(scope="module")
def world(tmp_path_factory, scans) -> Path:
    """A folder with the images, and the list of scans with patients, that the guides speak of."""
    place = tmp_path_factory.mktemp("guides")
    for name, old in (("daisy", "0"), ("rose", "1")):
        (place / "photos" / name).mkdir(parents=True)
        for i, image in enumerate(sorted((scans / old).iterdir())[:10], start=1):
            shutil.copy(image, place / "photos" / name / f"{i}.jpg")  # read by content
    (place / "scans").mkdir()
    lines = ["path,label,group"]
    for label, old in (("benign", "0"), ("malignant", "1")):
        for i, image in enumerate(sorted((scans / old).iterdir())[:20]):
            shutil.copy(image, place / "scans" / f"{label}-{i}.png")
            lines.append(f"scans/{label}-{i}.png,{label},patient-{label[0]}{i // 2}")
    (place / "scans.csv").write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_a_guide_runs(guide, world, monkeypatch):
    monkeypatch.chdir(world)
    page, names = ROOT / "docs" / guide, {}
    for out in ("runs", "explained"):
        shutil.rmtree(world / out, ignore_errors=True)
    for kind, code in blocks(page, "bash", "python", "toml"):
        if kind == "toml":
            (world / "mine.toml").write_text(code, encoding="utf-8")
        elif kind == "bash":
            for line in code.splitlines():
                tokens = shlex.split(line, comments=True)[1:]
                if line.startswith("regard ") and tokens[0] not in PARSED_ONLY:
                    run(*cheaper(tokens), cwd=world)
        else:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(code, str(page), "exec"), names)
            for line in code.splitlines():  # "print(x)  # 3" says what is printed
                if line.startswith("print(") and (told := line.partition("  # ")[2]):
                    assert told.rpartition(": ")[2] in said.getvalue()


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/make_docs.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "build/site"
    assert "md-source" in (site / "start.html").read_text(encoding="utf-8")
    assert 'data-md-component="source"' not in (site / "start.html").read_text(encoding="utf-8")
    for name in ("commands", "api", "recipes", "files"):
        assert (site / f"reference/{name}.html").stat().st_size > 10_000
    api = (site / "reference/api.html").read_text(encoding="utf-8")
    assert 'id="regard.attention.record"' in api


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](start.md#nowhere)", "nowhere"),
        ("[y][regard.no]", "regard.no"),
    ],
)
def test_a_broken_link_or_reference_fails(text, fault, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Here\n\n{text}\n", encoding="utf-8")
    (tmp_path / "docs/start.md").write_text("# Start\n", encoding="utf-8")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    config = config.replace("build/docs", "docs").replace("build/site", "site")
    (tmp_path / "mkdocs.yml").write_text(config.replace("[src]", f"[{ROOT / 'src'}]"), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert fault in plain
