import numpy as np
import pytest

from aimv2.evals.dense.segmentation import Counts, class_table, segmentation_metrics

# Two images of four patches; -1 as a label does not count, as a prediction it is none.
LABELS = np.array([[0, 0, 1, -1], [0, 2, 2, 1]])
GUESSES = np.array([[0, 1, 1, 2], [0, 2, -1, 1]])
COMMON = np.array([10, 5, 3])


def test_by_hand():
    """Class 0: 3 patches, 2 said, 2 right: IoU 2/3. 1: 2, 3, 2: 2/3. 2: 2, 1, 1: 1/2. Right 5 of 7, objects 3 of 4."""
    counts = Counts.of(GUESSES, LABELS, 3)
    metrics = segmentation_metrics(counts, COMMON, background=0)
    assert metrics["miou"].value == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert metrics["patch_accuracy"].value == pytest.approx(5 / 7)
    assert metrics["object_accuracy"].value == pytest.approx(3 / 4)
    # Background everywhere: 3 of 7 right, IoU 3/7 and twice 0. Class 1 for all objects: 2 of 4.
    assert metrics["miou"].chance == pytest.approx(3 / 7 / 3)
    assert metrics["patch_accuracy"].chance == pytest.approx(3 / 7)
    assert metrics["object_accuracy"].chance == pytest.approx(1 / 2)
    assert {metric.n for metric in metrics.values()} == {2}
    assert next(iter(metrics)) == "miou"
    assert class_table(counts, ("x", "y", "z"))["z"] == {"value": 0.5, "n": 2, "iou": 0.5}


def test_chance_is_what_one_class_everywhere_gets():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3], (40, 9), p=[0.7, 0.1, 0.15, 0.05])
    common = np.bincount(labels.ravel(), minlength=4)
    metrics = segmentation_metrics(Counts.of(np.zeros_like(labels), labels, 4), common, background=0)
    for name in ("miou", "patch_accuracy"):
        assert metrics[name].value == pytest.approx(metrics[name].chance)
    assert metrics["object_accuracy"].value == 0
    constant = segmentation_metrics(Counts.of(np.full_like(labels, 2), labels, 4), common, background=0)
    assert constant["object_accuracy"].value == pytest.approx(constant["object_accuracy"].chance)


def test_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels, guesses = rng.integers(0, 5, (30, 16)), rng.integers(0, 5, (30, 16))
    found = segmentation_metrics(Counts.of(guesses, labels, 5), np.bincount(labels.ravel(), minlength=5), None)
    assert found["miou"].value == pytest.approx(metrics.jaccard_score(labels.ravel(), guesses.ravel(), average="macro"))
    assert found["patch_accuracy"].value == pytest.approx(metrics.accuracy_score(labels.ravel(), guesses.ravel()))
    assert "object_accuracy" not in found


def test_the_standard_error_is_over_images():
    """Images that are right or wrong as a whole: sqrt(p (1 - p) / n), 8 times what single patches would give."""
    n, right = 200, 120
    labels = np.ones((n, 64), np.int64)
    guesses = np.repeat(np.arange(n) < right, 64).reshape(n, 64).astype(np.int64)
    found = segmentation_metrics(Counts.of(guesses, labels, 2), np.array([1, 2]), None)["patch_accuracy"]
    # 1000 resamplings know a standard deviation to 1 / sqrt(2000) = 2.2 %; 4 sigma.
    assert found.stderr == pytest.approx((0.6 * 0.4 / n) ** 0.5, rel=0.09)


def test_images_without_labels_are_not_counted():
    labels, guesses = np.vstack([LABELS, [[-1] * 4]]), np.vstack([GUESSES, [[2] * 4]])
    counts = Counts.of(guesses, labels, 3)
    assert counts.images.tolist() == [True, True, False]
    found = segmentation_metrics(counts, COMMON, 0)
    assert found == segmentation_metrics(Counts.of(GUESSES, LABELS, 3), COMMON, 0)
    with pytest.raises(ValueError, match="no patches that count"):
        segmentation_metrics(Counts.of(guesses[2:], labels[2:], 3), COMMON, 0)


def test_classes_that_are_neither_there_nor_said_are_no_part_of_the_mean():
    labels = np.array([[0, 0, 1, 1]])
    found = segmentation_metrics(Counts.of(labels, labels, 7), np.array([2, 2, 0, 0, 0, 0, 0]), 0)
    assert found["miou"].value == 1
    assert found["miou"].chance == pytest.approx(0.25)  # a half of one of two classes
    assert class_table(Counts.of(labels, labels, 3), ("x", "y", "z"))["z"] == {"value": None, "n": 0, "iou": None}
