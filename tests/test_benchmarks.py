"""Benchmarks: the arithmetic of their figures, what is measured, and the tables; no real time."""

import csv
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from regard.engines.choose import missing_engines
from regard.errors import UsageError
from regard.extras import missing
from tests.helpers import Clock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import measure as measuring  # noqa: E402
from cases import AUTHORS, Case, peers_of, prepare, twin_of  # noqa: E402
from measure import measure, plan  # noqa: E402
from results import (  # noqa: E402
    Result,
    append_csv,
    as_rows,
    compare,
    pooled,
    slug,
    write_csv,
)
from subprocesses import SecondProcess, measure_alone  # noqa: E402

pytestmark = [pytest.mark.native, pytest.mark.slow]

MACHINE = {
    "processor": "Test (R) CPU", "extensions": ["avx2"], "threads": 2, "accelerator": None,
    "system": "Linux x86_64", "versions": {"torch": "9.9"},
}  # fmt: skip


def a_case(engine="eager", precision="fp32", **changes) -> Case:
    what = {
        "kind": "predict", "of": "ag_sononet8", "network": "ag_sononet8", "role": "network",
        "engine": engine, "precision": precision, "batch": 8, "size": (1, 32, 32), "threads": 1,
    }  # fmt: skip
    return Case(**{**what, **changes})


# ------------------------------------------------------------------------------- figures
def test_median_quartiles_and_rate():
    r = Result(a_case(), seconds=[0.1, 0.5, 0.2, 0.4, 0.3])
    assert r.median == 0.3
    assert r.quartiles == (0.2, 0.4)
    assert r.rate == pytest.approx(8 / 0.3)
    assert Result(a_case(), seconds=[0.1]).quartiles == (0.1, 0.1)


def test_ratios_are_to_the_authors_way_and_to_the_twin_of_the_same_engine_and_batch():
    def one(seconds, *what, **changes):
        return Result(a_case(*what, **changes), seconds=[seconds])

    twin = {"network": "sononet8", "role": "twin"}
    rows = [
        one(6.0, AUTHORS), one(2.0, "eager"), one(1.0, "eager", "bf16"),
        one(99.0, AUTHORS, batch=1),
        one(4.0, AUTHORS, **twin), one(1.0, "eager", **twin), one(0.8, "eager", "bf16", **twin),
        one(3.0, AUTHORS, network="timm:x", role="peer"), one(7.0, "openvino", of="other"),
        Result(a_case("openvino"), fault="no"), one(1.0, "openvino", **twin),
    ]  # fmt: skip
    compare(rows)
    assert [r.times for r in rows] == pytest.approx(
        [1.0, 3.0, 6.0, 1.0, 1.0, 4.0, 5.0, 2.0, None, None, 4.0]
    )
    assert [r.to_twin for r in rows[:3]] == pytest.approx([1.5, 2.0, 1.25])
    assert all(r.to_twin is None for r in rows[3:])


@pytest.fixture
def fake(monkeypatch):
    """A clock, and cases that are ready at once and take as long as a dictionary says."""
    clock, seconds = Clock(), {}

    def ready(case):
        found = seconds[case.network, case.engine, case.precision]
        if isinstance(found, Exception):
            raise found
        return clock.step([found]), 0.25

    monkeypatch.setattr(measuring, "prepare", ready)
    monkeypatch.setattr(measuring.SecondProcess, "prepare", lambda self, case: ready(case))
    monkeypatch.setattr("regard.engines.bench.has_bf16", lambda device: False)
    monkeypatch.setattr("regard.engines.bench.missing", lambda *names: ["nncf"])
    return clock, seconds


def test_a_measurement_compares_and_writes(fake, tmp_path, caplog):
    clock, seconds = fake
    seconds |= {
        ("ag_sononet8", AUTHORS, "fp32"): 0.8, ("ag_sononet8", "eager", "fp32"): 0.2,
        ("ag_sononet8", "onnxruntime", "fp32"): RuntimeError("no such\noperator"),
        ("sononet8", AUTHORS, "fp32"): 0.6, ("sononet8", "eager", "fp32"): 0.25,
        ("sononet8", "onnxruntime", "fp32"): 0.1,
    }  # fmt: skip
    report = measure(["ag_sononet8"], engines=["eager", "onnxruntime"], rounds=3, clock=clock)
    assert "ag_sononet8, onnxruntime, fp32: no such operator" in caplog.text
    assert report.notes == ["ag_sononet8, onnxruntime, fp32: no such operator"]
    rows = {(r["network"], r["engine"]): r for r in report.rows()}
    assert len(rows) == 6
    best = rows["ag_sononet8", "eager"]
    assert (best["median_ms"], best["images_per_s"], best["times"]) == (200.0, 40.0, 4.0)
    assert (best["to_twin"], best["start_s"], best["rounds"]) == (0.8, 0.25, 3)
    assert rows["ag_sononet8", "onnxruntime"]["median_ms"] == ""
    assert rows["ag_sononet8", "onnxruntime"]["fault"] == "no such operator"
    assert rows["sononet8", "onnxruntime"]["times"] == 6.0

    path = tmp_path / "new/figures.csv"
    append_csv(path, report.rows())
    append_csv(path, report.rows())
    with path.open(newline="") as file:
        assert [r["times"] for r in csv.DictReader(file)][1::6] == ["4.0", "4.0"]
    write_csv(path, report.rows())
    assert len(path.read_text().splitlines()) == 7
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"other\.csv has other columns"):
        append_csv(tmp_path / "other.csv", report.rows())
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_a_case_that_fails_in_a_round_leaves_the_others(fake, monkeypatch):
    clock, seconds = fake
    seconds |= dict.fromkeys(
        itertools.product(("ag_sononet8", "sononet8"), (AUTHORS, "eager"), ("fp32",)), 2.0
    )
    count = itertools.count()

    def fails():
        clock.now += 1
        if next(count) == 3:
            raise RuntimeError("out of memory")

    ready = measuring.prepare
    monkeypatch.setattr(
        measuring, "prepare", lambda case: (fails, 0.1) if case.role == "twin" else ready(case)
    )
    report = measure(["ag_sononet8"], engines=["eager"], rounds=3, clock=clock)
    faults = {(r.case.network, r.case.engine): r.fault for r in report.results}
    assert faults.pop(("sononet8", "eager")) == "out of memory"
    assert set(faults.values()) == {None}
    assert report.results[1].seconds == [2.0] * 3


def test_the_plain_twin_is_measured_with_each_network(monkeypatch):
    monkeypatch.setattr("regard.engines.bench.has_bf16", lambda device: False)
    assert twin_of("cbam_resnet50") == "plain_resnet50"
    assert twin_of("ag_sononet8") == "sononet8"
    assert twin_of("attention56") == "plain_attention56"
    assert twin_of("resnet50") == "plain_resnet50"  # the same weights, another start
    groups, _ = plan(["ag_sononet8"], engines=["eager"], train=True)
    assert [(c.network, c.role, c.engine) for c in groups[0]] == [
        ("ag_sononet8", "network", AUTHORS), ("ag_sononet8", "network", "eager"),
        ("sononet8", "twin", AUTHORS), ("sononet8", "twin", "eager"),
    ]  # fmt: skip
    assert {c.size for c in groups[0]} == {(1, 208, 272)}
    assert [(c.kind, c.engine) for c in groups[1]] == [
        ("train", AUTHORS), ("train", "eager"), ("train", "compiled")
    ]  # fmt: skip


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_is_measured_where_the_machine_computes_in_it(fast, monkeypatch):
    monkeypatch.setattr("regard.engines.bench.has_bf16", lambda device: fast)
    monkeypatch.setattr("regard.extras.find_spec", lambda name: True)
    prediction, training = plan(["attention56_cifar"], train=True)[0]
    found = {(c.engine, c.precision) for c in prediction}
    assert ("onnxruntime", "bf16") not in found
    assert (("openvino", "bf16") in found) == fast
    assert {c.engine for c in prediction if c.precision == "int8"} == {"openvino"}
    assert {c.precision for c in training[1:]} == ({"bf16"} if fast else {"fp32"})


def test_an_engine_that_is_not_installed_is_noted_once(monkeypatch):
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None if name == "onnx" else True)
    groups, notes = plan(["ag_sononet8", "sononet8"], batch_sizes=[1, 2])
    assert notes == ["onnxruntime: not installed (pip install 'regard[onnxruntime]')"]
    assert all(c.engine != "onnxruntime" for group in groups for c in group)


def test_peers_that_are_missing_are_noted(monkeypatch):
    monkeypatch.setattr("cases.find_spec", lambda name: None)
    found, notes = peers_of("cbam_resnet50")
    assert found == ["timm:resnet50+cbam"]
    assert notes == ["peers: pytorchcv is not installed"]
    found, notes = peers_of("ag_sononet8")
    assert found == []
    assert notes[1] == "peers: timm has no ag_sononet8"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"models": ["cbam_resnet5"]}, r"no network is called 'cbam_resnet5'; did you mean cbam"),
        ({"engines": ["tensorrt"]}, r"engine 'tensorrt': choose eager, compiled"),
        ({"models": ["ag_sononet8"], "size": (4, 4)}, r"size 4 4: ag_sononet8, made for 208 272"),
    ],
)  # fmt: skip
def test_wrong_choices(choices, message):
    with pytest.raises(UsageError, match=message):
        plan(**choices)


def test_rounds_are_pooled_and_what_failed_in_one_has_failed():
    def a_process(authors, eager, fault=None):
        results = [
            Result(a_case(AUTHORS), seconds=authors, startup=authors[0]),
            Result(a_case(), seconds=eager, startup=eager[0], peak=7),
            Result(a_case("openvino"), seconds=[1.0], fault=fault),
        ]
        compare(results)
        return results

    authors, eager, broken = pooled(
        [a_process([8.0], [4.0]), a_process([4.0, 6.0], [2.0, 3.0], "no")]
    )
    assert authors.seconds == [8.0, 4.0, 6.0]
    assert (eager.median, eager.startup, eager.peak) == (3.0, 4.0, 7)
    assert eager.times == 2.0
    assert broken.fault == "no"


# ------------------------------------------------------------------------ the cases
def test_the_cases_of_a_group_answer_the_same():
    """Whatever is timed, it is the same work: probabilities of the same images."""
    expected = prepare(a_case(AUTHORS, batch=2))[0]()
    assert expected.shape == (2, 14)
    assert expected.sum(dim=1) == pytest.approx([1.0, 1.0])
    assert expected.std(dim=0).max() > 1e-4  # the answer depends on the image
    for engine in ("eager", "onnxruntime"):
        if missing_engines([engine]):
            continue
        step, start = prepare(a_case(engine, batch=2))
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-5)
        assert start >= 0


def test_int8_is_near_the_network_and_not_the_network():
    expected = prepare(a_case(AUTHORS, batch=2))[0]()
    if missing("openvino"):
        pytest.skip("openvino and nncf are not installed")
    found = prepare(a_case("openvino", "int8", batch=2))[0]()
    assert 1e-6 < (found - expected).abs().max() < 0.05


def test_the_authors_way_runs_in_a_process_whose_memory_is_as_usual():
    second = SecondProcess()
    try:
        step, start = second.prepare(a_case(AUTHORS, batch=2))
        assert start > 0
        step()
        with pytest.raises(RuntimeError, match="no network is called 'ag_sononet9'"):
            second.prepare(a_case(AUTHORS, network="ag_sononet9"))
        step()  # and the first is still there
        (process,) = second._pool._processes.values()
        assert process.pid != os.getpid()
    finally:
        second.close()
    assert not process.is_alive()


def test_training_steps_of_all_ways_lower_the_same_loss():
    losses = {}
    for engine, precision in ((AUTHORS, "fp32"), ("eager", "fp32"), ("eager", "bf16")):
        step, _ = prepare(a_case(engine, precision, kind="train", batch=4))
        losses[engine, precision] = [step() for _ in range(3)]
    ours, theirs = losses["eager", "fp32"], losses[AUTHORS, "fp32"]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert losses["eager", "bf16"] == pytest.approx(theirs, rel=2e-2)
    assert theirs[2] < theirs[0]


def test_memory_is_measured_in_a_process_of_its_own():
    good, bad = measure_alone([a_case(batch=1), a_case("tensorrt")], rounds=1)
    assert good.fault is None
    assert 50e6 < good.running <= good.peak
    assert good.peak < 5e9
    assert len(good.seconds) == 1
    assert bad.fault == "'tensorrt'"


# ----------------------------------------------------------------------------- the tables
def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_csv(rows) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(f'"{v}"' for v in r.values()) for r in rows)])


def test_the_page_shows_measured_beside_target_and_marks_what_falls_short(tmp_path):
    def one(seconds, *what, **changes):
        return Result(a_case(*what, **changes), seconds=[seconds, seconds], startup=1.5)

    twin = {"network": "sononet8", "role": "twin"}
    rows = [
        one(0.6, AUTHORS), one(0.1, "openvino"), one(0.2, "eager"), one(0.01, "eager", batch=1),
        Result(a_case("compiled"), fault="no compiler"),
        one(0.5, AUTHORS, **twin), one(0.08, "openvino", **twin),
        one(0.9, AUTHORS, kind="train"), one(0.6, "compiled", "bf16", kind="train"),
        one(0.9, AUTHORS, of="attention56", network="attention56"),
        one(0.2, "openvino", "int8", of="attention56", network="attention56"),
    ]  # fmt: skip
    compare(rows)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "performance-x.csv").write_text(as_csv(as_rows(rows, MACHINE, "2026-01-02")))
    module = tables()
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    found = module.performance_page(page, folder, tmp_path)
    assert "**Test (R) CPU, 1 threads** (avx2); torch 9.9; 2026-01-02:" in found
    way = "times as fast as the authors' way"
    for line in (
        f"| `ag_sononet8` | prediction, {way} (openvino, fp32) | 6.00 | at least 5 | reached |",
        "| `ag_sononet8` | prediction, time over its plain twin's (openvino, fp32) | 1.25 "
        "| at most 1 | **falls short** |",
        f"| `ag_sononet8` | training step, {way} (compiled, bf16) | 1.50 | at least 1.8 "
        "| **falls short** |",
        f"| `attention56` | prediction, {way} | not measured | at least 3.4 | |",
        f"| `attention56` | prediction in INT8, {way} (openvino, int8) | 4.50 | at least 5 "
        "| **falls short** |",
        "| `ag_sononet8` | openvino | fp32 | 8 | 100.0 (100.0–100.0) | 80.0 | 6.00 | 1.25 | 1.5 "
        "|  |",
        "- ag_sononet8, compiled, fp32: no compiler",
        "| `ag_sononet8` | compiled, channels_last | bf16 | 8 | 600.0 (600.0–600.0) | 13.3 | 1.50 "
        "| 1.5 |  |",
    ):  # fmt: skip
        assert line in found, line
    # what is made once is not changed when it is made again, and nothing else is
    assert module.performance_page(found, folder, tmp_path) == found
    (folder / "performance-x.csv").unlink()
    empty = module.performance_page(found, folder, tmp_path)
    assert "Test (R) CPU" not in empty
    assert empty.count("Not measured yet.") == 6


def test_the_tables_of_scaling_and_streaming(tmp_path):
    module = tables()
    result = Result(a_case(), seconds=[0.4], peak=500_000_000)
    (row,) = as_rows([result], MACHINE, "2026-01-02")
    text = as_csv([{"which": "eager", "varies": "base", **row}])
    found = module.scaling_table({"x": text}, ["scaling-batch-x.svg"])
    assert "| `ag_sononet8` | eager, fp32 | 1x32x32 | 8 | 1 | 50.00 | 500 |" in found
    assert found.count("(images/scaling-") == 1
    freed = {
        "network": "cbam_resnet50", "kind": "train", "precision": "bf16", "batch": "32",
        "threads": "2", "usual_ms": "9.0", "kept_ms": "6.0", "times": "1.50",
        "usual_faults": "1234", "kept_faults": "5", "usual_peak_mb": "70", "kept_peak_mb": "80",
        "turns": "9", "date": "2026-01-02", "machine": "CPU", "torch": "9.9",
    }  # fmt: skip
    assert (
        "| `cbam_resnet50` | a training step, bf16 | 32 | 9.0 | 6.0 | 1.50 | 1,234 | 5 | 70 | 80 "
        "| CPU, 2 threads, torch 9.9, 2026-01-02 |"
    ) in module.freed_table([as_csv([freed])])
    names = (
        "network", "size", "engine", "threads", "images", "answered", "seconds", "peak_mb",
        "images_per_s", "decoding_per_s", "network_per_s", "date", "machine", "torch",
    )  # fmt: skip
    stream = as_csv([{name: "20000" if name == "images" else name for name in names}])
    assert "| `network` size | engine | 20,000 | seconds | peak_mb |" in module.stream_table(stream)
    assert module.stream_table("") == module.scaling_table({}, []) == module.NOTHING


def test_a_machines_name_in_file_names():
    assert slug(MACHINE) == "test-r-cpu-2-threads"
    assert slug({**MACHINE, "accelerator": "NVIDIA H100 80GB"}) == "nvidia-h100-80gb"
