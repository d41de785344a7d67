"""The scores say the right thing where the right thing is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.attention import own_maps
from regard.evaluation.intervals import bootstrapped_mean, wilson_interval
from regard.explanations import faithfulness
from regard.explanations.curves_figure import curves_figure
from regard.explanations.deletion import (
    CENTER,
    RANDOM,
    area,
    baseline_of,
    curves,
    measure,
    random_maps,
    ranks_of,
    summarize,
)
from regard.explanations.faithfulness import Scorer, interval, judge
from regard.explanations.pointing import PointingScore, point
from regard.explanations.sanity import correlation_between, randomized, rank_correlation


class Map(nn.Module):
    """(B, 1, 32, 32) -> (B, 1, 8, 8): a softmax over the brightness of 4x4 patches."""

    attention_kind = "spatial"

    def forward(self, x):
        pooled = F.avg_pool2d(x, 4)
        return torch.softmax(8 * pooled.flatten(1), dim=1).view(pooled.shape)


class Noise(nn.Module):
    """Maps that depend on nothing that matters: other noise for each image."""

    attention_kind = "spatial"

    def forward(self, x):
        return torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(7))


class Patch(nn.Module):
    """Class 1 if some 4x4 patch is bright. Its answer comes through the map, or passes it by."""

    def __init__(self, attention: nn.Module, *, uses: bool):
        super().__init__()
        self.attention, self.uses = attention, uses
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        pooled = F.avg_pool2d(x, 4)
        attention = self.attention(x)
        seen = (attention * pooled).sum(dim=(1, 2, 3)) if self.uses else pooled.amax(dim=(1, 2, 3))
        bright = self.scale * (seen - 1.5)
        return torch.stack([-bright, bright], dim=1)


@pytest.fixture(scope="module")
def images():
    """24 of dim noise with one bright 4x4 patch, never in the middle; and where it is."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 0.2, (24, 1, 32, 32))).float()
    places = []
    for i in range(24):
        row, column = (4 * int(rng.choice([0, 1, 6, 7])) for _ in range(2))
        x[i, :, row : row + 4, column : column + 4] = 3.0
        places.append((row, column))
    return x, places


def predictor(model):
    return lambda x: model(x).softmax(dim=1)


def score(predict, x, maps, **settings):
    measured = measure(predict, x, maps, predict(x).argmax(dim=1), **settings)
    return summarize(measured, settings.get("seed", 0))


@torch.no_grad()
def test_a_map_that_the_answer_comes_through_scores_high(images):
    x, places = images
    model = Patch(Map(), uses=True).eval()
    assert (model(x).argmax(dim=1) == 1).all()
    maps = own_maps(model, x)
    scores = score(predictor(model), x, maps)
    found = scores["attention"]
    assert found.over_random.low > 0.5
    assert found.over_center.low > 0.5
    assert found.deletion.value < 0.1
    assert found.insertion.value > 0.9
    assert "shows places that the answer depends on" in found.verdict()
    for values, (row, column) in zip(maps["attention"], places, strict=True):
        assert int(values.argmax()) == row // 4 * 8 + column // 4


@torch.no_grad()
def test_a_map_that_the_answer_ignores_scores_like_random(images):
    x, _ = images
    model = Patch(Noise(), uses=False).eval()
    assert (model(x).argmax(dim=1) == 1).all()
    found = score(predictor(model), x, own_maps(model, x), repeats=8)["attention"]
    assert found.over_random.low < 0 < found.over_random.high
    assert "can't be told from random maps" in found.verdict()


@torch.no_grad()
def test_a_map_that_points_away_is_worse_than_random(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    away = {"away": -own_maps(model, x)["attention"]}
    found = score(predictor(model), x, away)["away"]
    assert found.over_random.high < 0
    assert "worse than random" in found.verdict()


@torch.no_grad()
def test_curves_begin_and_end_where_they_must(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    target = torch.ones(24, dtype=torch.long)
    base = baseline_of(x)
    maps = own_maps(model, x)["attention"]
    deletion, insertion = curves(
        predictor(model), x, maps, target, baseline=base, steps=16, batch_size=7
    )
    whole, none = (predictor(model)(v)[:, 1].numpy() for v in (x, base))
    assert deletion.shape == insertion.shape == (24, 17)
    np.testing.assert_allclose(deletion[:, 0], whole, atol=1e-6)
    np.testing.assert_allclose(deletion[:, -1], none, atol=1e-6)
    np.testing.assert_allclose(insertion[:, 0], none, atol=1e-6)
    np.testing.assert_allclose(insertion[:, -1], whole, atol=1e-6)
    # after the first of 16 steps, 64 pixels, the patch of 16 is gone, or there
    assert deletion[:, 1].max() < 0.01
    assert insertion[:, 1].min() > 0.99
    one_by_one = curves(predictor(model), x, maps, target, baseline=base, steps=16, batch_size=64)
    np.testing.assert_allclose(one_by_one[0], deletion, atol=1e-6)


def test_area_is_that_of_trapezoids():
    assert area(np.array([[1.0, 0.0], [1.0, 1.0]])).tolist() == [0.5, 1.0]
    curve = np.random.default_rng(0).random((3, 21))
    np.testing.assert_allclose(area(curve), np.trapezoid(curve, dx=1 / 20, axis=1))


def test_ranks_follow_the_map_and_break_ties_at_random():
    maps = torch.arange(16.0).view(1, 4, 4)
    assert ranks_of(maps, (4, 4)).flatten().tolist() == list(range(15, -1, -1))
    flat = [ranks_of(torch.ones(1, 4, 4), (16, 16), seed).flatten() for seed in (0, 1)]
    assert sorted(flat[0].tolist()) == list(range(256))
    assert not torch.equal(*flat)
    assert abs(np.corrcoef(flat[0], np.arange(256))[0, 1]) < 0.2


def test_scores_are_the_same_each_time_and_name_their_controls(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    with torch.no_grad():
        a, b = (score(predictor(model), x[:6], own_maps(model, x[:6]), seed=3) for _ in range(2))
    assert list(a) == ["attention", RANDOM, CENTER]
    for name in a:
        assert a[name].difference == b[name].difference
        np.testing.assert_array_equal(a[name].each, b[name].each)
    for bad, message in (
        ({}, "at least one"), ({"m": torch.zeros(5, 2, 2)}, r"\(5, 2, 2\): must be \(6, h, w\)"),
        ({"m": torch.full((6, 2, 2), torch.nan)}, "not finite"),
        ({RANDOM: torch.zeros(6, 2, 2)}, "control"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            score(predictor(model), x[:6], bad)
    with pytest.raises(ValueError, match="choose one of blur, mean"):
        baseline_of(x, "zero")


def test_the_center_is_the_center_also_for_maps_of_few_cells():
    """Of a blob in 2x2 cells all pixels would be equal: the control would be a random order."""
    x = torch.zeros(1, 1, 64, 64)
    x[..., 24:40, 24:40] = 1.0  # 256 of 4,096 pixels

    def predict(images):
        there = images[:, 0, 24:40, 24:40].mean(dim=(1, 2))
        return torch.stack([there, 1 - there], dim=1)

    target = torch.zeros(1, dtype=torch.long)
    for cells in (1, 2, 7):
        maps = {"m": torch.zeros(1, cells, cells)}
        deletion, insertion = measure(predict, x, maps, target, baseline="mean")[CENTER]
        # after 2 of 20 steps, 410 pixels, all of the center is gone or there; the mean is 1 / 16
        np.testing.assert_allclose(deletion[0, 2:], 1 / 16, atol=1e-6)
        np.testing.assert_allclose(insertion[0, 2:], 1.0, atol=1e-6)


def test_the_blurred_baseline_has_no_detail_left(images):
    x, _ = images
    blurred = baseline_of(x)
    assert blurred.amax() < 0.3 * x.amax()  # the patch, spread wide
    assert blurred.mean() == pytest.approx(float(x.mean()), abs=0.02)
    assert baseline_of(x, "mean").std(dim=(2, 3)).max() == 0


# ---------------------------------------------------------------------------- sanity
class Learnt(nn.Module):
    """A map by a convolution, which random weights change."""

    attention_kind = "spatial"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 5, 4, 2)

    def forward(self, x):
        return self.conv(x)


def sanity(model, x):
    (check,) = judge(model, x, methods=["attention"], steps=2, repeats=1, seed=3).checks
    return check


def test_the_sanity_check_tells_what_was_learned_from_what_was_not(images):
    x, _ = images
    torch.manual_seed(5)  # not the check's own
    for attention, unchanged in ((Learnt(), 0.0), (Map(), 1.0)):
        model = Patch(attention, uses=False).eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        check = sanity(model, x[:8])
        assert check.unchanged == unchanged
        assert check.passed == (unchanged == 0.0)
        assert f"{unchanged:.0%} of the maps" in check.verdict()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Position(nn.Module):
    """A map of weights alone: another one for random weights, the same for every image."""

    attention_kind = "spatial"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 1, 4, 4))

    def forward(self, x):
        return self.weight + 1e-4 * x.mean(dim=(1, 2, 3), keepdim=True)


def test_maps_that_are_the_same_for_every_image_do_not_pass(images):
    x, _ = images
    torch.manual_seed(5)
    check = sanity(Patch(Position(), uses=False).eval(), x[:8])
    assert check.unchanged == 0.0  # what the check with random weights alone would let through
    assert check.between > 0.99
    assert not check.passed
    assert "nearly the same for every image" in check.verdict()
    assert "16 cells (4×4)" in check.verdict()
    learned = sanity(Patch(Learnt(), uses=False).eval(), x[:8])
    assert learned.between < 0.5
    assert learned.passed
    assert "cells" not in learned.verdict()
    # one image says nothing about it
    alone = sanity(Patch(Learnt(), uses=False).eval(), x[:1])
    assert alone.between is None


def test_correlation_between_images_is_the_mean_over_pairs():
    from scipy.stats import spearmanr

    maps = random_maps((4, 5, 6), 0) + torch.linspace(0, 2, 30).view(5, 6)
    pairs = [
        spearmanr(maps[i].flatten(), maps[j].flatten()).statistic
        for i in range(4)
        for j in range(i)
    ]
    assert correlation_between(maps) == pytest.approx(np.mean(pairs), abs=1e-9)
    assert correlation_between(torch.ones(3, 2, 2)) == 1.0
    assert correlation_between(maps[:1]) is None


def test_random_weights_are_another_network_and_the_seed_decides():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model[1].running_mean += 3
    one, same, other = (randomized(model, seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, model[0].weight)
    assert (randomized(model, 0)[1].running_mean == 0).all()


def test_rank_correlation_against_scipy():
    from scipy.stats import spearmanr

    a, b = random_maps((5, 6, 7), 0), random_maps((5, 6, 7), 1) + random_maps((5, 6, 7), 0)
    expected = [spearmanr(p.flatten(), q.flatten()).statistic for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-9)
    flat = torch.ones(5, 6, 7)
    assert rank_correlation(a, flat).tolist() == [0.0] * 5
    assert rank_correlation(flat, flat).tolist() == [1.0] * 5


def test_judging_scores_each_image_on_its_own(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    found = judge(model, x, methods=["attention"], steps=8, repeats=2)
    assert found.images == 24
    assert found.scores["attention"].over_random.low > 0.5
    assert found.checks[0].unchanged == 1.0  # its map has no weights
    assert found.warnings == []
    # an image's scores depend on no other image and not on its position
    alone = judge(model, x[5:6], methods=["attention"], steps=8, repeats=2)
    for name, score in alone.scores.items():
        np.testing.assert_array_equal(score.curves[:, 0], found.scores[name].curves[:, 5])


def test_curves_have_the_probabilities_of_the_stored_temperature(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    how = {"methods": ["attention"], "steps": 4, "repeats": 1}
    found = judge(model, x[:2], temperature=20.0, **how)
    with torch.no_grad():
        logits = model(x[:2])
    expected = (logits / 20).softmax(dim=1).amax(dim=1)
    start, end = (found.scores["attention"].curves[k, :, at] for k, at in ((0, 0), (1, -1)))
    np.testing.assert_allclose(start, expected, rtol=1e-5)
    np.testing.assert_allclose(end, expected, rtol=1e-5)
    assert float(expected.max()) < 0.9 < float(logits.softmax(dim=1).amax())
    assert found.to_dict()["temperature"] == 20.0
    assert judge(model, x[:2], **how).to_dict()["temperature"] == 1.0


def test_intervals_of_few_images_contain_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = bootstrapped_mean(rng.normal(size=8), resamples=500)
        covered += found.low <= 0 <= found.high
    assert 368 <= covered <= 388  # plain percentiles: 348


def test_images_of_the_same_patients_widen_every_interval(images):
    x, _ = images
    model = Patch(Map(), uses=True).eval()
    how = {"methods": ["attention"], "steps": 8, "repeats": 2}
    alone = judge(model, x, **how)
    scorer = Scorer(model, **how)
    each = [scorer.score(x[i : i + 1]) for i in range(len(x))]
    copies = [score for score in each for _ in range(4)]
    patients = [f"p{i:02}" for i in range(len(x)) for _ in range(4)]
    counted, grouped = (
        faithfulness.summarize(copies),
        faithfulness.summarize(copies, groups=patients),
    )
    for name, own in grouped.scores.items():
        for part in ("deletion", "insertion", "difference"):
            found, said = getattr(own, part), getattr(alone.scores[name], part)
            assert found.value == pytest.approx(said.value)
            assert (found.low, found.high) == pytest.approx((said.low, said.high))
            many = getattr(counted.scores[name], part)
            if name != CENTER:
                assert many.high - many.low < 0.7 * (found.high - found.low)
    assert (alone.over, grouped.over) == ("images", f"{len(x)} groups")
    assert grouped.to_dict()["groups"] == len(x)
    areas = []  # of the shaded intervals in the figure
    for found in (counted, grouped):
        (shaded, *_) = curves_figure(found.scores).axes[0].collections
        x, y = shaded.get_paths()[0].vertices.T
        areas.append(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)
    assert areas[1] > 1.3 * areas[0]
    one = faithfulness.summarize(each, groups=["p"] * len(each))
    assert one.over == ""
    assert all(np.isnan(s.deletion.low) for s in one.scores.values())
    assert any("images of one group" in line for line in one.sentences())


@pytest.mark.parametrize("width", [7.16, 3.3])
def test_a_legend_of_many_curves_hides_none_and_names_the_bands(width):
    curves = np.random.default_rng(0).random((2, 6, 5))
    names = ["layer1", "layer2", RANDOM, CENTER]
    few, many = (
        curves_figure(summarize(dict.fromkeys(some, curves), 0), width=width)
        for some in (names[:1] + names[2:], names)
    )
    many.draw_without_rendering()
    (legend,) = many.legends
    top = legend.get_window_extent().y1
    assert all(axes.get_legend() is None for axes in many.axes)
    assert all(axes.get_tightbbox().y0 >= top for axes in many.axes)
    for found in (legend, few.axes[1].get_legend()):
        assert found.get_texts()[-1].get_text() == "95 % interval"


def test_one_image_has_no_interval_and_no_conclusion(images):
    x, _ = images
    found = judge(Patch(Map(), uses=True).eval(), x[:1], methods=["attention"], steps=8)
    text = interval(found.scores["attention"].deletion)
    assert float(text) == pytest.approx(found.scores["attention"].deletion.value, abs=1e-3)
    for sentence in (*found.sentences(), text):
        assert "nan" not in sentence
    assert "one image" in found.scores["attention"].verdict()
    assert found.scores["attention"].deletion.to_dict()["low"] is None


def test_a_baseline_that_keeps_the_class_is_a_warning(images):
    x, _ = images
    model = Patch(Noise(), uses=False).eval()
    with torch.no_grad():
        model.scale.fill_(0.0)  # every image has 0.5 of each class
    assert judge(model, x[:2], methods=["attention"], steps=2, repeats=1).warnings == []
    with torch.no_grad():
        model.scale.fill_(-10.0)
    dark = torch.zeros(2, 1, 32, 32)
    (warning,) = judge(model, dark, methods=["attention"], steps=2, repeats=1).warnings
    assert "blur" in warning


# ---------------------------------------------------------------------------- pointing
def test_pointing_and_energy():
    attention = np.zeros((4, 4))
    attention[0, 3] = 3.0
    attention[3, 0] = 1.0
    mask = np.zeros((40, 40), dtype=bool)
    mask[:20, 20:] = True
    found = point(attention, mask)
    assert found.hit
    assert found.chance == 0.25
    assert found.energy == pytest.approx(0.75, abs=0.02)
    assert not point(attention.T[::-1, ::-1].T, mask).hit
    with pytest.raises(ValueError, match="marks nothing"):
        point(attention, np.zeros((40, 40), dtype=bool))


def test_a_uniform_map_has_the_energy_of_chance_also_of_a_part_of_the_image():
    mask = np.zeros((40, 100), dtype=bool)
    mask[10:30, 40:60] = True  # 10 % of the image, a quarter of its square center
    found = point(np.ones((7, 7)), mask, box=(30, 0, 70, 40))
    assert found.energy == pytest.approx(0.25)
    assert found.chance == pytest.approx(0.25)
    assert found.in_view == 1.0


def test_a_map_of_zeros_points_nowhere_and_negative_values_hold_no_energy():
    mask = np.zeros((40, 100), dtype=bool)
    mask[:, :60] = True
    found = point(np.zeros((7, 7)), mask)  # Grad-CAM of a class that nothing speaks for
    assert (found.hit, found.energy, found.iou, found.dice) == (False, 0.0, 0.0, 0.0)
    assert found.map_box == (0, 0, 0, 0)
    assert (found.chance, found.in_view) == (0.6, 1.0)
    signed = np.array([[4.0, -3.9], [4.0, -3.9]]).repeat(20, 0).repeat(50, 1)
    assert point(signed, mask).energy == 1.0  # the sum is 40 times smaller than its part inside
    assert point(-signed, mask).energy == 0.2


def test_what_is_marked_outside_of_what_the_network_saw_is_no_miss():
    mask = np.zeros((40, 100), dtype=bool)
    mask[10:30, 20:40] = True
    found = point(np.ones((7, 7)), mask, box=(30, 0, 70, 40))
    assert found.in_view == 0.5
    assert found.iou == 0.125  # 200 of the 1,600 pixels that it saw
    assert found.dice == pytest.approx(2 * 200 / (1600 + 200))
    with pytest.raises(ValueError, match="outside what the network saw"):
        point(np.ones((7, 7)), mask, box=(40, 0, 80, 40))


def test_pointing_scores_have_intervals_over_images():
    attention, mask = np.zeros((4, 4)), np.zeros((40, 40), dtype=bool)
    attention[0, 3] = 1.0
    mask[:20, 20:] = True
    hit, miss = point(attention, mask), point(attention[::-1], mask)
    score = PointingScore.of([hit] * 15 + [miss] * 5)
    assert score.hits.value == 0.75
    assert 0.5 < score.hits.low < 0.75 < score.hits.high < 1
    assert score.chance == 0.25
    assert np.isnan(PointingScore.of([hit]).hits.low)


def test_overlap_and_box_are_of_the_map_above_half_of_its_range():
    attention = np.full((4, 4), 0.1)
    attention[0, 2:] = 1.0
    mask = np.zeros((40, 40), dtype=bool)
    mask[:10, 20:] = True
    # 16 cells are drawn as pixels of their own only when asked for: bilinear, half at the border
    found = point(attention, mask)
    left, top, right, bottom = found.map_box
    assert (top, right) == (0, 40)
    assert abs(left - 20) <= 1
    assert abs(bottom - 10) <= 1
    assert found.mask_box == (20, 0, 40, 10)
    assert found.iou > 0.85
    assert found.dice == pytest.approx(2 * found.iou / (1 + found.iou))
    other = point(attention[::-1], mask)
    assert other.iou == other.dice == 0.0
    # only what the network saw can be marked
    part = point(np.ones((2, 2)), mask, box=(0, 0, 30, 40))
    assert part.map_box == (0, 0, 30, 40)


def test_hits_have_wilsons_interval_and_groups_widen_every_interval():
    rng = np.random.default_rng(0)
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4] = True
    each = [point(rng.random((8, 8)) + np.eye(8)[0, 0], mask) for _ in range(40)]
    plain = PointingScore.of(each)
    hits = sum(p.hit for p in each)
    low, high = wilson_interval(hits, 40)
    assert (plain.hits.low, plain.hits.high) == pytest.approx((low, high))
    assert plain.groups is None
    copies = [p for p in each[:10] for _ in range(4)]
    names = [f"patient {i // 4}" for i in range(40)]
    grouped, alone = PointingScore.of(copies, groups=names), PointingScore.of(copies)
    assert grouped.groups == 10
    for name in ("hits", "energy", "iou", "dice"):
        a, b = getattr(grouped, name), getattr(alone, name)
        assert a.value == b.value
        assert a.high - a.low > 1.3 * (b.high - b.low)
    one = PointingScore.of(each[:3], groups=["a"] * 3)
    assert np.isnan(one.iou.low)
