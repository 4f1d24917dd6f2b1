"""The encoder on strips, images of different grids in one batch, against the same images one by one."""

from dataclasses import replace

import pytest
import torch
from strips import random_images, strips
from tiny_models import random_encoder

from aimv2.encoder import VisionConfig
from aimv2.masks import prefix_mask

P = 4
CONFIG = VisionConfig(width=32, depth=2, heads=2, mlp_hidden=48, image_size=12, patch_size=P, positions="sincos")
TABLE = replace(CONFIG, positions="interpolated")
GRIDS = [(3, 3), (1, 7), (4, 3), (2, 1), (1, 1), (5, 2)]
PREFIXES = [4, 1, 11, 1, 1, 5]
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, values of about 1: other summation orders only


def real_patches(grid: torch.Tensor, n: int) -> torch.Tensor:
    return torch.arange(n) < grid.prod(dim=1)[:, None]


@pytest.mark.parametrize("config", [CONFIG, TABLE], ids=["sincos", "interpolated"])
@pytest.mark.parametrize("masked", ["prefix", "bidirectional"])
@torch.no_grad()
def test_mixed_sizes_equal_one_by_one(config, masked):
    encoder, images = random_encoder(config).double(), random_images(GRIDS, P)
    image, grid = strips(images, P)
    n = image.shape[3] // P
    prefix = masked == "prefix"
    mask = prefix_mask(torch.tensor(PREFIXES), n) if prefix else real_patches(grid, n)[:, None, None]
    features, states = encoder(image, mask, grid=grid, output_hidden_states=True)
    assert features.isfinite().all()
    for i, (alone, s) in enumerate(zip(images, PREFIXES, strict=True)):
        count = int(grid[i].prod())
        own = prefix_mask(torch.tensor([s]), count) if prefix else None
        expected, expected_states = encoder(alone[None], own, output_hidden_states=True)
        for a, b in zip([features, *states], [expected, *expected_states], strict=True):
            torch.testing.assert_close(a[i, :count], b[0], **EXACT)


@torch.no_grad()
def test_neither_what_stands_in_the_padding_nor_how_much_matters():
    encoder, images = random_encoder(CONFIG).double(), random_images(GRIDS, P)
    found = []  # under the prefix mask, bidirectional, and without a mask, which is the same
    for n, padding in ((0, 0.0), (0, 1e3), (40, -7.0)):
        image, grid = strips(images, P, n, padding)
        length = image.shape[3] // P
        for mask in (prefix_mask(torch.tensor(PREFIXES), length), real_patches(grid, length)[:, None, None], None):
            features = encoder(image, mask, grid=grid)
            found.append(torch.cat([row[: int(g.prod())] for row, g in zip(features, grid, strict=True)]))
    for i, other in enumerate(found[3:]):
        torch.testing.assert_close(other, found[i % 3], **EXACT)
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1], atol=1e-3)
    # and with a mask of nothing it would matter
    image, grid = strips(images, P, padding=1e3)
    everywhere = torch.ones(1, 1, 1, image.shape[3] // P, dtype=torch.bool)
    assert not torch.allclose(encoder(image, everywhere, grid=grid)[3, :2], found[1][28:30], atol=1e-3)


@pytest.mark.parametrize("positions", ["learned", "interpolated", "sincos"])
@torch.no_grad()
def test_a_square_image_is_its_strip(positions):
    encoder = random_encoder(replace(CONFIG, positions=positions)).double()
    images = random_images([(3, 3)] * 4, P)
    mask = prefix_mask(torch.tensor([1, 4, 8, 5]), 9)
    image, grid = strips(images, P)
    torch.testing.assert_close(encoder(image, mask, grid=grid), encoder(torch.stack(images), mask), **EXACT)
    image, grid = strips(images, P, n=12)
    padded = encoder(image, prefix_mask(torch.tensor([1, 4, 8, 5]), 12), grid=grid)
    torch.testing.assert_close(padded[:, :9], encoder(torch.stack(images), mask), **EXACT)


def test_checkpointing_changes_no_bit():
    encoder, (image, grid) = random_encoder(CONFIG), strips(random_images(GRIDS, P, torch.float32), P)
    mask = prefix_mask(torch.tensor(PREFIXES), 12)
    gradients = []
    for checkpointing in (False, True):
        encoder.config = replace(CONFIG, checkpointing=checkpointing)
        encoder.zero_grad()
        encoder(image, mask, grid=grid).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_sincos_with_grids_compiles_without_graph_breaks():
    encoder, (image, grid) = random_encoder(CONFIG), strips(random_images(GRIDS, P, torch.float32), P)
    mask = prefix_mask(torch.tensor(PREFIXES), 12)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(image, mask, grid=grid), encoder(image, mask, grid=grid))


@pytest.mark.parametrize("config", [CONFIG, TABLE], ids=["sincos", "interpolated"])
@torch.no_grad()
def test_bf16_weights_give_bf16_features(config):
    encoder, (image, grid) = random_encoder(config), strips(random_images(GRIDS, P, torch.float32), P)
    mask = prefix_mask(torch.tensor(PREFIXES), 12)
    expected = encoder(image, mask, grid=grid)
    features = encoder.bfloat16()(image, mask, grid=grid)
    assert features.dtype == torch.bfloat16
    # 8 bits a value, 2^-9 relative each time one is rounded; some 20 roundings on the way, at random
    assert (features - expected).norm() / expected.norm() < 20**0.5 * 2**-8


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 3, 8, 12), [[2, 3]] * 2, r"\(2, 3, 8, 12\) with a grid \(2, 2\).*\(B, 3, 4, N \* 4\)"),
        ((2, 3, 4, 24), [[2, 3]], r"grid \(1, 2\)"),
        ((2, 3, 4, 24), [2, 3], r"grid \(2,\)"),
    ],
)
def test_what_is_no_strip_is_refused(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        random_encoder(CONFIG)(torch.zeros(shape), grid=torch.tensor(grid))


def test_learned_positions_serve_their_own_grid_only():
    encoder = random_encoder(replace(CONFIG, positions="learned"))
    image, grid = strips(random_images([(3, 3), (1, 9)], P, torch.float32), P)
    with pytest.raises(ValueError, match=r"1x9 patches.*3x3"):
        encoder(image, grid=grid)
