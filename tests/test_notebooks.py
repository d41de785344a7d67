"""One line of Python explains an image, and results show themselves in notebooks."""

import io
import re

import numpy as np
import pytest
from PIL import Image

import regard
from regard.evaluation import Predictions, compare, evaluate
from tests.test_explain import saved


def test_a_classifier_explains_an_image_in_one_line(tmp_path):
    classifier = regard.load(saved(tmp_path / "net", "ag_sononet8", 32))
    image = np.arange(40 * 48, dtype=np.uint8).reshape(40, 48)
    shown = classifier.explain(image, methods=["attention"])
    (other,) = regard.explain(classifier, image, methods=["attention"])
    assert shown.classes == other.classes
    for a, b in zip(shown.maps, other.maps, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
    with Image.open(io.BytesIO(shown._repr_png_())) as picture:
        assert picture.width > 400
    with pytest.raises(ValueError, match="methods"):
        classifier.explain(image, methods=["x"])


def test_results_are_tables_in_notebooks():
    labels = np.array([0, 0, 0, 1, 1, 1])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]])
    a = Predictions(p, labels, ["<b>x</b>", "y"])
    html = evaluate(a)._repr_html_()
    assert "<b>x" not in html
    assert "&lt;b&gt;x" in html
    found = evaluate(a).metrics["top1"]
    assert f"<td>top1</td><td>{found.value:.3f}</td><td>{found.low:.3f} to" in html
    b = Predictions(np.eye(2)[1 - labels], labels, a.classes)
    html = compare(a, b)._repr_html_()
    assert re.search(r"accuracy of a</td><td>0\.833", html)
    assert "5 right by a alone" in html
    assert "<th></th>" not in html
    names = [f"class {i}" for i in range(30)]
    many = Predictions(np.eye(30), np.arange(30), names)
    assert "20 of 30" in evaluate(many)._repr_html_()
