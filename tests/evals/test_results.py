"""Metrics against scikit-learn and numbers worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from aimv2.evals.results import classification_metrics, classification_samples, per_class, ranks_of, share


def test_a_share_has_the_standard_error_of_a_binomial():
    metric = share(np.array([True, True, True, False]), chance=0.5)
    assert (metric.value, metric.n, metric.chance) == (0.75, 4, 0.5)
    assert metric.stderr == pytest.approx(0.75**0.5 * 0.25**0.5 / 2)
    with pytest.raises(ValueError, match="no test samples"):
        share(np.array([], bool))


@settings(max_examples=50)
@given(st.integers(6, 20), st.integers(0, 2**32 - 1))
def test_metrics_are_scikit_learns(classes, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(60, classes)), rng.integers(0, classes, 60)
    metrics = classification_metrics(scores, labels)
    names = np.arange(classes)
    assert metrics["top1"].value == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=names))
    assert metrics["top5"].value == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=names))
    guesses = scores.argmax(axis=1)
    present = np.isin(guesses, labels)  # scikit-learn warns of guesses that are no label of the sample
    expected = (
        balanced_accuracy_score(labels, np.where(present, guesses, (labels + 1) % classes)) if present.any() else 0
    )
    assert metrics["mean_per_class"].value == pytest.approx(expected)


def test_ties_go_to_the_lowest_class():
    constant = np.zeros((3, 7))
    assert ranks_of(constant, np.array([0, 3, 6])).tolist() == [0, 3, 6]
    metrics = classification_metrics(constant, np.array([0, 3, 6]))
    assert (metrics["top1"].value, metrics["top5"].value) == (1 / 3, 2 / 3)


def test_the_error_of_the_mean_over_classes():
    """Class 0 is right 1 of 2 times, class 1 3 of 4: sqrt(0.25/2 + 0.1875/4) / 2."""
    scores = np.eye(2)[[0, 1, 1, 1, 1, 0]]
    metric = classification_metrics(scores, np.array([0, 0, 1, 1, 1, 1]))["mean_per_class"]
    assert metric.value == pytest.approx(0.625)
    assert metric.stderr == pytest.approx(np.sqrt(0.25 / 2 + 0.1875 / 4) / 2)


def test_an_image_that_could_not_be_read_is_wrong_and_still_counts():
    scores = np.eye(8)
    scores[2] = np.nan
    labels = np.arange(8)
    metrics = classification_metrics(scores, labels)
    assert (metrics["top1"].value, metrics["top5"].value, metrics["top1"].n) == (7 / 8, 7 / 8, 8)
    samples = classification_samples(scores, labels, [f"{i}.png" for i in range(8)])
    assert samples[2] == {"sample": "2.png", "label": 2, "prediction": None, "correct": False}
    assert samples[3] == {"sample": "3.png", "label": 3, "prediction": 3, "correct": True}


def test_results_of_each_class_with_empty_and_equally_named_ones():
    scores = np.eye(4)[[0, 1, 1]]
    found = per_class(scores, np.array([0, 0, 1]), ["crane", "dog", "crane", "cat"])
    assert found == {
        "crane": {"value": 0.5, "n": 2},
        "dog": {"value": 1.0, "n": 1},
        "crane (2)": {"value": None, "n": 0},
        "cat": {"value": None, "n": 0},
    }


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"scores \(3, 2\) and labels \(2,\)"),
        (np.zeros((0, 2)), np.zeros(0, int), "n at least 1"),
        (np.zeros((2, 2)), np.array([0, 2]), "labels from 0 to 2: expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(scores, labels)
