"""A probe's features: kept or made anew, of the right rows; and the augmentation."""

import numpy as np
import torch
from made_images import dataset
from made_probes import Told
from PIL import Image

from aimv2.evals.attentive_probe import PatchStreams
from aimv2.evals.probe_features import Anew, Kept, augmented, cropped, source_of
from aimv2.evals.session import Session


def test_kept_features_are_those_made_anew():
    """With the evaluation's transform in place of the augmentation, and images that can't be read left out of both."""
    encoder, data, session = Told("random"), dataset(20, 7, bad=(3,)), Session(quiet=True)
    view = PatchStreams("all")
    anew = Anew(encoder, data, view, session, transform=lambda i: encoder.processor(i).pixel_values[0], seed=0)
    kept, batches = Kept(encoder, data, view, session), [np.array([1, 3, 8]), np.array([3]), np.array([0, 19])]
    assert np.flatnonzero(~kept.readable("train")).tolist() == [3]
    found = []
    for rows, features in anew.batches(batches, epoch=0):
        found.append(rows.tolist())
        _, expected = next(kept.batches([rows], epoch=0))
        torch.testing.assert_close(features, expected)
    assert found == [[1, 8], [], [0, 19]]

    def means(features):
        return {name: value.mean(dim=1) for name, value in features.items()}

    looked = [source.look("test", np.array([6, 3, 0]), means, "means") for source in (anew, kept)]
    assert looked[0].readable.tolist() == looked[1].readable.tolist() == [True, False, True]
    for name in ("block_00", "block_01", "output"):
        np.testing.assert_allclose(*(extracted.arrays[name] for extracted in looked), atol=1e-6)


def test_auto_keeps_what_fits():
    encoder, data, session = Told("random"), dataset(20, 11), Session(quiet=True)
    size = 4 * (4 * 12) * (20 + 11)  # bytes x values of an image x images
    for most, kind in ((size, Kept), (size - 1, Anew)):
        settings = {"most_cached": most, "augmentation": augmented, "seed": 0}
        assert type(source_of("auto", encoder, data, PatchStreams(), session, **settings)) is kind


def test_augmentation():
    """The encoder's size and normalisation; timm's operations at any magnitude, whichever Pillow there is."""
    encoder = Told("random")
    transform = augmented(encoder)
    assert "RandomResizedCropAndInterpolation(size=(8, 8), scale=(0.08, 1.0)" in repr(transform)
    assert "magnitude_std=0.5" in repr(transform) or "mstd=0.5" in repr(transform)
    (augment,) = (part for part in transform.transforms if hasattr(part, "ops"))
    (posterize,) = (operation for operation in augment.ops if operation.name.startswith("Posterize"))
    image = Image.new("RGB", (9, 9), (255, 130, 3))
    assert posterize.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize.aug_fn(image, 1).getextrema() == ((128, 128), (128, 128), (0, 0))
    white = transform(Image.new("RGB", (9, 9), (255, 255, 255)))
    assert white.shape == (3, 8, 8) and white.max() == 1.0  # mean 0.5, deviation 0.5
    assert [type(part).__name__ for part in cropped(encoder).transforms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "MaybeToTensor",
        "Normalize",
    ]
