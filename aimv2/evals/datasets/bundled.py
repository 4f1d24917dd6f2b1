"""Real images that come with libraries: scikit-learn's handwritten digits, scikit-image's faces."""

import hashlib
from collections.abc import Sequence

import numpy as np

from aimv2.evals.datasets.interface import Dataset, ImageSet

_INSTALL = 'pip install "aimv2[eval]"'


def open_digits(spec: str = "digits") -> Dataset:
    """1797 grey 8 x 8 digits of the UCI test set, 10 classes.

    They have no official split; ours is that of scikit-learn's own example: the first 898 to train on.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"digits come with scikit-learn: {_INSTALL}") from error
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    middle = len(pixels) // 2
    rows = np.arange(len(pixels))
    return Dataset(
        spec=spec,
        name="digits",
        classes=tuple("0123456789"),
        train=array_set("digits", "train", pixels, rows[:middle], found.target),
        test=array_set("digits", "test", pixels, rows[middle:], found.target),
        templates=('a photo of the number: "{}".',),
        report={"split": "no official one: the first 898 images to train on, the other 899 to test, as scikit-learn"},
    )


def open_faces(spec: str = "faces") -> Dataset:
    """`lfw_subset`: 100 grey 25 x 25 faces and as many pieces of background.

    They have no official split; ours is the first 50 of each to train on, the last 50 to test.
    """
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise ImportError(f"faces come with scikit-image: {_INSTALL}") from error
    pixels = np.rint(lfw_subset() * 255).astype(np.uint8)  # (200, 25, 25), faces first
    labels = np.repeat([0, 1], 100)
    first = np.arange(200) % 100 < 50
    return Dataset(
        spec=spec,
        name="faces",
        classes=("face", "background"),
        train=array_set("faces", "train", pixels, np.flatnonzero(first), labels),
        test=array_set("faces", "test", pixels, np.flatnonzero(~first), labels),
        templates=("a photo of a {}.",),
        report={"split": "no official one: of faces and of background the first 50 to train on, the last 50 to test"},
    )


def array_set(
    name: str, split: str, pixels: np.ndarray, rows: Sequence[int] | np.ndarray, labels: np.ndarray
) -> ImageSet:
    """Some rows of an array of images (n, H, W) or (n, H, W, 3), uint8, named by their numbers in it."""
    rows = np.asarray(rows)
    own = pixels[rows]
    return ImageSet(
        name=name,
        split=split,
        images=own,
        keys=[f"{row:06d}" for row in rows.tolist()],
        digest=hashlib.sha256(repr(own.shape).encode() + own.tobytes()).hexdigest(),
        labels=labels[rows],
    )
