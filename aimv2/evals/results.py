"""What an evaluation finds: numbers with their uncertainty, what was said of each sample, and what is worth keeping.

C classes, n test samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

MOST_KEYS = 100  # of images that can't be read, in a result


@dataclass(frozen=True, slots=True)
class Metric:
    """A number between 0 and 1, as the paper's percentages over 100.

    stderr: of the mean over the test samples, not over training runs. chance: what guessing gives; None if unknown.
    """

    value: float
    stderr: float
    n: int
    chance: float | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a protocol's `run` returns.

    metrics: the first is the one to quote. samples: one dict for each test sample, with at least "sample" (its key) and
    "correct". details: plain JSON. tensors: weights to be kept, such as the chosen head's.
    """

    metrics: dict[str, Metric]
    samples: list[dict] = field(default_factory=list)
    details: dict = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def share(correct: np.ndarray, chance: float | None = None) -> Metric:
    """The mean of booleans (n,) with its binomial standard error. Raises ValueError for none."""
    if not len(correct):
        raise ValueError("no test samples: expected at least one")
    value = float(np.mean(correct))
    return Metric(value, float(np.sqrt(value * (1 - value) / len(correct))), len(correct), chance)


def ranks_of(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes (n,) come before the right one: a higher score, or an equal one and a lower number.

    A row with a NaN, of an image that could not be read, is at C: wrong at every k.
    """
    n, classes = scores.shape
    own = scores[np.arange(n), labels][:, None]  # (n, 1)
    before = (scores > own) | ((scores == own) & (np.arange(classes) < labels[:, None]))  # (n, C)
    return np.where(np.isnan(scores).any(axis=1), classes, before.sum(axis=1))


def classification_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """top1, with more than 5 classes top5, and mean_per_class, from scores (n, C) and labels (n,).

    mean_per_class is over the classes that have a test sample; its standard error takes the classes as given. Chance is
    a guess that is uniform over all classes.
    """
    _check(scores, labels)
    classes = scores.shape[1]
    ranks = ranks_of(scores, labels)
    metrics = {"top1": share(ranks == 0, 1 / classes)}
    if classes > 5:
        metrics["top5"] = share(ranks < 5, 5 / classes)
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    rates = np.bincount(labels, weights=ranks == 0, minlength=classes)[present] / counts[present]
    stderr = np.sqrt(np.sum(rates * (1 - rates) / counts[present])) / present.sum()
    metrics["mean_per_class"] = Metric(float(rates.mean()), float(stderr), len(labels), 1 / classes)
    return metrics


def classification_samples(scores: np.ndarray, labels: np.ndarray, keys: Sequence[str]) -> list[dict]:
    """For each test sample its key, label, predicted class (None: not readable), and whether that is right."""
    _check(scores, labels)
    readable = ~np.isnan(scores).any(axis=1)
    predictions = np.where(readable, np.nan_to_num(scores, nan=-np.inf).argmax(axis=1), -1)
    rows = zip(keys, labels.tolist(), predictions.tolist(), strict=True)
    return [
        {"sample": key, "label": label, "prediction": None if guess < 0 else guess, "correct": label == guess}
        for key, label, guess in rows
    ]


def per_class(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict]:
    """{class: {"value": share of its samples that are right, None if it has none, "n"}}.

    Of classes with the same name, such as ImageNet's two cranes, the later ones have their number behind it.
    """
    _check(scores, labels)
    right = ranks_of(scores, labels) == 0
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    hits = np.bincount(labels, weights=right, minlength=len(classes)).tolist()
    names = [name if classes.index(name) == number else f"{name} ({number})" for number, name in enumerate(classes)]
    return {name: {"value": hit / n if n else None, "n": n} for name, hit, n in zip(names, hits, counts, strict=True)}


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"scores {scores.shape} and labels {labels.shape}: expected (n, C) and (n,), n at least 1")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: expected 0 to {scores.shape[1] - 1}")
