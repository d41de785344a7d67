"""A batch norm's running statistics fit the images also after a short run."""

import pytest
import torch
from torch import nn

import regard
from regard.data.loading import Reader
from regard.data.sources import open_data
from regard.models.cbam import SpatialGate
from regard.training.build import settle_norms


@pytest.mark.parametrize(
    ("batches", "expected"),
    [(20, 0.1), (100, 0.1), (297, 10 / 297), (999, 10 / 999), (1000, 0.01), (10**6, 0.01)],
)
def test_averages_span_at_most_a_tenth_of_a_run(batches, expected):
    model = nn.Sequential(SpatialGate(4), nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4))
    settle_norms(model, batches)
    assert model[0].bn.momentum == pytest.approx(expected)
    assert [model[1].momentum, model[2].momentum] == [0.3, 0.1]


def test_norms_that_average_all_batches_or_none_stay_so():
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=0.0))
    settle_norms(model, 20)
    assert [norm.momentum for norm in model] == [None, 0.0]


def test_a_short_run_evaluates_with_the_gates_that_it_trained(tmp_path):
    run = regard.train(
        "digits", model="sononet8", model_args={"convs": (1, 1, 1, 1, 1)}, graft="cbam", size=16,
        steps=60, pretrained="no", faithfulness_images=0, workers=0, out=tmp_path / "run",
        trackers=(), precision="fp32", compile="no",
    )  # fmt: skip
    found = regard.load(run)
    gates = {n: m for n, m in found.model.named_modules() if isinstance(m, SpatialGate)}
    assert len(gates) == 5
    seen: dict[str, torch.Tensor] = {}
    for name, gate in gates.items():
        gate.bn.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
    table = open_data("digits")
    reader = Reader(table, found.preprocess)
    with torch.no_grad():
        images = torch.stack([found.preprocess.fit(reader.decode(i)) for i in range(256)])
        found.model(found.preprocess.normalize(images))
    for name, gate in gates.items():
        apart = (gate.bn.running_mean - seen[name].mean()).abs() / seen[name].std()
        assert apart < 1, name
        assert 0.5 < gate.bn.running_var / seen[name].var() < 2, name
