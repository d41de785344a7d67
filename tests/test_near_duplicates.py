"""Near-duplicates: planted copies are found, similar images are not, and splits keep them apart."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from threadpoolctl import threadpool_info, threadpool_limits

from regard.cli import main
from regard.data import near_duplicates
from regard.data.audit import check_data
from regard.data.near_duplicates import (
    NearDuplicate,
    find_near_duplicates,
    grouped_by_content,
    keep_together,
    leak_line,
    read_thumbnails,
)
from regard.data.registration import agreement
from regard.data.similar import find_candidates
from regard.data.sources import open_data
from regard.data.splits import assign_splits
from regard.report.figures import measure
from regard.report.methods import methods_of
from regard.report.source import RunSource
from tests.helpers import run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from near_duplicates import KINDS, copy_of, score, table_of

SIDE = 120


def scene(seed: int) -> Image.Image:
    """A picture with coarse structure and detail, different for each seed."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(SIDE, SIDE))
    layers = [gaussian_filter(noise, s, mode="wrap") * s for s in (1.5, 4, 12)]
    values = np.clip(128 + 55 * sum(layers), 0, 255).astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def scan(seed: int) -> Image.Image:
    """Speckle in the sector of a scanner on black, with the scanner's texts: all alike but that."""
    rng = np.random.default_rng(seed)
    speckle = np.hypot(*(gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.5) for _ in range(2)))
    y, x = np.mgrid[:SIDE, :SIDE]
    depth = 0.6 + 0.4 * np.cos(y / 9 + seed % 3)  # layers that several patients share
    inside = (np.abs(np.arctan2(x - SIDE / 2, y + 20)) < 0.6) & (np.hypot(y + 20, x - 60) < 135)
    image = Image.fromarray((np.clip(speckle * depth * 250, 0, 200) * inside).astype(np.uint8))
    text = scene(0).convert("L").crop((0, 0, 30, 12)).point(lambda v: 255 * (v > 128))
    image.paste(text, (2, 2))
    image.paste(text, (88, 4))
    return image.convert("RGB")


@pytest.fixture(scope="module", params=[scene, scan])
def planted(request, tmp_path_factory):
    """40 pictures, and copies of four of them in each of the six kinds."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(1)
    paths, copies = [], []
    for i in range(40):
        paths.append(folder / f"{i}.png")
        request.param(i).save(paths[-1])
    for n, kind in enumerate(KINDS):
        for i in range(4 * n, 4 * n + 4):
            copies.append((i, kind, folder / f"{kind} {i}.img"))
            copies[-1][2].write_bytes(copy_of(request.param(i), kind, rng))
    table = table_of([*paths, *(path for _, _, path in copies)])
    return copies, find_near_duplicates(table, read_thumbnails(table))


def test_copies_of_every_kind_are_found_and_nothing_else_is(planted):
    copies, pairs = planted
    scores = score(40, copies, pairs)
    assert sum(recall for _, recall, _, _ in scores.values()) >= 5.7  # text may cover too much
    assert {precision for *_, precision in scores.values()} == {1.0}
    assert not [p for p in pairs if p.second < 40]
    mirrored = {k for k, (_, kind, _) in enumerate(copies) if kind == "mirrored"}
    assert {p.second - 40 for p in pairs if p.mirrored} == mirrored


def regard(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert not ended.value.code


def leaking(folder: Path) -> Path:
    """train and test of two classes; two leaks, one of them under another label."""
    for i in range(24):
        split, label = ("test" if i >= 16 else "train"), "ab"[i % 2]
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        scene(i).save(folder / split / label / f"{i}.png")
    for name, i, kind in (("test/a/crop.png", 0, "cropped"), ("test/a/jpeg.jpg", 1, "saved again"),
                          ("train/b/light.png", 3, "brightened")):  # fmt: skip
        (folder / name).write_bytes(copy_of(scene(i), kind, np.random.default_rng(i)))
    return folder


def test_pairs_are_listed_labels_first_then_splits(tmp_path, capsys):
    data = leaking(tmp_path / "a folder")
    regard("data", data, "--json")
    check = json.loads(capsys.readouterr().out)
    pairs = check["near_duplicates"]
    assert [
        ([Path(p).name for p in pair["paths"]], pair["reason"], pair["mirrored"]) for pair in pairs
    ] == [
        (["1.png", "jpeg.jpg"], "labels", False),
        (["0.png", "crop.png"], "splits", False),
        (["3.png", "light.png"], "copies", False),
    ]
    assert pairs[0]["labels"] == ["b", "a"]
    assert pairs[0]["splits"] == ["train", "test"]
    assert not check["leaks"]
    counted = [line for line in check["warnings"] if "near-duplicates" in line]
    assert [line.split()[0] for line in counted] == ["1", "2", "1"]
    regard("data", data)
    shown = capsys.readouterr().out
    assert shown.index("jpeg.jpg") < shown.index("crop.png") < shown.index("light.png")
    regard("data", data, "--no-near-duplicates", "--json")
    assert json.loads(capsys.readouterr().out)["near_duplicates"] == []


def test_a_leak_is_named_before_training(tmp_path):
    table = open_data(str(leaking(tmp_path)))
    line = leak_line(table)
    assert line is not None
    assert line.startswith("2 pairs")
    assert "jpeg.jpg (test)" in line
    clean = table.select([not table.path(i).endswith(("crop.png", "jpeg.jpg")) for i in range(27)])
    assert leak_line(clean) is None


@pytest.mark.report
def test_a_leak_is_in_the_card_and_the_report_of_the_run(tmp_path):
    said = run(
        "train", leaking(tmp_path / "data"), "--model", "ag_sononet8", "--size", "16", "--steps",
        "2", "--faithfulness-images", "0", "--log", "none", "--out", tmp_path / "run",
    )  # fmt: skip
    assert said.count("2 pairs of near-duplicates in different splits") == 1
    for name in ("README.md", "report.html", "run.json"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "2 pairs of near-duplicates in different splits" in text, name
    source = RunSource(tmp_path / "run")
    drafted = methods_of(source, measure(source, None, 0), source.command).text
    assert "Warning: 2 pairs of near-duplicates in different splits, such as" in drafted
    assert "keep_together" not in drafted


def test_near_duplicates_stay_in_one_split(tmp_path):
    for i in range(60):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        scene(i // 3).save(tmp_path / "ab"[i % 2] / f"{i}.jpg", quality=40 + 20 * (i % 3))
    table = open_data(str(tmp_path))
    pictures = np.array([int(Path(table.path(i)).stem) // 3 for i in range(60)])

    def divided(table):
        done = assign_splits(table, val=0.2, test=0.3, seed=0)
        return sum(len(set(done.splits[pictures == k])) > 1 for k in range(20))

    assert divided(table) > 10
    grouped = grouped_by_content(table)
    assert len(np.unique(grouped.groups)) == 20
    assert divided(grouped) == 0


def test_groups_are_joined_and_given_tests_stay(tmp_path):
    table = open_data(str(leaking(tmp_path)))
    pairs = [NearDuplicate(1, 0, 1, 1.0, False), NearDuplicate(1, 1, 20, 1.0, False)]
    groups = np.array([f"p{i // 2}" for i in range(27)])
    table = table.select(np.argsort(table.splits == "test", kind="stable"))
    named = keep_together(
        open_data(str(tmp_path)).__class__(**{**table.__dict__, "groups": groups}), pairs
    )
    assert named.groups is not None
    assert set(named.groups[:2]) == {"p0"}
    assert named.groups[20] == "p10"  # of the test: it can't be moved
    assert keep_together(table, []).groups is None


def test_flat_small_and_broken_images_are_in_no_pair(tmp_path):
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (64, 64), 3 * i).save(tmp_path / "ab"[i % 2] / f"black {i}.png")
        scene(7).resize((16 + i, 16)).save(tmp_path / "ab"[i % 2] / f"small {i}.png")
    (tmp_path / "a/broken.png").write_bytes(b"no image")
    check = check_data(open_data(str(tmp_path)))
    assert check.near_duplicates == []
    assert len(check.unreadable) == 1


def test_sixteen_bits_and_measurements_are_compared(tmp_path):
    gray = np.asarray(scene(5).convert("L"))
    for c in "ab":
        (tmp_path / c).mkdir()
    Image.fromarray(gray.astype(np.uint16) * 37 + 11).save(tmp_path / "a/16 bit.png")
    Image.fromarray(gray[4:, :112].astype(np.float32) * 3 - 50).save(tmp_path / "b/float.tif")
    scene(6).save(tmp_path / "b/other.png")
    [pair] = check_data(open_data(str(tmp_path))).near_duplicates
    assert [Path(p).name for p in pair["paths"]] == ["16 bit.png", "float.tif"]


def test_cells_of_a_clustering_find_what_all_pairs_do(monkeypatch):
    scenes = [scene(i).convert("L") for i in range(150)]
    crops = [image.crop((6, 4, 118, 120)) for image in scenes]
    images = np.stack([np.asarray(image.resize((32, 32))) for image in (*scenes, *crops)])
    monkeypatch.setattr("regard.data.similar._BRUTE", 100)
    found = find_candidates(images, np.arange(300))
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    own = [(i, i + 150) in pairs or (i + 150, i) in pairs for i in range(150)]
    assert np.mean(own) > 0.97
    assert len(pairs) < 8 * 300


def test_products_are_of_one_thread_whatever_the_machine_has(tmp_path, monkeypatch):
    """Several runs of 16 threads each on 16 cores made no step for minutes."""
    for i in range(4):
        scene(i).save(tmp_path / f"{i}.png")
    table = table_of(sorted(tmp_path.iterdir()))
    seen = []

    def threads():
        return {pool["num_threads"] for pool in threadpool_info()}

    def looked(*arguments):
        seen.append(threads())
        return find_candidates(*arguments)

    monkeypatch.setattr(near_duplicates, "find_candidates", looked)
    with threadpool_limits(3):
        find_near_duplicates(table, read_thumbnails(table))
        assert threads() == {3}
    assert seen == [{1}]


def test_the_same_answer_each_time(tmp_path):
    table = open_data(str(leaking(tmp_path)))
    first = check_data(table).near_duplicates
    assert first == check_data(table, workers=2).near_duplicates
    assert len(first) == 3


# ---- the page


def test_the_page_shows_classes_pairs_and_odd_ones(tmp_path, capsys):
    data = leaking(tmp_path / "data")
    Image.new("RGB", (64, 64), (2, 2, 2)).save(data / "train/a/black <b>\udcff.png")
    (data / "train/a/broken.png").write_bytes(b"no image")
    page = tmp_path / "page.html"
    regard("data", data, "--html", page)
    regard("data", data, "--html", page)  # its own page is replaced
    text = page.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg") > 40
    assert '"Segoe UI"' in text  # an escaped quote would end the style of the whole body
    assert "black &lt;b&gt;\\udcff.png" in text
    for part in ("different labels", "different splits", "Darkest", "Least contrast", "broken.png"):
        assert part in text
    assert "evenly spread" not in text  # no image was left out
    bars = re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)", text)
    assert f"highest bar: {max(map(int, bars))} images" in text
    odd = text[text.index("Least contrast") :]
    assert odd.index("black") < odd.index(".png")  # the emptiest is first


@pytest.mark.parametrize("name", ["a folder", "missing/page.html", "notes.txt"])
def test_a_page_replaces_nothing_else(tmp_path, name, capsys):
    data = leaking(tmp_path / "data")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["data", str(data), "--html", str(tmp_path / name)])
    assert ended.value.code == 2
    assert name in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_images_without_detail_agree_in_no_tile_and_warn_of_nothing():
    """As a warning's filter would be that of all threads: numpy must not have a reason for one."""
    flat = np.full((2, 64, 64), 0.5, np.float32)
    whole = np.tile(np.float32([1, 0, 1, 0]), (2, 1))  # scale and shift of x and y
    found = agreement(flat, flat, whole, sigma=2.0)
    for numbers in found[:6]:  # tiles, share and median, in the image and in its middle
        np.testing.assert_array_equal(numbers, np.zeros(2))
