"""Builds the documentation site into build/site; a broken link or reference is an error.

    python scripts/make_docs.py            # or `make docs`; needs the extra `docs`
    python scripts/make_docs.py --pages    # only the Markdown pages, in build/docs

The pages of docs/ are copied; the references of the API, the commands, the recipes and the file
formats are generated from the code, and the notebook pages from their stored outputs. Nothing
is downloaded, and the site loads nothing from other servers.
"""

import base64
import importlib
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build/docs"
SITE = ROOT / "build/site"
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
FILES = {
    "config.json": "timm's layout (`local-dir:`); Regard also reads what is under `regard`.",
    "recipe.toml": "Every value resolved; `regard train DATA --recipe` takes it.",
    "run.json": "How the run was made and what was measured on the way.",
    "splits.csv": "Which image was in which split; `content` is a hash of the image.",
    "metrics.csv": "A row for each evaluation.",
    "evaluation.json": "The test; `regard evaluate --json` prints the same. Without a value: null.",
    "predictions.npz": "Every probability of the test.",
}
ALSO = (
    "regard.predict.Classifier",
    "regard.predict.Prediction",
    "regard.data.preprocess.Preprocess",
    "regard.engines.backends.Engine",
    "regard.attention.StageMap",
    "regard.explanations.explanation.explain_batch",
    "regard.explanations.gradcam.gradcam",
    "regard.explanations.sanity.randomized",
    "regard.models.fused.set_fused",
    "regard.runs.RunFolder",
    "regard.evaluation.repeats.repeated_difference",
)
OUTSIDE = re.compile(
    r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*rel="?(?:stylesheet|preload)[^>]*href)="""
    r"""["']?(https?:)?//"""
)


def api_page() -> str:
    """Every public name, in the order of the packages that contain them."""

    places = {
        "regard": "Networks, training, prediction and explanation",
        "regard.data": "Images and data sets",
        "regard.evaluation": "Metrics, intervals and comparisons",
        "regard.errors": "Errors",
    }
    intro = "Every public name. Those of `regard` itself are imported on first use."
    parts = ["# Python API", intro]
    stub = (ROOT / "src/regard/__init__.pyi").read_text(encoding="utf-8")
    imports = re.findall(r"^from (\S+) import (\w+)", stub, re.M)
    homes = {name: f"regard{home}" for home, name in imports}
    seen: set[str] = set()
    for place, title in places.items():
        module = importlib.import_module(place)
        parts.append(f"## `{place}`: {title}")
        own = [n for n, o in vars(module).items() if getattr(o, "__module__", "") == place]
        names = [n for n in getattr(module, "__all__", own) if callable(getattr(module, n))]
        for name in names:
            home = homes.get(name) if place == "regard" else getattr(module, name).__module__
            path = f"{home}.{name}"
            owner = getattr(module, name).__module__
            if not owner.startswith(("regard", "functools")):
                title = f"### {place}.{name} {{: data-toc-label={name!r} }}"
                parts.append(f"{title}\n\nThis is `{owner.split('.')[0]}.{name}`.")
            elif path not in seen:
                seen.add(path)
                parts.append(_entry(path, f"{place}.{name}"))
    parts.append("## What these take and return, and what the guides use")
    parts += [_entry(path, path) for path in ALSO if path not in seen]
    return "\n\n".join(parts) + "\n"


def _entry(path: str, shown: str) -> str:
    """mkdocstrings' directive for the object at `path`."""
    label = shown.rpartition(".")[2]
    return f"::: {path}\n    options:\n      heading: {shown}\n      toc_label: {label}"


def commands_page() -> str:
    """The output of `regard COMMAND --help`, for every command."""
    from regard.cli import COMMANDS, app
    from regard.command_help import describe

    for name in COMMANDS:
        describe(app[name])
    text = app.generate_docs(output_format="markdown")
    # cyclopts puts the command's name before a usage line that is given, which has it
    text = re.sub(r"^regard (\w+) \1 ", r"regard \1 ", text, flags=re.M)
    text = re.sub(r"## Table of Contents.*?(?=\*\*Commands\*\*)", "", text, flags=re.S)
    codes = (
        "Exit codes: 0, all is done; 1, the work failed, in part or as a whole; 2, a wrong call or "
        "input; 70, a bug in Regard; 128 + N, ended by signal N. Messages are on standard "
        "error, results on standard output.\n\n**Commands**"
    )
    return text.replace("# regard\n", "# Commands\n", 1).replace("**Commands**", codes, 1)


def recipes_page() -> str:
    """Every field of a recipe, and every shipped recipe."""
    from regard.training.config import Recipe, fields_of
    from regard.training.recipe_files import shipped, summary

    types = get_type_hints(Recipe)
    intro = "A recipe is a TOML file; each value is also a flag of `regard train`."
    parts = ["# Recipes", intro, "## Fields"]
    groups: dict[str, list[str]] = {}
    for field in fields_of():
        default = "" if field.default is None else f", default: `{field.default!r}`"
        entry = f"- **`{field.name}`** ({_type(types[field.name])}{default}) – "
        groups.setdefault(field.metadata["group"], []).append(entry + field.metadata["help"])
    for group, entries in groups.items():
        parts.append(f"### {group}\n\n" + "\n".join(entries))
    parts.append("## Shipped recipes")
    for name, text in shipped().items():
        parts.append(f"### `{name}`\n\n{summary(text)}\n\n```toml\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _type(hint: Any) -> str:
    """A field's type, or its choices; TOML has no None, so optional fields are omitted."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{choice!r}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(hint) if part is not type(None))
    return f"`{hint if get_args(hint) else hint.__name__}`"


def files_page() -> str:
    """Each file format, with an example that the code writes now."""
    from regard.papers import Row, Table

    parts = [
        "# File formats",
        "Each example was written by this version when this page was built: the folder of a run "
        "of a few seconds on handwritten digits. Lists are shortened to three entries.",
        *_files_of_a_run(),
        "## Tables of `regard study`",
        "A TOML file: these keys, and `[[rows]]`.", _attributes(Table, leave={"key", "rows"}),
        "Each row:", _attributes(Row),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _files_of_a_run() -> Iterator[str]:
    import numpy as np

    import regard

    with tempfile.TemporaryDirectory() as place:
        logging.getLogger("regard").addHandler(logging.NullHandler())  # its messages are not shown
        folder = regard.train(
            "digits", model="ag_sononet8", out=Path(place, "run"), trackers=["none"], limit=100,
            steps=8, size=16, flip=0, faithfulness_images=0, eval_every=4,
        )  # fmt: skip
        for name, title in FILES.items():
            yield f"## `{name}`\n\n{title}"
            yield _example(folder / name)
        image = np.zeros((16, 16), np.uint8)
        (prediction,) = regard.load(folder).predict([image], top=2)
        (shown,) = regard.explain(folder, [image])
        shown.save_npz(Path(place, "explained.npz"))
        answer = [{"class": name, "probability": share} for name, share in prediction.classes]
        yield (
            "## `regard predict --json`\n\nOne object per line; `error` in place of `classes` "
            "where an image can't be read."
        )
        yield _json({"path": "digit.png", "classes": answer})
        yield "## `IMAGE.explained.npz` of `regard explain`"
        yield _example(Path(place, "explained.npz"))


def _example(path: Path) -> str:
    """The beginning of a file."""
    import numpy as np

    if path.suffix == ".npz":
        with np.load(path) as arrays:
            rows = [f"| `{n}` | {a.dtype} | {a.shape} |" for n, a in arrays.items()]
        return "| Array | Type | Shape in this example |\n|---|---|---|\n" + "\n".join(rows)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _json(json.loads(text))
    lines = text.splitlines()
    shown = lines[:4] if path.suffix == ".csv" else lines
    return f"```{path.suffix[1:]}\n" + "\n".join(shown) + "\n```"


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(_short(value), indent=2, ensure_ascii=False)}\n```"


def _short(value: Any) -> Any:
    """At most three entries of each list, and numbers with four digits."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value[:3]] + (["..."] if len(value) > 3 else [])
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _attributes(kind: type, leave: Iterable[str] = ()) -> str:
    """The "Attributes" of a class's docstring as a table."""
    lines = inspect.cleandoc(kind.__doc__ or "").split("Attributes:\n")[1]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", lines, re.M)
    rows = [f"| `{n}` | {' '.join(t.split())} |" for n, t in entries if n not in leave]
    return "| Key | |\n|---|---|\n" + "\n".join(rows)


def notebook_pages() -> Iterator[tuple[str, str]]:
    """(name, page) of each notebook; pictures are written beside the page."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = []
        for n, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source))
                continue
            parts.append(f"```python\n{source}\n```")
            parts += [_shown(o, f"{path.stem}-{n}-{k}") for k, o in enumerate(cell["outputs"])]
        yield path.stem, "\n\n".join(p for p in parts if p) + "\n"


def _shown(output: dict[str, Any], name: str) -> str:
    """One stored output as Markdown."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        file = PAGES / "notebooks" / f"{name}.png"
        file.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![Output of the cell above]({file.name})"
    if "text/html" in data:
        return f'<div class="cells">\n{"".join(data["text/html"])}\n</div>'
    return f"``` {{.text .output}}\n{''.join(data['text/plain']).rstrip()}\n```"


def write_pages() -> None:
    """Fills build/docs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    pages = {
        "reference/api.md": api_page(), "reference/commands.md": commands_page(),
        "reference/recipes.md": recipes_page(), "reference/files.md": files_page(),
    }  # fmt: skip
    for name in PROJECT:
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[f"project/{name.lower()}"] = text.replace("](docs/", "](../")
    (PAGES / "notebooks").mkdir()
    pages |= {f"notebooks/{name}.md": page for name, page in notebook_pages()}
    for name, text in pages.items():
        (PAGES / name).parent.mkdir(exist_ok=True)
        (PAGES / name).write_text(text, encoding="utf-8")


def faults_of_navigation() -> list[str]:
    """Pages that mkdocs.yml names but that don't exist, and pages that it does not name."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r": ([\w/]+\.md)$", nav, re.M))
    there = {page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md")}
    return [f"mkdocs.yml names {name}, which is not there" for name in sorted(named - there)] + [
        f"mkdocs.yml does not name {name}" for name in sorted(there - named)
    ]


def loaded_from_outside(site: Path) -> list[str]:
    """The pages that load a script, style or picture from another server."""
    return [
        page.relative_to(site).as_posix()
        for page in sorted(site.rglob("*.html"))
        if OUTSIDE.search(page.read_text(encoding="utf-8"))
    ]


def without_queries(site: Path) -> None:
    """Removes the attribute by which the theme's script asks GitHub for the repository's stars."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(' data-md-component="source"', ""), encoding="utf-8")


def main() -> None:
    """Writes the pages and builds the site."""
    write_pages()
    if faults := faults_of_navigation():
        raise SystemExit("\n".join(faults))
    if "--pages" in sys.argv[1:]:
        return
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)
    without_queries(SITE)
    if pages := loaded_from_outside(SITE):
        raise SystemExit(f"pages that load something from elsewhere: {', '.join(pages)}")
    print(
        f"{SITE.relative_to(ROOT)}: open it by `python -m http.server -d {SITE.relative_to(ROOT)}`"
    )


if __name__ == "__main__":
    main()
