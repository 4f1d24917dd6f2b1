"""A probe's features: kept or made anew, of the right rows; and the augmentation."""

import re

import numpy as np
import pytest
import torch
from made_images import dataset, pixels
from made_probes import Told
from PIL import Image

from aimv2.evals.probes.attentive_probe import PatchStreams
from aimv2.evals.probes.features import CachedFeatures, OnlineFeatures, augmented, cropped, source_of
from aimv2.evals.session import Session

create_transform = pytest.importorskip("timm.data").create_transform


def described(transform) -> list[str]:
    """Each part of a transform, without addresses of functions."""
    return [re.sub(r" at 0x\w+|fn=\w+", "", str(part)) for part in transform.transforms]


def test_kept_features_are_those_made_anew():
    """With the evaluation's transform in place of the augmentation, and images that can't be read left out of both."""
    encoder, data, session = Told("random"), dataset(20, 7, bad=(3,)), Session(quiet=True)
    view = PatchStreams("all")
    online = OnlineFeatures(
        encoder, data, view, session, transform=lambda i: encoder.processor(i).pixel_values[0], seed=0
    )
    cached, batches = (
        CachedFeatures(encoder, data, view, session),
        [np.array([1, 3, 8]), np.array([3]), np.array([0, 19])],
    )
    assert np.flatnonzero(~cached.readable("train")).tolist() == [3]
    found = []
    for rows, features in online.batches((0, batch) for batch in batches):
        found.append(rows.tolist())
        _, expected = next(cached.batches([(0, rows)]))
        torch.testing.assert_close(features, expected)
    assert found == [[1, 8], [], [0, 19]]

    def means(features):
        return {name: value.mean(dim=1) for name, value in features.items()}

    looked = [source.apply("test", np.array([6, 3, 0]), means, "means") for source in (online, cached)]
    assert looked[0].readable.tolist() == looked[1].readable.tolist() == [True, False, True]
    for name in ("block_00", "block_01", "output"):
        np.testing.assert_allclose(*(extracted.arrays[name] for extracted in looked), atol=1e-6)


def test_streams_that_are_one_tensor_are_overwritten_apart():
    """Pixels have no final norm: the last block is the output. Sweeps centre what they look at in place."""
    encoder, data, session = pixels(), dataset(20, 7), Session(quiet=True)
    view = PatchStreams("all")
    block, output = view(encoder, torch.zeros(1, 3, 8, 8)).values()
    assert block.data_ptr() == output.data_ptr()  # or nothing would be looked at

    def centred(features):
        return {name: value.sub_(7).mean(dim=1) for name, value in features.items()}

    where = encoder, data, view, session
    online = OnlineFeatures(*where, transform=lambda image: encoder.processor(image).pixel_values[0])
    for source in (online, CachedFeatures(*where)):
        found = source.apply("test", np.arange(7), centred, "centred").arrays
        np.testing.assert_array_equal(found["block_00"], found["output"])
        ((_, features),) = source.batches([(0, np.arange(20))])
        assert torch.equal(features["block_00"].sub_(7), features["output"].clone() - 7)


def test_auto_keeps_what_fits():
    encoder, data, session = Told("random"), dataset(20, 11), Session(quiet=True)
    size = 4 * (4 * 12) * (20 + 11)  # bytes x values of an image x images
    for most, kind in ((size, CachedFeatures), (size - 1, OnlineFeatures)):
        settings = {"most_cached": most, "augmentation": augmented, "seed": 0}
        assert type(source_of("auto", encoder, data, PatchStreams(), session, **settings)) is kind


def test_augmentation():
    """The published arguments of timm's function, at the encoder's size and normalisation; its operations at any
    magnitude, whichever Pillow there is.
    """
    encoder = Told("random")
    transform = augmented(encoder)
    settings = {"scale": (0.08, 1.0), "color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1"}
    settings |= {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    published = create_transform(8, is_training=True, **settings)
    assert described(transform) == described(published)
    assert "RandomResizedCropAndInterpolation(size=(8, 8), scale=(0.08, 1.0)" in repr(transform)
    (augment,) = (part for part in transform.transforms if hasattr(part, "ops"))
    (posterize,) = (operation for operation in augment.ops if operation.name.startswith("Posterize"))
    image = Image.new("RGB", (9, 9), (255, 130, 3))
    assert posterize.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize.aug_fn(image, 1).getextrema() == ((128, 128), (128, 128), (0, 0))
    white = cropped(encoder)(Image.new("RGB", (9, 9), (255, 255, 255)))
    assert white.shape == (3, 8, 8) and white.max() == 1.0  # mean 0.5, deviation 0.5
    assert [type(part).__name__ for part in cropped(encoder).transforms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "MaybeToTensor",
        "Normalize",
    ]
