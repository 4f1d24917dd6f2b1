"""AIMv2 on strips, images of different grids in one micro-batch: the same as those images one by one.

One by one is the ordinary path, which `test_aimv2.py` compares with the equations.
"""

from dataclasses import replace

import pytest
import torch
from strips import image_batch, random_images, strip_batch, strips
from tiny_aimv2 import CONFIG, DECODER, VISION, P, counts_of, gradients, random_batch, random_model

from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.native import NativeConfig
from aimv2.data.transforms import TransformConfig

NATIVE = replace(CONFIG, vision=replace(VISION, positions="sincos"))
TABLE = replace(CONFIG, vision=replace(VISION, positions="interpolated"))
GRIDS = [(3, 3), (1, 7), (4, 3), (2, 1), (5, 2)]
TEXTS = [[], [3, 4, 5, 6, 7, 1], [5, 5, 1], [1], [9, 8, 7, 1]]
PREFIXES = [1, 6, 5, 1, 4]


def batches(seed: int = 0, **changes) -> tuple[Batch, list[Batch]]:
    torch.manual_seed(seed)
    images = random_images(GRIDS, P)
    ones = [image_batch(*sample, P) for sample in zip(images, TEXTS, PREFIXES, strict=True)]
    return strip_batch(images, TEXTS, PREFIXES, P, **changes), ones


def losses_and_gradients(model, parts: list[Batch], counts) -> tuple[dict[str, float], list[torch.Tensor]]:
    model.zero_grad()
    total = {}
    for part in parts:
        losses = model(part, counts)
        losses["loss"].backward()
        total = {name: total.get(name, 0.0) + value.item() for name, value in losses.items()}
    return total, gradients(model)


def relative_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    a, b = (torch.cat([x.double().flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


def assert_same(found, expected):
    """In float64; sums of some hundred terms in another order."""
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", [NATIVE, TABLE], ids=["sincos", "interpolated"])
@pytest.mark.parametrize("changes", [{}, {"padding": 50.0}, {"n": 20, "padding": -3.0}], ids=["", "noise", "longer"])
def test_mixed_sizes_equal_one_by_one(config, changes):
    model, (whole, ones) = random_model(config), batches(**changes)
    counts = counts_of(*ones)
    assert counts == counts_of(whole)
    assert_same(losses_and_gradients(model, [whole], counts), losses_and_gradients(model, ones, counts))


def test_other_micro_batches_give_the_same_gradient():
    """As strips of other lengths: 9 and 7 patches, 12, 2 and 10."""
    model, (whole, _) = random_model(NATIVE), batches()
    torch.manual_seed(0)
    images = random_images(GRIDS, P)
    parts = [strip_batch(images[rows], TEXTS[rows], PREFIXES[rows], P) for rows in (slice(0, 2), slice(2, 5))]
    assert [part.num_patches for part in parts] == [9, 12]
    counts = counts_of(whole)
    assert_same(losses_and_gradients(model, parts, counts), losses_and_gradients(model, [whole], counts))


@pytest.mark.parametrize("config", [CONFIG, NATIVE], ids=["learned", "sincos"])
def test_square_images_equal_their_strips(config):
    model, batch = random_model(config), random_batch()
    image, grid = strips(list(batch.image), P)
    counts = counts_of(batch)
    found = losses_and_gradients(model, [replace(batch, image=image, grid=grid)], counts)
    assert_same(found, losses_and_gradients(model, [batch], counts))


def test_padding_neither_carries_loss_nor_is_seen():
    model, (batch, _) = random_model(NATIVE), batches(n=15, padding=2.0)
    batch.image.requires_grad_()
    outputs = []
    model.decoder.pixel_head.register_forward_hook(lambda _module, _input, out: outputs.append(out))
    loss = model(batch, counts_of(batch))["loss"]
    of_pixels, of_image = torch.autograd.grad(loss, [*outputs, batch.image])
    supervised = of_pixels.abs().sum(-1) > 0
    expected = [[s - 1 <= i <= h * w - 2 for i in range(15)] for s, (h, w) in zip(PREFIXES, GRIDS, strict=True)]
    assert supervised.tolist() == expected
    seen = of_image.unflatten(3, (15, P)).abs().sum((1, 2, 4)) > 0
    # an image without a caption is looked at up to its last patch but one; its last is only a target, without gradient
    counts = [h * w - (not text) for (h, w), text in zip(GRIDS, TEXTS, strict=True)]
    last = [seen[i, c:].any().item() for i, c in enumerate(counts)]
    assert not any(last[1:]) and all(seen[i, :c].all() for i, c in enumerate(counts))
    assert not seen[0, 9:].any()


@torch.no_grad()
def test_captions_of_mixed_sizes_equal_one_by_one():
    model, (batch, ones) = random_model(NATIVE), batches(n=14, padding=9.0)
    real = batch.real_patches()
    features = model.encoder(batch.image, real[:, None, None], grid=batch.grid)
    captions = model.decoder.generate(features, real=real, eos_id=1)
    assert captions == [model.decoder.generate(model.encoder(one.image), eos_id=1)[0] for one in ones]
    assert len(set(map(tuple, captions))) > 1


def test_edges_are_finite():
    """Two patches, no caption at all, and far more padding than image."""
    model = random_model(NATIVE, torch.float32)
    batch = strip_batch(random_images([(1, 2), (2, 1)], P, torch.float32), [[], []], [1, 1], P, n=30)
    losses = model(batch, counts_of(batch))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["pixel_loss"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bf16():
    """sincos positions are made in fp32: added as such they would turn everything after them to fp32 (facts, 5.7)."""
    model, (whole, ones) = random_model(NATIVE, torch.bfloat16), batches()
    dtypes = set()
    for part in (model.encoder, model.decoder.pixel_head, model.decoder.text_head):
        part.register_forward_hook(lambda _module, _input, out: dtypes.add(out.dtype))
    whole, *ones = (replace(batch, image=batch.image.float()) for batch in (whole, *ones))
    found = losses_and_gradients(model, [whole], counts_of(whole))
    expected = losses_and_gradients(model, ones, counts_of(whole))
    assert dtypes == {torch.bfloat16}
    assert found[0] == pytest.approx(expected[0], rel=2**-9)  # the same values are rounded, to 8 bits each
    # and gradients are summed in another order, in bf16
    assert relative_difference(found[1], expected[1]) < 2**-6


def test_learned_positions_refuse_native_data():
    data = DataConfig(
        train=[Source(name="a", shards="a.tar")],
        tokenizer="t",
        transform=TransformConfig(image_size=VISION.image_size, crop_scale=None),
        native=NativeConfig(min_patches=4, max_patches=16),
        context_length=DECODER.context_length,
    )
    NATIVE.check(data)
    TABLE.check(data)
    with pytest.raises(ValueError, match=r"positions 'learned' with data\.native: expected 'sincos'"):
        CONFIG.check(data)
    CONFIG.check(replace(data, native=None))
