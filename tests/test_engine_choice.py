"""Which engine is taken: measured once, and only where it pays for its start."""

import dataclasses
import json

import pytest

from regard.engines import ENGINES, open_engine, open_if_it_pays
from regard.engines import choose as choosing
from regard.engines.choose import Measurement, cheapest
from regard.predict import Classifier
from tests.helpers import run
from tests.test_engines import classifier, some_images

pytestmark = pytest.mark.native


def test_cheapest_counts_the_start_and_leaves_out_what_does_not_agree():
    rows = [
        Measurement("eager", "fp32", startup=0, batch=1.0),
        Measurement("compiled", "bf16", startup=60, batch=0.2),
        Measurement("openvino", "fp32", startup=5, batch=0.5),
        Measurement("openvino", "bf16", startup=5, batch=0.1, difference=0.06),
        Measurement("onnxruntime", "fp32", startup=0, batch=0.1, same_top1=False),
        Measurement("onnxruntime", "fp32", fault="not installed"),
    ]
    assert cheapest(rows, 32, 32) is rows[0]
    assert cheapest(rows, 32 * 20, 32) is rows[2]  # 20 s, 64 s, 15 s
    assert cheapest(rows, None, 32) is rows[1]


def small_classifier() -> Classifier:
    """Which ONNX Runtime opens in a third of the time of the smallest attention network."""
    return classifier("sononet8", convs=(1, 1, 1, 1, 1))


def measured_as(seconds, monkeypatch) -> list[int]:
    """Has `auto` measure engines by a table of seconds; returns the rounds of each measurement."""
    rounds: list[int] = []
    real = choosing.measure

    def measure(classifier, name, precision, sizes, probe, rounds_=choosing.ROUNDS, **given):
        rounds.append(given.get("rounds", rounds_))
        engine, found = real(classifier, name, precision, sizes, probe, rounds=0)
        batch = seconds.get(name, 1.0)
        return engine, dataclasses.replace(found, startup=0.0, batch=batch)

    monkeypatch.setattr(choosing, "measure", measure)
    return rounds


def test_auto_measures_once_and_caches(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "regard")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rounds = measured_as({"onnxruntime": 0.1}, monkeypatch)
    monkeypatch.setattr(choosing, "ENGINES", {k: ENGINES[k] for k in ("eager", "onnxruntime")})
    found = small_classifier()
    images = some_images("sononet8", 4)

    def choose() -> str:
        rounds.clear()
        return open_engine(found, "auto", sizes=(4,), images=images).name

    assert choose() == "onnxruntime"
    assert len([t for t in rounds if t]) == 2  # each was timed
    assert "10.0 times as fast as eager" in caplog.text
    assert choose() == "onnxruntime"
    assert [t for t in rounds if t] == []  # none was timed again
    cache = tmp_path / "regard/engines.json"
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["network"] == "sononet8"
    for damaged in ("{ damaged", "[1]"):
        cache.write_text(damaged)
        assert choose() == "onnxruntime"
        assert len([t for t in rounds if t]) == 2
        assert isinstance(json.loads(cache.read_text()), dict)


def test_auto_says_what_is_not_installed_and_takes_the_next_when_a_package_is_gone(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "regard")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured_as({"onnxruntime": 0.1}, monkeypatch)
    monkeypatch.setattr(choosing, "ENGINES", {k: ENGINES[k] for k in ("eager", "onnxruntime")})
    found = small_classifier()
    assert open_engine(found, "auto", sizes=(2,)).name == "onnxruntime"
    caplog.clear()
    monkeypatch.setattr("regard.extras.find_spec", lambda name: None)
    assert open_engine(found, "auto", sizes=(2,)).name == "eager"  # though the cache says otherwise
    (line,) = [r.message for r in caplog.records if "not installed" in r.message]
    assert "pip install 'regard[onnxruntime]'" in line


def test_a_faster_engine_is_the_default_only_of_a_long_job(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "regard")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {"onnxruntime": 0.95}
    rounds = measured_as(seconds, monkeypatch)
    monkeypatch.setattr(choosing, "ENGINES", {k: ENGINES[k] for k in ("eager", "onnxruntime")})
    monkeypatch.setattr(choosing, "_seconds_an_image", lambda *_: 0.1)
    found = small_classifier()

    def choose(count):
        rounds.clear()
        engine = open_if_it_pays(found, sizes=(4,), count=count)
        return None if engine is None else engine.name, len([t for t in rounds if t])

    assert choose(1799) == (None, 0)  # 179.9 s
    assert choose(None) == (None, 0)  # a server has measured nothing
    assert choose(1801) == (None, 2)  # not a tenth faster
    assert choose(1801) == (None, 0)  # cached
    (tmp_path / "regard/engines.json").unlink()
    seconds["onnxruntime"] = 0.5
    assert choose(1801) == ("onnxruntime", 2)
    assert "2.0 times as fast as eager" in caplog.text
    assert "of eager fp32" in caplog.text
    assert choose(None) == ("onnxruntime", 0)  # a server takes what is known
    monkeypatch.setitem(choosing.TOLERANCES, "fp32", -1.0)
    assert choose(None) == (None, 0)  # the network's own answers are not finite


def test_the_commands_take_an_engine(whole, scans):
    images = [scans / "0/00.png", scans / "1/01.png"]
    plain, other = (
        [json.loads(line) for line in run("predict", whole, *images, "--json", *more).splitlines()
         if line.startswith("{")]
        for more in ([], ["--engine", "onnxruntime"])
    )  # fmt: skip
    for a, b in zip(plain, other, strict=True):
        shares = [{c["class"]: c["probability"] for c in row["classes"]} for row in (a, b)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    share = run("predict", whole, *images, "--shard", "2/2", "--engine", "onnxruntime", "--json")
    assert [json.loads(line)["path"] for line in share.splitlines() if line[0] == "{"] == [
        str(images[1])
    ]
    assert "within" in run("evaluate", whole, "--engine", "openvino", "--precision", "fp32")
    for command in (["predict", whole, images[0]], ["evaluate", whole], ["serve", whole]):
        assert "openvino" in run(*command, "--engine", "warp", code=2)
        assert "bf16" in run(*command, "--precision", "fp8", code=2)
