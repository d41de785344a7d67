"""regard bench: the arithmetic of its figures, what competes, and what it writes; no real time."""

import csv
import importlib.util
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from regard.bench import AUTHORS, Contestant, Result, compare, measure_alone, plan, prepare
from regard.bench import run as bench_run
from regard.bench.alone import Elsewhere
from regard.bench.contestants import absent_packages, peers_of, twin_of
from regard.bench.results import append_csv, as_rows, pooled, slug
from regard.bench.run import run_bench
from regard.bench.timing import take_turns
from regard.cli import run_command

pytestmark = pytest.mark.native

ROOT = Path(__file__).parent.parent
MACHINE = {
    "processor": "Test (R) CPU", "extensions": ["avx2"], "threads": 2, "accelerator": None,
    "system": "Linux x86_64", "versions": {"torch": "9.9"},
}  # fmt: skip


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds):
        """A step that takes each of `seconds` in turn, the last for ever."""
        each = iter(seconds)
        last = 0.0

        def run():
            nonlocal last
            last = next(each, last)
            self.now += last

        return run


def contestant(engine="eager", precision="fp32", **changes) -> Contestant:
    what = {
        "kind": "predict", "of": "ag_sononet8", "network": "ag_sononet8", "role": "network",
        "engine": engine, "precision": precision, "batch": 8, "size": (1, 32, 32), "threads": 1,
    }  # fmt: skip
    return Contestant(**{**what, **changes})


@pytest.fixture
def fake(monkeypatch):
    """A clock, and contestants ready at once that take as long as a dictionary says."""
    clock, seconds = Clock(), {}

    def ready(c):
        found = seconds[c.network, c.engine, c.precision]
        if isinstance(found, Exception):
            raise found
        return clock.step([found]), 0.25

    monkeypatch.setattr(bench_run, "prepare", ready)
    monkeypatch.setattr(bench_run.Elsewhere, "prepare", lambda self, c: ready(c))
    monkeypatch.setattr(bench_run, "has_bf16", lambda device: False)
    return clock, seconds


# -------------------------------------------------------------------------------- timing
def test_turns_time_each_step_apart_and_tell_how_long_it_takes():
    clock, told = Clock(), []
    # twice before the first turn: that is not counted
    slow = clock.step([9.0, 2.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    steady = clock.step([0.5])
    found = take_turns([slow, steady], 5, clock=clock, echo=told.append)
    assert found == [([1.0, 3.0, 2.0, 5.0, 4.0], 1), ([0.5] * 5, 1)]
    assert told == ["5 turns of 2, about 12 s"]


def test_a_short_step_is_called_many_times_a_turn_after_one_untimed_call():
    clock = Clock()
    durations = [7.0, 0.03, *[5.0, 0.02, 0.03, 0.04, 0.03], *[6.0, 0.01, 0.01, 0.01, 0.05]]
    ((seconds, calls),) = take_turns([clock.step(durations)], 2, clock=clock)
    assert calls == 4
    assert seconds == pytest.approx([0.03, 0.02])


def test_turns_go_round_all_in_another_order_each_turn_and_the_same_in_each_run():
    def orders():
        clock, calls = Clock(), []

        def step(k):
            def run():
                calls.append(k)
                clock.now += 1

            return run

        take_turns([step(k) for k in range(4)], 6, clock=clock)
        turns = calls[8:]
        return [tuple(turns[k : k + 4]) for k in range(0, 24, 4)]

    found = orders()
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in found)
    assert len(set(found)) > 2
    assert orders() == found


def test_a_step_that_fails_in_a_turn_leaves_the_others():
    clock, count = Clock(), itertools.count()

    def fails():
        clock.now += 1
        if next(count) == 3:
            raise RuntimeError("out of memory")

    broken, good = take_turns([fails, clock.step([2.0])], 3, clock=clock)
    assert str(broken) == "out of memory"
    assert good == ([2.0] * 3, 1)
    (never,) = take_turns([lambda: 1 / 0], 3, clock=clock)
    assert isinstance(never, ZeroDivisionError)


# ------------------------------------------------------------------------------- figures
def test_median_quartiles_and_rate():
    r = Result(contestant(), seconds=[0.1, 0.5, 0.2, 0.4, 0.3], calls=1)
    assert r.median == 0.3
    assert r.quartiles == (0.2, 0.4)
    assert r.rate == pytest.approx(8 / 0.3)
    assert Result(contestant(), seconds=[0.1]).quartiles == (0.1, 0.1)


def test_ratios_are_to_the_authors_way_and_to_the_twin_of_the_same_engine_and_batch():
    def one(seconds, *what, **changes):
        return Result(contestant(*what, **changes), seconds=[seconds], calls=1)

    twin = {"network": "sononet8", "role": "twin"}
    rows = [
        one(6.0, AUTHORS), one(2.0, "eager"), one(1.0, "eager", "bf16"),
        one(99.0, AUTHORS, batch=1),
        one(4.0, AUTHORS, **twin), one(1.0, "eager", **twin), one(0.8, "eager", "bf16", **twin),
        one(3.0, AUTHORS, network="timm:x", role="peer"), one(7.0, "openvino", of="other"),
        Result(contestant("openvino"), fault="no"), one(1.0, "openvino", **twin),
    ]  # fmt: skip
    compare(rows)
    assert [r.times for r in rows] == pytest.approx(
        [1.0, 3.0, 6.0, 1.0, 1.0, 4.0, 5.0, 2.0, None, None, 4.0]
    )
    assert [r.to_twin for r in rows[:3]] == pytest.approx([1.5, 2.0, 1.25])
    assert all(r.to_twin is None for r in rows[3:])


def test_a_run_compares_tells_and_writes_what_it_measured(fake, tmp_path, capsys):
    clock, seconds = fake
    seconds |= {
        ("ag_sononet8", AUTHORS, "fp32"): 0.8, ("ag_sononet8", "eager", "fp32"): 0.2,
        ("ag_sononet8", "onnxruntime", "fp32"): RuntimeError("no such\noperator"),
        ("sononet8", AUTHORS, "fp32"): 0.6, ("sononet8", "eager", "fp32"): 0.25,
        ("sononet8", "onnxruntime", "fp32"): 0.1,
    }  # fmt: skip
    told = []
    report = run_bench(
        ["ag_sononet8"], engines=["eager", "onnxruntime"], turns=3, clock=clock, echo=told.append
    )
    assert "ag_sononet8, onnxruntime, fp32: no such operator" in told
    assert any("ag_sononet8, prediction, batch 8: 3 turns of 5, about" in line for line in told)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["told"] == ["ag_sononet8, onnxruntime, fp32: no such operator"]
    assert content["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    by_name = {(r["network"], r["engine"]): r for r in content["results"]}
    assert len(by_name) == 6
    best = by_name["ag_sononet8", "eager"]
    assert best["seconds"] == pytest.approx([0.2] * 3)
    assert (best["median_ms"], best["images_per_s"], best["times"]) == (200.0, 40.0, 4.0)
    assert (best["to_twin"], best["start_s"], best["turns"]) == (0.8, 0.25, 3)
    assert by_name["ag_sononet8", "onnxruntime"]["median_ms"] == ""
    assert by_name["ag_sononet8", "onnxruntime"]["fault"] == "no such operator"
    assert by_name["sononet8", "onnxruntime"]["times"] == 6.0

    path = tmp_path / "new/figures.csv"
    append_csv(path, report.rows())
    append_csv(path, report.rows())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {r["machine"] for r in rows} == {report.machine["processor"]}
    assert rows[1]["times"] == rows[7]["times"] == "4.0"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has other columns"):
        append_csv(tmp_path / "other.csv", report.rows())
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_the_command_prints_a_table_or_json(fake, tmp_path, capsys, monkeypatch):
    clock, seconds = fake
    monkeypatch.setattr(bench_run.run_bench, "__kwdefaults__",
                        {**bench_run.run_bench.__kwdefaults__, "clock": clock})  # fmt: skip
    seconds |= {
        (name, engine, "fp32"): s
        for name, s in (("ag_sononet8", 0.4), ("sononet8", 0.2))
        for engine, s in ((AUTHORS, s), ("eager", s / 4))
    }
    flags = ["bench", "ag_sononet8", "--engine", "eager", "--turns", "2", "--threads", "1"]
    path = tmp_path / "f.csv"
    assert run_command([*flags, "--csv", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "torch " in out.splitlines()[0]
    assert "random" in out
    (line,) = [ln for ln in out.splitlines() if ln.startswith("ag_sononet8 ") and "eager" in ln]
    assert line.split()[3:9] == ["100.0", "100.0", "-", "100.0", "80.0", "4.00"]
    assert line.split()[9] == "2.00"
    assert all(ln.startswith("regard: ") for ln in err.splitlines())
    assert len(path.read_text().splitlines()) == 5
    assert run_command([*flags, "--json", "--batch-size", "1", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [r["batch"] for r in content["results"]] == [1] * 4 + [2] * 4
    assert content["machine"]["threads"] == 1
    seconds |= dict.fromkeys(seconds, OSError("gone"))
    assert run_command(flags) == 1


# -------------------------------------------------------------------------- what competes
def test_the_plain_twin_is_beside_each_network():
    assert twin_of("cbam_resnet50") == "resnet50"
    assert twin_of("ag_sononet8") == "sononet8"
    assert twin_of("attention56") is None
    assert twin_of("resnet50") is None
    groups, _ = plan(["ag_sononet8"], engines=["eager"], precisions=["fp32"], train=True)
    assert [(c.network, c.role, c.engine) for c in groups[0]] == [
        ("ag_sononet8", "network", AUTHORS), ("ag_sononet8", "network", "eager"),
        ("sononet8", "twin", AUTHORS), ("sononet8", "twin", "eager"),
    ]  # fmt: skip
    assert {c.size for c in groups[0]} == {(1, 208, 272)}
    assert [(c.kind, c.engine) for c in groups[1]] == [
        ("train", AUTHORS), ("train", "eager"), ("train", "compiled")
    ]  # fmt: skip


def test_bf16_competes_where_the_machine_computes_in_it(monkeypatch):
    for fast in (False, True):
        monkeypatch.setattr(bench_run, "has_bf16", lambda device, fast=fast: fast)
        monkeypatch.setattr(bench_run, "absent_packages", lambda engine, precision="fp32": [])
        prediction, training = plan(["attention56_cifar"], train=True)[0]
        found = {(c.engine, c.precision) for c in prediction}
        assert ("onnxruntime", "bf16") not in found
        assert (("openvino", "bf16") in found) == fast
        assert [c.engine for c in prediction if c.precision == "int8"] == ["openvino"]
        assert {c.precision for c in training[1:]} == ({"bf16"} if fast else {"fp32"})


def test_an_engine_that_is_not_installed_is_told_once(monkeypatch):
    lacking = {"onnxruntime": ["onnx"]}
    monkeypatch.setattr(
        bench_run, "absent_packages", lambda engine, precision="fp32": lacking.get(engine, [])
    )
    groups, told = plan(["ag_sononet8", "sononet8"], batch_sizes=[1, 2])
    assert told == ["onnxruntime: needs onnx: pip install 'regard[onnxruntime]'"]
    assert all(c.engine != "onnxruntime" for group in groups for c in group)


def test_peers_that_are_not_there_are_told(monkeypatch):
    monkeypatch.setattr("regard.bench.contestants.find_spec", lambda name: None)
    found, told = peers_of("cbam_resnet50")
    assert found == ["timm:resnet50+cbam"]
    assert told == ["peers: pytorchcv is not installed"]
    found, told = peers_of("ag_sononet8")
    assert found == []
    assert told[1] == "peers: timm has no ag_sononet8"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"models": ["cbam_resnet5"]}, r"no network is called 'cbam_resnet5'; did you mean cbam"),
        ({"engines": ["tensorrt"]}, r"engine 'tensorrt': choose eager, compiled"),
        ({"precisions": ["fp16"]}, r"precision 'fp16': choose auto, fp32, bf16, int8"),
        ({"device": "tpu"}, r"device 'tpu': choose cpu, cuda"),
        ({"batch_sizes": [4, 0]}, r"batch size 4 0: at least 1"),
        ({"threads": 0}, r"threads 0: at least 1"),
        ({"models": ["ag_sononet8"], "size": (4, 4)}, r"size 4 4: ag_sononet8, made for 208 272"),
    ],
)  # fmt: skip
def test_wrong_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        plan(**choices)


def test_a_wrong_call_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("path,label\n")
    for flags, message in (
        (["ag_sononet9"], "did you mean ag_sononet"),
        (["--engine", "tensorrt"], "choose eager"),
        (["--turns", "0"], "turns 0: at least 1"),
        (["--csv", str(tmp_path / "mine.csv")], "has other columns"),
    ):
        assert run_command(["bench", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("regard: ")
        assert message in line


def test_rounds_are_pooled_and_what_failed_in_one_has_failed():
    def a_round(authors, eager, fault=None):
        results = [
            Result(contestant(AUTHORS), seconds=authors, start=authors[0], calls=3),
            Result(contestant(), seconds=eager, start=eager[0], peak=7),
            Result(contestant("openvino"), seconds=[1.0], fault=fault),
        ]
        compare(results)
        return results

    authors, eager, broken = pooled([a_round([8.0], [4.0]), a_round([4.0, 6.0], [2.0, 3.0], "no")])
    assert authors.seconds == [8.0, 4.0, 6.0]
    assert (eager.median, eager.start, eager.peak) == (3.0, 4.0, 7)
    assert eager.times == 2.0
    assert broken.fault == "no"


# ------------------------------------------------------------------------ the contestants
def test_the_contestants_of_a_group_answer_the_same():
    """Whatever is timed, it is the same work: probabilities of the same images."""
    expected = prepare(contestant(AUTHORS, batch=2))[0]()
    assert expected.shape == (2, 14)
    assert expected.sum(dim=1) == pytest.approx([1.0, 1.0])
    assert expected.std(dim=0).max() > 1e-4  # the answer depends on the image
    for engine in ("eager", "onnxruntime"):
        if absent_packages(engine):
            continue
        step, start = prepare(contestant(engine, batch=2))
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-5)
        assert start >= 0


def test_int8_is_near_the_network_and_not_the_network():
    expected = prepare(contestant(AUTHORS, batch=2))[0]()
    if absent_packages("openvino", "int8"):
        pytest.skip("openvino and nncf are not installed")
    found = prepare(contestant("openvino", "int8", batch=2))[0]()
    assert 1e-6 < (found - expected).abs().max() < 0.05


def test_the_authors_way_runs_in_a_process_whose_memory_is_as_usual():
    elsewhere = Elsewhere()
    try:
        step, start = elsewhere.prepare(contestant(AUTHORS, batch=2))
        assert start > 0
        step()
        with pytest.raises(RuntimeError, match="no network is called 'ag_sononet9'"):
            elsewhere.prepare(contestant(AUTHORS, network="ag_sononet9"))
        step()  # and the first is still there
        (process,) = elsewhere._pool._processes.values()
        assert process.pid != os.getpid()
    finally:
        elsewhere.close()
    assert not process.is_alive()


def test_training_steps_of_all_ways_lower_the_same_loss():
    losses = {}
    for engine, precision in ((AUTHORS, "fp32"), ("eager", "fp32"), ("eager", "bf16")):
        step, _ = prepare(contestant(engine, precision, kind="train", batch=4))
        losses[engine, precision] = [step() for _ in range(3)]
    ours, theirs = losses["eager", "fp32"], losses[AUTHORS, "fp32"]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert losses["eager", "bf16"] == pytest.approx(theirs, rel=2e-2)
    assert theirs[2] < theirs[0]


def test_a_real_run_of_two_engines():
    seconds = itertools.count()
    report = run_bench(
        ["ag_sononet8"], engines=["eager"], precisions=["fp32"], size=(32, 32), turns=2,
        batch_sizes=[2], clock=lambda: float(next(seconds)),
    )  # fmt: skip
    assert report.told == []
    assert [r.seconds for r in report.results] == [[1.0, 1.0]] * 4
    assert [r.times for r in report.results] == [1.0] * 4


def test_memory_is_measured_in_a_process_of_its_own():
    good, bad = measure_alone([contestant(batch=1), contestant("tensorrt")], turns=1)
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
        return Result(contestant(*what, **changes), seconds=[seconds, seconds], calls=1, start=1.5)

    twin = {"network": "sononet8", "role": "twin"}
    rows = [
        one(0.6, AUTHORS), one(0.1, "openvino"), one(0.2, "eager"), one(0.01, "eager", batch=1),
        Result(contestant("compiled"), fault="no compiler"),
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
    result = Result(contestant(), seconds=[0.4], calls=1, peak=500_000_000)
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
