"""The documentation: its site builds strictly, its commands exist, and its guides' code runs."""

import ast
import contextlib
import importlib
import io
import json
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
    """The tokens of each command of Regard's: lines of blocks, and spans with an argument."""
    lines = [
        line
        for _, code in blocks(page, "bash", "")
        for line in code.replace("\\\n", " ").splitlines()
        if line.startswith("regard ") and "[" not in line  # "[--out DIR]" says what can be given
    ]
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    lines += re.findall(r"`(regard \w+ [^-`\n][^`\n]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_of_every_page_is_a_command_with_these_flags():
    count = 0
    for page in PAGES:
        for _, *tokens in commands(page):
            app.parse_args(tokens, exit_on_error=False, print_error=False)
            count += 1
    assert count > 100


OTHERS = {"--help", "--version", "--torch-backend", "--build-arg", "--max-restarts"}
"""Flags of every program, of uv, docker and torchrun."""


def choices_of_flags() -> dict[str, set[str] | None]:
    """The flags of all commands with their choices, or None where any value goes."""
    flags: dict[str, set[str] | None] = {}
    for line in app.generate_docs(output_format="markdown").splitlines():
        if entry := re.match(r"\* `([^`]+)`", line):
            found = re.search(r"choices: ([^\]]+)\]", line)
            choices = set(found[1].replace("*", "").split(", ")) if found else None
            for flag in re.findall(r"--[\w-]+", entry[1]):
                known = flags.get(flag, set())
                flags[flag] = None if choices is None or known is None else known | choices
    return flags


def test_every_flag_that_a_page_names_in_its_text_exists_and_takes_the_value():
    flags, faults = choices_of_flags(), []
    programs = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("benchmarks/*.py"))
    assert flags["--resize"] == {"squash", "crop", "pad"}
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for span in re.findall(r"`((?:regard |--)[^`\n]+)`", text):
            for flag, value in re.findall(r"(?<![\w-])(--[a-z][\w-]*)(?:[ =](\w[\w.-]*))?", span):
                choices = flags.get(flag)
                wrong = value and choices and value not in choices
                unknown = flag not in flags and flag not in OTHERS and f'"{flag}"' not in programs
                if unknown or wrong:
                    faults.append(f"{page.name}: {span}")
    assert not faults


def test_every_python_block_can_be_compiled():
    for page in PAGES:
        for _, code in blocks(page, "python"):
            ast.parse(code, page.name)


def test_absolute_links_into_the_repository_and_the_site_resolve():
    """Those of README, the templates and the notebooks, which no build checks."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    site = re.search(r"^site_url: (\S+)/$", config, re.M)[1]
    repository = re.search(r"^repo_url: (\S+)$", config, re.M)[1]
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main"
    pages = set(re.findall(r": ([\w/]+)\.md$", config, re.M))
    sources = [*PAGES, *(ROOT / ".github").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb"),
               ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]  # fmt: skip
    count, broken = 0, []
    for source in sources:
        for link in re.findall(r"""https://[^\s)"'\\<>]+""", source.read_text(encoding="utf-8")):
            place, path = next(
                (
                    (start, link.removeprefix(start).split("#")[0].strip("/"))
                    for start in (site, raw, f"{repository}/blob/main", f"{repository}/tree/main")
                    if link.startswith(start)
                ),
                ("", ""),
            )
            if place == site:
                there = path.removesuffix(".html") in pages | {""}
            else:
                there = (ROOT / path).exists()
            count += bool(place)
            broken += [] if there else [f"{source.name}: {link}"]
    assert not broken
    assert count > 20


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


def names_that_pages_import() -> set[str]:
    """Where the code of pages and notebooks takes the names that it uses from Regard."""
    notebooks = [
        "".join(cell["source"])
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    names = set()
    for code in [code for page in PAGES for _, code in blocks(page, "python")] + notebooks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("regard"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    thing = getattr(module, alias.name)
                    names.add(f"{thing.__module__}.{alias.name}")
    return names


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
    assert "<blockquote>" not in api  # an example outside "Examples:" becomes one
    missing = sorted(name for name in names_that_pages_import() if f'id="{name}"' not in api)
    assert not missing


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
