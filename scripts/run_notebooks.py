"""Runs the notebooks and stores their small outputs.

    python scripts/run_notebooks.py [NAME ...]     # needs nbclient and ipykernel (extra: test)

Each runs in a separate folder, as a reader's would. tests/test_notebook_code.py runs their code,
with fewer images and epochs, and checks what is stored.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def execute(path: Path) -> None:
    """Runs one notebook and writes it with its outputs, without times and machine names."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FOLDER / "shapes.py", folder)
        NotebookClient(notebook, timeout=7200, resources={"metadata": {"path": folder}}).execute()
        tidy(notebook, folder)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Removes times, progress on standard error and the folder's name; joins printed lines."""
    for cell in notebook.cells:
        cell.metadata = {}
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            if output.get("name") == "stdout":
                output["text"] = re.sub(re.escape(folder) + "/?", "", output["text"])
                if outputs and outputs[-1].get("name") == "stdout":
                    outputs[-1]["text"] += output["text"]
                    continue
            outputs.append(output)
        if "outputs" in cell:
            cell["outputs"] = outputs


def main() -> None:
    """Runs the notebooks that are named, or all."""
    os.environ.setdefault("PYTHONPATH", str(FOLDER.parent / "src"))
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            start = time.monotonic()
            execute(path)
            seconds, size = time.monotonic() - start, path.stat().st_size
            print(f"{path.name}: {seconds:.0f} s, {size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
