import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.patches import normalize_patches, patch_statistics, patchify, unpatchify


def test_patchify_is_raster_order_with_the_channel_fastest():
    image = torch.randn(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    for b, row, column, y, x, channel in np.ndindex(2, 2, 3, 2, 2, 3):
        value = image[b, channel, 2 * row + y, 2 * column + x]
        assert patches[b, 3 * row + column, 6 * y + 3 * x + channel] == value


@settings(deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), patch_size=st.integers(1, 5), samples=st.integers(1, 3))
def test_unpatchify_is_the_inverse_on_any_grid(height, width, patch_size, samples):
    image = torch.arange(samples * 3 * height * width * patch_size**2, dtype=torch.float64)
    image = image.view(samples, 3, height * patch_size, width * patch_size)
    patches = patchify(image, patch_size)
    assert patches.shape == (samples, height * width, 3 * patch_size**2)
    assert torch.equal(unpatchify(patches, height, width, patch_size), image)


@pytest.mark.parametrize("size", [(28, 30), (30, 28), (13, 13)])
def test_sides_that_are_not_multiples_are_named(size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*14"):
        patchify(torch.zeros(1, 3, *size), 14)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_normalization_uses_the_unbiased_variance(seed, scale, shift):
    patches = np.random.default_rng(seed).normal(shift, scale, (2, 3, 12))
    expected = patches - patches.mean(-1, keepdims=True)
    expected /= np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    # float64 on both sides: rounding of the mean, at most 1e-16 * 10 / 1e-3 * a few
    np.testing.assert_allclose(normalize_patches(torch.from_numpy(patches)).numpy(), expected, rtol=0, atol=1e-10)


def test_statistics_bring_normalized_patches_back():
    patches = torch.randn(2, 3, 12, dtype=torch.float64)
    mean, deviation = patch_statistics(patches)
    torch.testing.assert_close(normalize_patches(patches) * deviation + mean, patches, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.1179, 2.64])
def test_a_constant_patch_is_finite(value):
    normalized = normalize_patches(torch.full((1, 1, 588), value))
    # the mean of 588 equal floats is off by some units of 2e-7, and the deviation is sqrt(1e-6)
    assert normalized.abs().max() < 1e-3
