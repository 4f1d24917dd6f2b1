import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NATIVE, V1, V2, random_encoder

from aimv2.evals.dense.features import attention_probabilities, fit_pca, looked_at, received

GRID = (4, 5)


def patches(seed: int = 0, images: int = 3, width: int = 8) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(images, 20, width) @ torch.randn(width, width) + 3


def test_components_are_scikit_learns():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = patches()
    reference = decomposition.PCA(3).fit(x.flatten(0, 1).double().numpy())
    found = fit_pca(x, GRID)
    theirs = reference.components_
    signs = np.sign((theirs * found.components.numpy()).sum(axis=1, keepdims=True))
    # Both in float64; the smallest gap between these variances is far above its rounding.
    np.testing.assert_allclose(found.components.numpy(), theirs * signs, atol=1e-9)
    expected = reference.transform(x.flatten(0, 1).double().numpy()) * signs.T
    np.testing.assert_allclose(found.transform(x).flatten(0, 1).numpy(), expected, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(3, 12))
def test_components_are_orthonormal_with_a_fixed_sign(seed, images, width):
    x = patches(seed, images, width)
    found = fit_pca(x, GRID)
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(3).double())
    largest = found.components.gather(1, found.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    variances = found.transform(x).flatten(0, 1).var(dim=0)
    assert (variances.diff() <= 1e-9 * variances[0]).all()
    colours = found.colours(x)
    assert colours.shape == (images, 20, 3)
    assert 0 <= colours.min() <= colours.max() <= 1


@pytest.mark.parametrize("bright", [0, 1, 2])
def test_where_nothing_is_parted_all_is_foreground(bright):
    """A flat image, and one with fewer bright patches than there are colours."""
    x = torch.full((1, 20, 5), 1.7)
    x[0, 6 : 6 + bright] += 3.0
    found = fit_pca(x, GRID, foreground_first=True)
    assert found.outline is None
    assert found.foreground(x).all()
    assert torch.isfinite(found.colours(x)).all()


def test_colours_do_not_depend_on_the_order_of_images():
    x = patches()
    first, second = fit_pca(x, GRID), fit_pca(x.flip(0), GRID)
    torch.testing.assert_close(first.colours(x), second.colours(x))  # sums in another order


def test_the_foreground_is_the_side_that_is_not_at_the_edge():
    """A bright object in the middle of 6 x 6 patches, and the same with all signs turned."""
    torch.manual_seed(0)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 1:5] = True
    x = torch.randn(2, 36, 5) * 0.1
    x[:, inside.flatten()] += torch.tensor([4.0, -3, 2, 0, 1])
    for turned in (x, -x, x + 100):
        found = fit_pca(turned, (6, 6), foreground_first=True)
        assert (found.foreground(turned) == inside.flatten()).all()
        assert (found.colours(turned)[:, ~inside.flatten()] == 0).all()
    whole = fit_pca(x, (6, 6))
    assert whole.foreground(x).all()
    # Of the object alone the mean is its own, and the step to the background no component any more.
    object_pca = fit_pca(x, (6, 6), foreground_first=True)
    torch.testing.assert_close(object_pca.mean, x[:, inside.flatten()].double().mean((0, 1)))
    assert object_pca.transform(x[:, inside.flatten()]).abs().max() < 1 < whole.transform(x).abs().max()


def test_constant_features_are_grey():
    x = torch.ones(2, 20, 4)
    assert (fit_pca(x, GRID).colours(x) == 0.5).all()


@pytest.mark.parametrize("shape", [(20, 8), (2, 19, 8), (2, 20, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"patches .*: expected \(B, 4 \* 5, at least 3\)"):
        fit_pca(torch.zeros(shape), GRID)


@pytest.mark.parametrize("config", [V1, V2, NATIVE], ids=["v1", "v2", "native"])
@pytest.mark.parametrize("block", [0, 2])
def test_softmax_times_v_is_what_the_block_computes(config, block):
    encoder = random_encoder(config)
    torch.manual_seed(1)
    images = torch.randn(2, 3, 56, 56)
    seen: dict[str, torch.Tensor] = {}
    attention = encoder.blocks[block].attention
    handle = attention.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], output=output))
    with torch.no_grad():
        encoder(images)
        handle.remove()
        probabilities = attention_probabilities(encoder, images, block)
        value = attention.qkv(seen["x"])[..., 2 * config.width :].unflatten(-1, (config.heads, -1)).transpose(1, 2)
        output = attention.proj((probabilities @ value).transpose(1, 2).flatten(2))
    assert probabilities.shape == (2, config.heads, 16, 16)
    # fp32 sums over 16 patches and 256 channels, in another order than the fused kernel's.
    torch.testing.assert_close(output, seen["output"], rtol=1e-4, atol=1e-5)


def test_rows_are_shares():
    probabilities = attention_probabilities(random_encoder(V2), torch.randn(1, 3, 56, 56), 1)
    ones = torch.ones(1, 2)
    torch.testing.assert_close(received(probabilities).sum(-1), ones)
    row = looked_at(probabilities, 5)
    torch.testing.assert_close(row.sum(-1), ones)
    assert torch.equal(row[0, 1], probabilities[0, 1, 5])
    assert row.std() > 0
    assert torch.equal(received(probabilities)[0, 0, 3], probabilities[0, 0, :, 3].mean())


def test_what_is_not_there_is_refused():
    encoder = random_encoder(V2)
    images = torch.randn(1, 3, 56, 56)
    with pytest.raises(ValueError, match="block 3: expected 0 to 2"):
        attention_probabilities(encoder, images, 3)
    with pytest.raises(ValueError, match="patch 16: expected 0 to 15"):
        looked_at(attention_probabilities(encoder, images, 0), 16)


def test_the_encoder_is_left_as_it_was():
    encoder = random_encoder(V2).train()
    probabilities = attention_probabilities(encoder, torch.randn(1, 3, 56, 56), 0)
    assert encoder.training
    assert not probabilities.requires_grad
    assert not encoder.blocks[0].norm1._forward_hooks
