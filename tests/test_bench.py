"""regard bench: how rounds are timed, what is measured, and what it prints; no real time."""

import json

import pytest

from regard.cli import run_command
from regard.engines import bench
from regard.engines.bench import installed, time_in_rounds
from regard.errors import UsageError
from tests.helpers import Clock

pytestmark = pytest.mark.native


def test_rounds_time_each_step_apart():
    clock = Clock()
    # called twice before the first round, which is not counted
    slow = clock.step([9.0, 2.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    steady = clock.step([0.5])
    assert time_in_rounds([slow, steady], 5, clock) == [[1.0, 3.0, 2.0, 5.0, 4.0], [0.5] * 5]


def test_a_short_step_is_called_many_times_in_a_round_after_one_untimed_call():
    clock = Clock()
    durations = [7.0, 0.03, *[5.0, 0.02, 0.03, 0.04, 0.03], *[6.0, 0.01, 0.01, 0.01, 0.05]]
    (seconds,) = time_in_rounds([clock.step(durations)], 2, clock)
    assert seconds == pytest.approx([0.03, 0.02])


def test_each_round_has_another_order_and_each_run_the_same():
    def orders():
        clock, calls = Clock(), []

        def step(k):
            def run():
                calls.append(k)
                clock.now += 1

            return run

        time_in_rounds([step(k) for k in range(4)], 6, clock)
        return [tuple(calls[8:][k : k + 4]) for k in range(0, 24, 4)]

    found = orders()
    assert all(sorted(each) == [0, 1, 2, 3] for each in found)
    assert len(set(found)) > 2
    assert orders() == found


def test_quartiles():
    t = bench.Timing("eager", "fp32", [0.1, 0.5, 0.2, 0.4, 0.3])
    assert t.quartiles == pytest.approx([0.2, 0.3, 0.4])
    assert bench.Timing("eager", "fp32", [0.1]).quartiles == [0.1] * 3


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_measured_is_what_is_installed_and_the_machine_computes_in(fast, monkeypatch):
    monkeypatch.setattr(bench, "has_bf16", lambda device: fast)
    monkeypatch.setattr("regard.extras.find_spec", lambda name: True)
    engines = ["eager", "onnxruntime", "openvino"]
    floats = ["fp32", "bf16"] if fast else ["fp32"]
    assert installed(engines, ["auto"]) == [
        *(("eager", p) for p in floats),
        ("onnxruntime", "fp32"),
        *(("openvino", p) for p in floats),
        ("openvino", "int8"),
    ]
    if not fast:
        with pytest.raises(UsageError, match="bf16"):
            installed(engines, ["bf16"])
    with pytest.raises(UsageError, match="none of onnxruntime computes in int8"):
        installed(["onnxruntime"], ["int8"])
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None if name == "nncf" else True)
    assert ("openvino", "int8") not in installed(engines, ["auto"])
    with pytest.raises(UsageError, match=r"nncf: pip install 'regard\[openvino\]'"):
        installed(engines, ["int8"])


FLAGS = ["bench", "ag_sononet8", "--size", "32", "32", "--rounds", "2", "--precision", "fp32"]


def test_the_command_prints_a_table_or_json(capsys, monkeypatch):
    times = iter([[0.4, 0.4], [0.1, 0.1]] * 3)
    monkeypatch.setattr(bench, "time_in_rounds", lambda steps, *_: [next(times) for _ in steps])
    assert run_command([*FLAGS, "--engine", "eager", "onnxruntime"]) == 0
    out, err = capsys.readouterr()
    assert "torch " in out.splitlines()[0]
    first, second = out.splitlines()[-2:]  # the fastest first
    assert first.split()[:6] == ["onnxruntime", "fp32", "100.0", "100.0-100.0", "80.0", "4.00"]
    assert second.split()[:6] == ["eager", "fp32", "400.0", "400.0-400.0", "20.0", "1.00"]
    assert "onnxruntime, fp32: ready in" in err
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None)
    more = ["--engine", "eager", "openvino", "--json", "--batch-size", "1", "2"]
    assert run_command([*FLAGS, *more]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert [r["batch"] for r in content["results"]] == [1, 2]
    assert [e["engine"] for r in content["results"] for e in r["engines"]] == ["eager"] * 2
    (line,) = [ln for ln in err.splitlines() if "not installed" in ln]
    assert "pip install 'regard[openvino]'" in line


def fails_at_once(*_):
    raise RuntimeError("no such\noperator")


def fails_in_the_first_round(*_):
    answers = iter([None] * 2)
    return lambda images: next(answers)


@pytest.mark.parametrize(
    ("made", "fault"),
    [(fails_at_once, "no such operator"), (fails_in_the_first_round, "StopIteration")],
)
def test_an_engine_that_fails_is_one_line_and_the_others_go_on(capsys, monkeypatch, made, fault):
    monkeypatch.setitem(bench.ENGINES, "compiled", made)
    made.precisions, made.needs = ("fp32",), ()
    assert run_command([*FLAGS, "--engine", "eager", "compiled"]) == 1
    out, err = capsys.readouterr()
    assert f"regard: compiled, fp32: {fault}" in err.splitlines()
    assert [ln.split()[0] for ln in out.splitlines()[-2:]] == ["engine", "eager"]
    assert run_command([*FLAGS, "--engine", "compiled"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ag_sononet9"], "did you mean ag_sononet"),
        (["--threads", "100000000"], "--threads 100000000: at most 1024"),
        (["--engine", "tensorrt"], "openvino"),
        (["--precision", "fp8"], "int8"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--batch-size", "4", "0"], "--batch-size 4 0: at least 1"),
        (["ag_sononet8", "--size", "4"], "made for 208 272"),
        (["--size", "32", "32", "3"], "Must be >= 4"),
        (["--size", "32", "32", "32"], "--size 32 32 32: give one number, or height and width"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_call_is_one_line(flags, message, capsys):
    assert run_command(["bench", *flags]) == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("regard: ")]
    assert message in line
