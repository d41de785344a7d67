"""A run's end: the weights, the predictions and the counts are those that run.json names."""

import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import regard
from regard.data.sources import open_data
from regard.errors import StateError
from regard.runs import RunFolder
from regard.training import trackers
from regard.training.checkpoint import Checkpoints
from regard.training.plan import noisy_labels
from regard.training.run import Run
from regard.training.scoring import Scorer, Scores

TINY = {
    "model": "ag_sononet8", "size": 16, "batch_size": 32, "precision": "fp32", "compile": "no",
    "trackers": (), "faithfulness_images": 0, "workers": 0,
}  # fmt: skip


@pytest.fixture
def full_disk(monkeypatch):
    """Makes the nth saving of a state fail, and lets the others succeed again afterwards."""
    save = Checkpoints.save

    def at(number: int) -> None:
        saved = iter(range(1, 1000))

        def failing(self: Checkpoints, step: int, content: dict) -> None:
            if next(saved) == number:
                raise StateError("no space left")
            save(self, step, content)

        monkeypatch.setattr(Checkpoints, "save", failing)

    return at


def script(accuracies: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what each validation measures, in this order."""
    said: Iterator[float] = iter(accuracies)
    validate = Scorer.validate

    def scripted(self: Scorer, *arguments: object) -> Scores:
        validate(self, *arguments)
        return Scores(1.0, next(said))

    monkeypatch.setattr(Scorer, "validate", scripted)


def test_the_selected_weights_are_those_of_the_step_in_run_json(tmp_path, monkeypatch, full_disk):
    """A third epoch that was better, and was lost; what is trained instead is worse.

    As on a GPU, where an epoch that is trained again ends a little differently.
    """
    out, kept = tmp_path / "run", {}
    settings = {**TINY, "out": out, "epochs": 4, "limit": 200}
    script([0.5, 0.6, 0.9, 0.55, 0.55], monkeypatch)
    write = RunFolder.write_best

    def noted(self: RunFolder, model: torch.nn.Module, step: int) -> None:
        kept[step] = {k: v.clone() for k, v in model.state_dict().items()}
        write(self, model, step)

    monkeypatch.setattr(RunFolder, "write_best", noted)
    full_disk(3)
    with pytest.raises(StateError):
        regard.train("digits", **settings)
    full_disk(0)
    regard.train("digits", resume=True, **settings)
    selected = json.loads((out / "run.json").read_text())["facts"]["selected"]
    assert (selected["val_accuracy"], selected["step"]) == (0.6, 13)
    assert set(kept) == {7, 13, 19}
    final = load_file(out / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in kept[13].items())
    assert not list(out.glob("best*"))


def test_the_best_weights_of_both_states_on_disk_are_kept(tmp_path, monkeypatch):
    """The older state is used if the newest is damaged, and names its own best weights."""
    out = tmp_path / "run"
    script([0.5, 0.6, 0.7, 0.8], monkeypatch)
    monkeypatch.setattr(Run, "_finish", lambda self: None)
    regard.train("digits", **TINY, out=out, epochs=4, limit=200)
    named = []
    for path in sorted((out / "state").iterdir()):
        state = torch.load(path, weights_only=True)
        named.append(int(state["best"]["step"]))
    assert named == [19, 25]
    assert sorted(p.name for p in out.glob("best*")) == [
        f"best-{step:09d}.safetensors" for step in named
    ]


@pytest.mark.parametrize("memory", ["yes", "no"])
def test_training_images_that_are_tested_are_seen_as_in_prediction(tmp_path, scans, memory):
    """There are no others: without validation and test images, the training images are tested."""
    out = regard.train(
        scans, **TINY, out=tmp_path / "run", steps=20, val=0, test=0, memory=memory,
        random_crop="resized", crop_scale=(0.08, 0.2),
    )  # fmt: skip
    split, stored = RunFolder(out).read_predictions()
    assert split == "train"
    said = regard.load(out).predict([scans.parent / path for path in stored.paths])
    again = [dict(one.classes) for one in said]
    expected = np.array([[one[name] for name in stored.classes] for one in again])
    assert stored.probabilities == pytest.approx(expected, abs=1e-5)


def test_an_image_that_was_lost_is_counted_once(tmp_path, scans, full_disk):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scans, data)
    settings = {**TINY, "out": out, "epochs": 2, "val": 0.2, "test": 0.2}
    full_disk(2)
    with pytest.raises(StateError):
        regard.train(data, **settings)
    rows = (out / "splits.csv").read_text().splitlines()[1:]
    lost = {row.split(",")[2]: row.split(",")[0] for row in rows}  # one of each split
    assert set(lost) == {"train", "val", "test"}
    for path in lost.values():
        (data / path).write_bytes(b"x")
    full_disk(0)
    regard.train(data, resume=True, **settings)
    assert json.loads((out / "run.json").read_text())["facts"]["unreadable"] == 3
    assert len((out / "unreadable.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("rules", [None, 1, 2])
def test_a_run_that_was_begun_before_is_resumed_by_its_rules(
    tmp_path, monkeypatch, full_disk, rules
):
    """Its plan does not name any: the labels, the steps and the norms stay what they were."""
    out = tmp_path / "run"
    settings = {**TINY, "out": out, "epochs": 2, "limit": 100, "label_noise": 0.5}
    settings |= {"class_weights": "balanced", "sampler": "balanced"}
    settings |= {"model": "cbam_resnet18", "model_args": {"channels": (8, 8, 8, 8)}}
    full_disk(2)
    with pytest.raises(StateError):
        regard.train("digits", **settings)
    full_disk(0)
    content = json.loads((out / "run.json").read_text())
    assert content["plan"].pop("rules") == 2
    content["plan"] |= {} if rules is None else {"rules": rules}
    (out / "run.json").write_text(json.dumps(content))
    found = {}
    finish = Run._finish

    def noted(self: Run) -> None:
        t = self.trainer
        momentum = {m.momentum for m in t.model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        found.update(labels=t.labels.numpy(), planned=t.planned, momentum=momentum)
        found.update(weights=t.class_weights.numpy(), chances=t.source.order.chances)
        finish(self)

    monkeypatch.setattr(Run, "_finish", noted)
    regard.train("digits", resume=True, **settings)
    table = open_data("digits")
    rows = [row.split(",") for row in (out / "splits.csv").read_text().splitlines()[1:]]
    true = np.array([table.classes.index(row[1]) for row in rows if row[2] == "train"])
    assert np.array_equal(found["labels"], noisy_labels(true, 10, 0.5, 0, rules or 0))
    counts = np.bincount(found["labels"] if rules == 2 else true, minlength=10)
    np.testing.assert_allclose(found["weights"], len(true) / 10 / counts, rtol=1e-6)
    drawn = 1 / counts[found["labels"] if rules == 2 else true]
    np.testing.assert_allclose(found["chances"], drawn / drawn.sum())
    assert found["planned"] == bool(rules)
    assert found["momentum"] == ({0.1} if rules else {0.1, 0.01})


def test_a_folder_that_is_trained_in_anew_is_another_run_of_the_tracker(tmp_path, monkeypatch):
    """Weights & Biases would go on with the run of the same id; a resumed run does have it."""
    made: list[dict] = []

    def tracker(project: str, /, **keywords: object) -> SimpleNamespace:
        made.append(keywords)
        return SimpleNamespace(
            start=list, finish=list, store_init_configuration=dict, log=lambda *_, **__: None
        )

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", tracker)
    monkeypatch.setattr("regard.training.run.check_trackers", lambda names: ["wandb"])
    started = iter(["2026-11-28 10:00:00", "2026-11-28 11:00:00"])
    monkeypatch.setattr("regard.runs.time.strftime", lambda form: next(started))
    for _ in range(2):
        out = regard.train("digits", **TINY, out=tmp_path / "run", steps=2, limit=100)
        shutil.rmtree(out)
    first, second = (keywords["id"] for keywords in made)
    assert first != second
