"""Results of public benchmarks: what is kept of a run, and the table made of it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from regard.errors import UsageError

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_a_kept_result_is_the_runs_and_speaks_of_no_machines_folders(whole, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import keep_result

    given = {"benchmark": "cifar10", "commit": "abc", "machine": "two cores", "root": tmp_path}
    folder = keep_result.keep(whole, "a", **given)
    assert {f.name for f in folder.iterdir()} == set(keep_result.KEPT)
    for path in folder.iterdir():
        assert str(whole.parent) not in path.read_text()
    run = json.loads((whole / "run.json").read_text())
    kept = tables.read_kept(folder)
    tested = json.loads((whole / "evaluation.json").read_text())["metrics"]["top1"]
    assert kept.accuracy == (tested["value"], tested["low"], tested["high"])
    assert kept.epochs == run["facts"]["epochs"]
    assert "--seed" not in kept.command
    assert "--out" not in kept.command
    with pytest.raises(UsageError, match="exists"):
        keep_result.keep(whole, "a", **given)
    with pytest.raises(UsageError, match="cifar10"):
        keep_result.keep(whole, "b", **{**given, "benchmark": "mnist"})
    other = tmp_path / "b"
    shutil.copytree(folder, other)
    evaluation = json.loads((other / "evaluation.json").read_text())
    evaluation["metrics"]["top1"]["value"] -= 0.1
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    shutil.copy(tables.RESULTS / "benchmarks.toml", tmp_path)
    (row,) = [line for line in tables.results_table(tmp_path).splitlines() if "2 seeds" in line]
    mean = 100 * (tested["value"] - 0.05)
    assert f"{mean:.2f} ± {10 / 2**0.5:.2f} %" in row
    for changed, rows in (("workers = 3", 1), ("weight_decay = 0.7", 2)):
        recipe = (other / "recipe.toml").read_text()
        name = changed.partition(" ")[0]
        (other / "recipe.toml").write_text(re.sub(rf"(?m)^{name} = .*$", changed, recipe))
        text = tables.results_table(tmp_path)
        assert (
            len([line for line in text.splitlines() if "seed" in line and line[0] == "|"]) == rows
        )
    recipe = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(recipe.replace('graft = "none"', 'graft = "cbam"'))
    run["plan"]["preprocess"]["crop_pct"] = 0.875
    (other / "run.json").write_text(json.dumps(run))
    grafted = [line for line in tables.results_table(tmp_path).splitlines() if "` + CBAM" in line]
    assert len(grafted) == 1
    assert "center crop of 0.875 of the shorter side; " in tables.results_table(tmp_path)
