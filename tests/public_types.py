"""A program that uses the public names, for `mypy --strict`; tests/test_types.py runs that."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch

import regard
from regard.evaluation import Comparison, Evaluation, Predictions, compare, evaluate


def use(image: Path) -> None:
    """Never called: only its types are checked."""
    folder = regard.train("digits", out="runs/x", epochs=1)
    assert_type(folder, Path)
    network = regard.load(folder)
    assert_type(network, regard.Classifier)
    (prediction,) = network.predict([image], top=3)
    name, probability = prediction.classes[0]
    assert_type(name, str)
    assert_type(probability, float)
    shown: list[regard.Explanation] = regard.explain(network, [image])
    assert_type(shown[0].probability, float)
    with regard.record(network.model) as maps:
        network.model(torch.zeros(1, 3, 32, 32))
    assert_type(maps["gate3.map"].values, torch.Tensor)
    grafted = regard.graft(network.model, regard.CBAM)
    assert_type(grafted, torch.nn.Module)
    assert_type(regard.save_model(grafted, "net"), Path)
    said = Predictions(np.eye(2), np.array([0, 1]), ["a", "b"])
    assert_type(evaluate(said), Evaluation)
    assert_type(compare(said, said), Comparison)


def fails() -> str:
    """Every error of Regard's is a RegardError."""
    try:
        regard.load("nowhere")
    except regard.CheckpointError as error:
        return str(error)
    except regard.RegardError as error:
        return f"{error.exit_code}"
    return ""
