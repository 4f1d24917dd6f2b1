"""How well patches are told apart: accuracy and mean intersection over union, resampled image by image.

n images, N patches of each, K classes, S resamplings.
"""

from dataclasses import dataclass

import numpy as np

from aimv2.evals.dense.patch_labels import IGNORED
from aimv2.evals.results import Metric

RESAMPLES = 1000
_MOST_DRAWN = 10_000_000  # numbers in memory at a time


@dataclass(frozen=True, slots=True)
class Counts:
    """For each image (n, K): the patches that have a class, that are said to have it, and both."""

    labelled: np.ndarray
    guessed: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(cls, predictions: np.ndarray, labels: np.ndarray, classes: int) -> "Counts":
        """Predictions and labels (n, N). Labels of -1 don't count; a prediction of -1 is none at all, and wrong."""
        if predictions.shape != labels.shape or labels.ndim != 2:
            raise ValueError(f"predictions {predictions.shape} and labels {labels.shape}: expected (n, N) for both")
        counted = labels != IGNORED
        guessed = counted & (predictions >= 0)
        return cls(
            _per_image(labels, counted, classes),
            _per_image(predictions, guessed, classes),
            _per_image(labels, counted & (predictions == labels), classes),
        )

    @property
    def images(self) -> np.ndarray:
        """(n,) bool: which have patches that count."""
        return self.labelled.any(axis=1)


def segmentation_metrics(
    counts: Counts, common: np.ndarray, background: int | None, seed: int = 0
) -> dict[str, Metric]:
    """miou, patch_accuracy, and with a background object_accuracy, over the patches that are something else.

    Chance is one class everywhere, the most common in training: for object_accuracy the most common but the background.
    n is the number of images, over which the standard error is bootstrapped.

    Args:
        common: (K,), how many patches of the training set have each class.
        background: its number; None: no class is more of a background than the others.
    """
    used = counts.images
    if not used.any():
        raise ValueError("no patches that count in the test set: expected at least one")
    columns = np.concatenate([counts.labelled, counts.guessed, counts.hits], axis=1)[used]  # (n, 3K)
    total, classes, constant = columns.sum(axis=0), len(common), int(common.argmax())
    labelled = total[:classes]
    present = np.count_nonzero(labelled) + (labelled[constant] == 0)
    share = float(labelled[constant] / labelled.sum())
    chances = {"miou": share / present, "patch_accuracy": share}
    if background is not None and labelled.sum() > labelled[background]:
        objects = np.arange(classes) != background
        likely = int(np.where(objects, common, -1).argmax())
        chances["object_accuracy"] = float(labelled[likely] / labelled[objects].sum())
    values = _rates(total[None], classes, background)
    resampled = _rates(_resampled(columns, seed), classes, background)
    return {
        name: Metric(float(values[name][0]), float(np.nanstd(resampled[name], ddof=1)), int(used.sum()), chance)
        for name, chance in chances.items()
    }


def class_table(counts: Counts, names: tuple[str, ...]) -> dict[str, dict]:
    """{class: {"value": share of its patches that are right, "n": patches, "iou"}}, None where there are none."""
    labelled, guessed, hits = (part.sum(axis=0).tolist() for part in (counts.labelled, counts.guessed, counts.hits))
    return {
        name: {"value": h / n if n else None, "n": n, "iou": h / (n + g - h) if n + g else None}
        for name, n, g, h in zip(names, labelled, guessed, hits, strict=True)
    }


def _rates(sums: np.ndarray, classes: int, background: int | None) -> dict[str, np.ndarray]:
    """Sums (S, 3K) of counts -> each metric (S,), NaN where it is not defined."""
    labelled, guessed, hits = (sums[:, i * classes : (i + 1) * classes].astype(np.float64) for i in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        union = labelled + guessed - hits
        iou = np.where(union > 0, hits / union, 0).sum(axis=1) / np.count_nonzero(union, axis=1)
        rates = {"miou": iou, "patch_accuracy": hits.sum(axis=1) / labelled.sum(axis=1)}
        if background is not None:
            objects = np.arange(classes) != background
            rates["object_accuracy"] = hits[:, objects].sum(axis=1) / labelled[:, objects].sum(axis=1)
    return rates


def _resampled(columns: np.ndarray, seed: int) -> np.ndarray:
    """Sums (S, columns) over n images drawn with replacement."""
    n = len(columns)
    rng, step = np.random.default_rng(seed), max(1, _MOST_DRAWN // n)
    draws = (rng.multinomial(n, np.full(n, 1 / n), min(step, RESAMPLES - i)) for i in range(0, RESAMPLES, step))
    return np.concatenate([drawn @ columns for drawn in draws])


def _per_image(numbers: np.ndarray, chosen: np.ndarray, classes: int) -> np.ndarray:
    """(n, K): how often each number is among the chosen ones of an image."""
    n = len(numbers)
    cells = (np.arange(n)[:, None] * classes + numbers)[chosen]
    return np.bincount(cells, minlength=n * classes).reshape(n, classes)
