"""Teacher and student that see images at other sizes, in other patches, or at native resolution.

B samples, N patches, P patch side.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_aimv2 import CONFIG, GRID, VISION, N, P, counts_of, random_batch
from tiny_distill import FEATURES, NATIVE, built, part_of, vector

from aimv2 import losses
from aimv2.data.batch import Batch
from aimv2.masks import prefix_mask
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.teacher import resize_features, resize_images
from aimv2.patches import to_strip
from aimv2.pretrained import load_encoder, load_model

# --- other resolutions and patches


def as_pillow(image: np.ndarray, size: int, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.float32), mode="F").resize((size, size), filter))


@pytest.mark.parametrize(("size", "new"), [(12, 6), (6, 12), (8, 6), (24, 9)])
def test_resizing_equals_pillows(size, new):
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = image.flatten(2).transpose(1, 2)  # (1, size^2, 3)
    cubic, linear = resize_images(image, new)[0], resize_features(features, new)[0].T.unflatten(1, (new, new))
    # fp32 on both sides, of weighted means of values up to 4
    for channel in range(3):
        plane = image[0, channel].numpy()
        assert np.abs(cubic[channel].numpy() - as_pillow(plane, new, Image.Resampling.BICUBIC)).max() < 1e-5
        assert np.abs(linear[channel].numpy() - as_pillow(plane, new, Image.Resampling.BILINEAR)).max() < 1e-5


@torch.no_grad()
def test_a_teacher_of_other_patches_at_another_size(coarse):
    """Student: 6 px, 3 x 3 patches of 2. Teacher: 12 px, 4 x 4 of 3."""
    objective = built(coarse, teacher_image_size=12, features="full")
    assert objective.settings.image_size == 12
    assert objective.settings.data_patch_size == 4
    batch = replace(random_batch(), image=torch.randn(5, 3, 12, 12, dtype=torch.float64))
    found = objective(batch, counts_of(batch))
    small = resize_images(batch.image, 6)
    alone = objective.student(replace(batch, image=small), counts_of(batch))
    assert found["pixel_loss"] == alone["pixel_loss"] and found["caption_loss"] == alone["caption_loss"]
    target = load_model(coarse, dtype=torch.float64).encoder(batch.image)  # (B, 16, E)
    predicted = objective.projection(objective.encoder(small))
    target = resize_features(target, 3)
    deviation = (target.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (predicted - (target - target.mean(dim=-1, keepdim=True)) / deviation).square().mean()
    assert found["feature_loss"].item() == pytest.approx(expected.item(), rel=1e-10)


@torch.no_grad()
def test_a_teacher_of_the_same_grid_sees_what_the_prefix_mask_shows(coarse):
    """Student: 12 px, 3 x 3 patches of 4. Teacher: 9 px, 3 x 3 of 3; its learned positions are for 4 x 4."""
    config = replace(CONFIG, vision=replace(VISION, image_size=12, patch_size=4))
    settings = {"features": "prefix", "teacher_image_size": 9}
    objective = DistillConfig(student=config, teacher=coarse, **settings).build().double()
    assert objective.settings.image_size == 12 and objective.settings.data_patch_size == 4
    batch = replace(random_batch(), image=torch.randn(5, 3, 12, 12, dtype=torch.float64))
    found = objective(batch, counts_of(batch))
    mask = prefix_mask(batch.prefix_length, N)
    encoder = load_encoder(coarse, image_size=9, dtype=torch.float64).encoder
    target = encoder(resize_images(batch.image, 9), mask)
    expected = losses.features(objective.projection(objective.encoder(batch.image, mask)), target) / len(batch)
    # positions interpolated in fp32 before they were float64, and after
    assert found["feature_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_fixed_positions_lie_over_the_range_that_they_were_trained_on(native):
    """As `load_encoder` lays them for the same size, not running on."""
    objective = built(native, features="full", teacher_image_size=12)
    assert load_encoder(native, image_size=12).encoder.config.position_scale == 0.5
    batch = replace(random_batch(), image=torch.randn(5, 3, 12, 12, dtype=torch.float64))
    found = objective(batch, counts_of(batch))
    target = load_encoder(native, image_size=12, dtype=torch.float64).encoder(batch.image)
    predicted = objective.projection(objective.encoder(resize_images(batch.image, 6)))
    expected = losses.features(predicted, resize_features(target, 3)) / len(batch)
    assert found["feature_loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_prefixes_drawn_for_another_grid_are_refused(coarse):
    objective = built(coarse, teacher_image_size=12, features="full")
    batch = replace(random_batch(), image=torch.randn(5, 3, 12, 12, dtype=torch.float64), num_patches=36)
    with pytest.raises(ValueError, match=r"images of 36 patches: expected 9, .* 12 px give at a patch size of 4"):
        objective(batch, counts_of(batch))


# --- native resolution


def strips(grids: list[tuple[int, int]], rows: slice = slice(None)) -> Batch:
    """Images of these grids, each beside its own caption."""
    random = torch.Generator().manual_seed(1)
    images = [torch.randn(3, r * P, c * P, generator=random, dtype=torch.float64) for r, c in grids]
    images, grids = images[rows], grids[rows]
    longest = max(r * c for r, c in grids)
    padded = torch.zeros(len(grids), 3, P, longest * P, dtype=torch.float64)
    for strip, image in zip(padded, images, strict=True):
        strip[..., : image.shape[1] * image.shape[2] // P] = to_strip(image, P)
    plain = part_of(random_batch(), rows)
    return replace(
        plain,
        image=padded,
        grid=torch.tensor(grids),
        num_patches=longest,
        prefix_length=torch.tensor([1 + (r * c) // 3 for r, c in grids]),
    )


GRIDS = [(3, 3), (2, 5), (1, 2), (4, 1), (2, 2)]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("source", ["native", "teacher"])  # sincos, and learned positions interpolated for each
def test_a_batch_of_mixed_sizes_equals_one_by_one(request, source, features):
    settings = {"features": features, "prediction_weight": 1.0}
    objective = DistillConfig(student=NATIVE, teacher=request.getfixturevalue(source), **settings).build().double()
    whole = strips(GRIDS)
    parts = [strips(GRIDS, slice(i, i + 1)) for i in range(len(GRIDS))]
    counts = counts_of(whole)
    found = objective(whole, counts)
    found["loss"].backward()
    expected = vector(objective)
    objective.zero_grad()
    one_by_one = [objective(part, counts) for part in parts]
    for part in one_by_one:
        part["loss"].backward()
    # float64; in other shapes, sums run in another order
    assert (vector(objective) - expected).norm() / expected.norm() < 1e-12
    for name, value in found.items():
        assert sum(part[name].item() for part in one_by_one) == pytest.approx(value.item(), rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("features", FEATURES)
def test_a_square_strip_is_its_image(native, features):
    settings = {"features": features, "prediction_weight": 1.0}
    objective = DistillConfig(student=NATIVE, teacher=native, **settings).build().double()
    batch = random_batch()
    strip = replace(batch, image=to_strip(batch.image, P), grid=torch.tensor([[GRID, GRID]] * len(batch)))
    found, expected = objective(strip, counts_of(strip)), objective(batch, counts_of(batch))
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12)
