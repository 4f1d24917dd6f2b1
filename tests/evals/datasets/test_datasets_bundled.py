import sys

import numpy as np
import pytest
from skimage.data import lfw_subset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from aimv2.evals.datasets import open_dataset


def test_digits_are_split_as_in_the_example_of_scikit_learn():
    data, found = open_dataset("digits"), load_digits()
    parts = train_test_split(np.arange(1797), found.target, test_size=0.5, shuffle=False)
    for images, rows, labels in zip((data.train, data.test), parts[:2], parts[2:], strict=True):
        assert images.labels.tolist() == labels.tolist()
        assert list(images.keys) == [f"{row:06d}" for row in rows]
        pixels = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
        # 17 levels onto 256, each at most half a level off.
        assert np.abs(pixels[..., 0] / 255 * 16 - found.images[rows]).max() <= 0.5 / 255 * 16
        assert (pixels == pixels[..., :1]).all()
    assert data.classes == tuple("0123456789") and "no official one" in data.report["split"]


def test_faces_are_halves_of_each_class():
    data, pixels = open_dataset("faces"), lfw_subset()
    for images, first in ((data.train, 0), (data.test, 50)):
        assert images.labels.tolist() == [0] * 50 + [1] * 50
        for i in (0, 49, 50, 99):
            row = first + i if i < 50 else first + i + 50
            assert images.keys[i] == f"{row:06d}"
            assert np.abs(np.asarray(images.image(i))[..., 0] / 255 - pixels[row]).max() <= 0.5 / 255 + 1e-9
    assert data.classes == ("face", "background") and data.train.identity != data.test.identity


@pytest.mark.parametrize(("spec", "package"), [("digits", "sklearn.datasets"), ("faces", "skimage.data")])
def test_a_missing_package_is_named(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "aimv2\[eval\]"'):
        open_dataset(spec)
