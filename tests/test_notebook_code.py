"""The notebooks: their code runs, and what they store is small and of a whole run."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_code_of_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGARD_QUICK", "1")  # a few images, one epoch
    monkeypatch.syspath_prepend(str(path.parent))
    names: dict = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_stores_small_outputs_of_a_whole_run(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in json.dumps(cell["outputs"]) for cell in code)
    stored = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in stored if o["output_type"] == "error"]
    assert not [o for o in stored if o.get("name") == "stderr"]
    text = json.dumps(stored)
    assert "/tmp/" not in text
    assert "/home/" not in text
    assert path.stat().st_size < 600_000
