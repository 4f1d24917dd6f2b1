"""What protocols ask of their settings, before anything is computed, and of a dataset; refused in one line."""

import math
from collections.abc import Iterable

from aimv2.evals.datasets import Dataset


def require(fits: bool, expected: str, **settings) -> None:
    """Raises ValueError that names the settings, unless they fit."""
    if not fits:
        named = ", ".join(f"{name} {value!r}" for name, value in settings.items())
        raise ValueError(f"{named}: expected {expected}")


def all_positive(numbers: Iterable[float]) -> bool:
    """At least one, and all finite and above 0."""
    numbers = list(numbers)
    return bool(numbers) and all(0 < number < math.inf for number in numbers)


def require_split(held_out: float, seed: int) -> None:
    """Raises ValueError unless a share of the training set can be held out by chance."""
    require(0 < held_out < 1, "a share between 0 and 1", held_out=held_out)
    require(seed >= 0, "0 or more", seed=seed)


def require_classes(data: Dataset, protocol: str, *, train: bool = True) -> None:
    """Raises ValueError unless the images to test on, and with `train` those to train on, are there and have labels."""
    if train and data.train is None:
        raise ValueError(f"{data.spec} has no training set: {protocol} needs one")
    for split, images in (("training", data.train if train else None), ("test", data.test)):
        if images is not None and images.labels is None:
            raise ValueError(f"{data.spec} has no classes for its {split} images: {protocol} needs them")
