"""Native resolution from shards to strips: what a batch holds, and the same bits on any rank, worker and restart.

P is the patch side, N the patches of the longest strip, n those of one, m the number of a micro-batch over all ranks.
"""

import io
import json
import logging
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_images import made
from pictures import encode, picture
from PIL import Image, ImageOps
from test_shards import Files, write_tar

from aimv2.config import from_json, to_json
from aimv2.data.batch import Batch, count_targets
from aimv2.data.loader import DataConfig, train_loader, validation_loader
from aimv2.data.mixture import MixtureChange, Source
from aimv2.data.native import NativeConfig, SizedSample, area_grid
from aimv2.data.shards import ShardError, ensure_indices
from aimv2.data.transforms import TransformConfig, native_training_image, native_validation_image, normalize
from aimv2.patches import from_strip, patchify

P = 8
TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "shapes"
NATIVE = NativeConfig(min_patches=6, max_patches=40)


def write(folder: Path, name: str, images: list[bytes]) -> str:
    """A shard of these images, with two captions each, and its path."""
    files: Files = []
    for i, data in enumerate(images):
        record = json.dumps({"captions": [f"a red circle {i}", f"a blue square {i}"]}).encode()
        files += [(f"{i:05d}.jpg", data), (f"{i:05d}.txt", b"a circle"), (f"{i:05d}.json", record)]
    path = folder / f"{name}.tar"
    write_tar(path, files)
    ensure_indices([path])
    return str(path)


def various(count: int, bad: int = 0) -> list[bytes]:
    """Of all aspects from 1/4 to 4; the first `bad` are cut."""
    rng = np.random.default_rng(count)
    images = [made("JPEG", int(w), int(h), quality=80) for w, h in rng.integers(33, 130, (count, 2))]
    return [data[:150] if i < bad else data for i, data in enumerate(images)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """Two sources, one with bad samples; the mixture changes once. C = 4 images of 32 px = 64 patches."""
    folder = tmp_path_factory.mktemp("native")
    return DataConfig(
        train=[
            Source(name="a", shards=write(folder, "a", various(90)), weight=0.6, captions="json:captions"),
            Source(name="b", shards=write(folder, "b", various(60, bad=3)), weight=0.4),
        ],
        changes=[MixtureChange(sample=200, weights={"a": 0.2})],
        validation=Source(name="v", shards=write(folder, "v", various(25))),
        tokenizer=str(TOKENIZER),
        transform=TransformConfig(image_size=32, crop_scale=None),
        native=NATIVE,
        context_length=8,
        workers=0,
    )


def load(config: DataConfig, count: int, **place) -> list[Batch]:
    place = {"patch_size": P, "micro_batch": 4, "start": 0, "seed": 3, "rank": 0, "world_size": 1} | place
    batches = iter(train_loader(config, **place))
    found = list(islice(batches, count))
    batches.close()
    return found


def validate(config: DataConfig, **place) -> list[Batch]:
    place = {"patch_size": P, "micro_batch": 4, "seed": 3, "rank": 0, "world_size": 1} | place
    return list(validation_loader(config, **place))


def equal(a: Batch, b: Batch) -> bool:
    names = ("image", "grid", "text", "text_length", "prefix_length", "sample")
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return same and (a.num_patches, a.replaced) == (b.num_patches, b.replaced)


@pytest.fixture(scope="module")
def undisturbed(config) -> list[Batch]:
    return load(config, 160)


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_it_says(undisturbed):
    first = 0
    for batch in undisturbed:
        b, n = len(batch), batch.patch_counts()
        assert batch.sample.tolist() == list(range(first, first + b))
        first += b
        assert batch.num_patches == n.max() and b * batch.num_patches <= 64 and n.min() >= 2
        assert batch.image.shape == (b, 3, P, batch.num_patches * P) and batch.image.dtype == torch.float32
        assert batch.grid.shape == (b, 2) and batch.grid.dtype == torch.int64
        assert ((batch.prefix_length >= 1) & (batch.prefix_length < n)).all()
        patches = patchify(batch.image, P)  # (B, N, 3 P^2)
        assert (patches[~batch.real_patches()] == 0).all() and (patches[batch.real_patches()] != 0).any(dim=1).all()
    assert len({batch.num_patches for batch in undisturbed}) > 15 and len({len(batch) for batch in undisturbed}) > 4
    grids = torch.cat([batch.grid for batch in undisturbed]).tolist()
    assert any(r > 2 * c for r, c in grids) and any(c > 2 * r for r, c in grids)
    assert count_targets(undisturbed)[0] == sum(
        int(n - s) for b in undisturbed for n, s in zip(b.patch_counts(), b.prefix_length, strict=True)
    )


def test_an_image_of_just_its_area_comes_through_bit_for_bit(config, tmp_path):
    """Images of whole patches, at an area where none is resized: the strips are these images, normalised."""
    pictures = {(r, c): picture(c * P, r * P, seed=r) for r, c in ((4, 6), (6, 4), (3, 8), (8, 3), (4, 6))}
    source = Source(name="v", shards=write(tmp_path, "v", [encode(p) for p in pictures.values()]), captions=None)
    transform = replace(config.transform, flip=0.0, min_size=8)
    config = replace(config, validation=source, train=[source], changes=[], transform=transform)
    config.native = NativeConfig(min_patches=24, max_patches=24)
    for batch in [*validate(config, area=24), *load(config, 5)]:
        for image, (rows, columns) in zip(batch.image, batch.grid.tolist(), strict=True):
            expected = normalize(pictures[rows, columns], transform.mean, transform.std)
            assert torch.equal(from_strip(image, rows, columns, P), expected)


@pytest.mark.parametrize("size", [(333, 211), (90, 400), (700, 700), (64, 64)])
def test_a_resized_image_is_pillows(size):
    """PNG, so that all is decoded alike. torch rounds elsewhere than Pillow, who is the oracle of training as well."""
    original = picture(*size)
    config = TransformConfig(crop_scale=None, flip=0.0)
    rows, columns = area_grid(size[1], size[0], 30)
    expected = np.asarray(original.resize((columns * P, rows * P), Image.Resampling.BICUBIC)).astype(int)
    for found in (
        native_validation_image(encode(original), config, 30, P),
        native_training_image(encode(original), config, 30, P, np.random.default_rng(0)),
    ):
        assert found.dtype == torch.uint8
        off = abs(found.permute(1, 2, 0).numpy() - expected)
        # One level a pass; 0.02 on average is what test_transforms finds on such pictures, 0.1 allows for more passes.
        assert off.max() <= 2 and off.mean() < 0.1


def test_a_large_jpeg_is_decoded_at_the_scale_that_keeps_both_sides(monkeypatch):
    from aimv2.data import transforms

    asked = []
    original = transforms.EncodedImage.decode
    monkeypatch.setattr(
        transforms.EncodedImage, "decode", lambda self, scale=1: asked.append(scale) or original(self, scale)
    )
    config = TransformConfig(crop_scale=None, flip=0.0)
    data = encode(picture(1200, 300), "JPEG", quality=95)
    for area, scale in ((16 * 4, 8), (19 * 5, 4), (37 * 9, 4), (37 * 10, 2), (150 * 37, 1)):
        found = native_training_image(data, config, area, P, np.random.default_rng(0))
        rows, columns = area_grid(300, 1200, area)
        assert found.shape == (3, rows * P, columns * P) and asked.pop() == scale
        assert scale == 1 or (scale * columns * P <= 1200 and scale * rows * P <= 300)
        whole = Image.open(io.BytesIO(data)).resize((columns * P, rows * P), Image.Resampling.BICUBIC)
        # Decoding at a scale is another low-pass filter than resizing; 3 levels as in test_transforms.
        found = found.permute(1, 2, 0).numpy().astype(int)
        assert abs(found - np.asarray(whole)).mean() < 3 < 5 < abs(found[:, ::-1] - np.asarray(whole)).mean()


def test_flips_are_as_configured(config):
    data = encode(picture(100, 60))
    transform = replace(config.transform, flip=1.0)
    flipped = native_training_image(data, transform, 30, P, np.random.default_rng(0))
    plain = native_training_image(data, replace(transform, flip=0.0), 30, P, np.random.default_rng(0))
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)
    rotated = Image.open(io.BytesIO(data))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: taller than wide
    turned = encode(rotated, "JPEG", exif=exif.tobytes(), quality=95)
    assert native_training_image(turned, replace(transform, flip=0.0), 30, P, None).shape[1:] == (7 * P, 4 * P)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).size == (60, 100)


@pytest.mark.parametrize(("area", "most"), [(16, 42.6), (9, 31.8)])
def test_prefix_lengths_are_uniform_over_each_images_own_patches(config, tmp_path, area, most):
    """Of square images. Chi-square over lengths 1 to n - 1, with the 0.9999 quantile of 14 and 7 degrees of freedom."""
    source = Source(name="s", shards=write(tmp_path, "s", [encode(picture(33, 33))] * 4), captions=None)
    config = replace(config, train=[source], changes=[])
    samples = train_loader(config, patch_size=P, micro_batch=1, start=0, seed=0, rank=0, world_size=1).dataset
    lengths = np.array([samples[SizedSample(g, area)].prefix_length for g in range(1000)])
    found = np.bincount(lengths, minlength=area + 1)
    assert found[0] == 0 and len(found) == area + 1 and found[area] == 0
    assert ((found[1:area] - 1000 / (area - 1)) ** 2 * (area - 1) / 1000).sum() < most
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 4 / 1000**0.5


def test_prefix_lengths_follow_the_draw_of_seed_and_sample(config):
    samples = train_loader(config, patch_size=P, micro_batch=1, start=0, seed=0, rank=0, world_size=1).dataset
    for example in [samples[SizedSample(g, area)] for g in range(30) for area in (6, 20, 33)]:
        patches, draw = example.grid[0] * example.grid[1], samples._generator(example.sample, 0).random()
        assert example.prefix_length == 1 + int(draw * (patches - 1))


def test_a_replacement_keeps_the_draw_and_has_its_own_grid(config, undisturbed):
    samples = train_loader(config, patch_size=P, micro_batch=1, start=0, seed=3, rank=0, world_size=1).dataset
    replaced = 0
    for batch in undisturbed:
        for r in batch.replaced:
            row = batch.sample.tolist().index(r.sample)
            draw = samples._generator(r.sample, 0).random()
            assert batch.prefix_length[row] == 1 + int(draw * (int(batch.patch_counts()[row]) - 1))
            assert r.reason == "undecodable (OSError)"
            replaced += 1
    assert replaced >= 5


def test_under_five_percent_of_the_tokens_are_padding(config):
    """From the shards themselves, at limits as small as the embedded worlds'."""
    config = replace(config, native=NativeConfig(min_patches=32, max_patches=160))
    batches = load(config, 60, micro_batch=64)
    tokens = sum(len(b) * b.num_patches for b in batches)
    real = sum(int(b.patch_counts().sum()) for b in batches)
    print(f"\n{1 - real / tokens:.2%} of {tokens} tokens are padding")
    assert 1 - real / tokens < 0.05


# --- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_for_any_number_of_ranks_and_workers(config, undisturbed, world_size, workers):
    config = replace(config, workers=workers)
    start = int(undisturbed[11].sample[0])
    place = {"start": start, "first_batch": 11, "world_size": world_size}
    for rank in range(world_size):
        found = load(config, 3, rank=rank, **place)
        assert all(map(equal, found, undisturbed[11 + rank :: world_size]))


def test_200_restarts_anywhere_go_on_bit_for_bit(config, undisturbed):
    """200 of 200: from any micro-batch, as any rank of any number of them."""
    rng, exact = np.random.default_rng(0), 0
    for _ in range(200):
        m, world_size = int(rng.integers(150)), int(rng.integers(1, 9))
        rank = int(rng.integers(world_size))
        start = int(undisturbed[m].sample[0])
        (batch,) = load(config, 1, start=start, first_batch=m, rank=rank, world_size=world_size)
        assert equal(batch, undisturbed[m + rank])
        exact += 1
    print(f"\nrestart points: {exact} of 200 exact")


def test_the_loader_says_how_many_samples_a_step_has(config, undisturbed):
    place = {"patch_size": P, "start": 0, "seed": 3, "world_size": 2}
    loader = train_loader(config, micro_batch=4, rank=1, **place)
    assert loader.order.samples(0, 160) == sum(map(len, undisturbed))
    assert loader.order.samples(40, 6) == sum(map(len, undisturbed[40:46]))
    fixed = train_loader(replace(config, native=None), micro_batch=4, rank=1, **place)
    assert fixed.order.samples(40, 6) == 24


def test_a_start_far_out_is_as_quick_as_any(config):
    """Nothing before it is computed (see test_native); `pytest -s` prints the time."""
    begin = time.perf_counter()
    (batch,) = load(config, 1, start=5 * 10**8, first_batch=3 * 10**7, rank=3, world_size=8)
    print(f"\nfirst batch at g = 5e8, m = 3e7: {1000 * (time.perf_counter() - begin):.0f} ms")
    order = train_loader(config, patch_size=P, micro_batch=4, start=0, seed=3, rank=0, world_size=1).order
    assert batch.sample[0] == 5 * 10**8 + order.samples(3 * 10**7, 3)


def test_the_seed_changes_areas_prefixes_and_order(config, undisturbed):
    other = load(config, 20, seed=4)
    assert [b.num_patches for b in other] != [b.num_patches for b in undisturbed[:20]]
    assert [len(b) for b in other] != [len(b) for b in undisturbed[:20]]


def test_areas_share_no_random_numbers_with_samples(config):
    loader = train_loader(config, patch_size=P, micro_batch=4, start=0, seed=3, rank=0, world_size=1)

    def area_from(m: int) -> int:
        """Drawn as an area is, by the generator of sample m."""
        rng = loader.dataset._generator(m, 0)
        share = (next(x for x in iter(rng.standard_normal, None) if abs(x) <= 1) + 1) / 2
        return round(6 * (40 / 6) ** share)

    # Of two independent draws a few of the 35 areas are equal by chance.
    assert sum(loader.order.area(m) == area_from(m) for m in range(100)) < 20


def test_the_global_generators_are_left_alone(config):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(config, 2)
    validate(config)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


# --- validation -----------------------------------------------------------------------------------------------------


def test_validation_has_one_area_and_a_fixed_order(config):
    whole = validate(config)
    assert torch.cat([b.sample for b in whole]).tolist() == list(range(25))
    assert [len(b) for b in whole] == [4] * 6 + [1]
    ranks = [validate(config, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(torch.cat([b.sample for rank in ranks for b in rank]).tolist()) == list(range(25))
    prefixes = {int(g): int(s) for b in whole for g, s in zip(b.sample, b.prefix_length, strict=True)}
    grids = {int(g): grid for b in whole for g, grid in zip(b.sample, b.grid.tolist(), strict=True)}
    for batch in (b for rank in ranks for b in rank):
        assert [prefixes[g] for g in batch.sample.tolist()] == batch.prefix_length.tolist()
        assert [grids[g] for g in batch.sample.tolist()] == batch.grid.tolist()
    images = various(25)
    for g, grid in grids.items():
        width, height = Image.open(io.BytesIO(images[g])).size
        assert tuple(grid) == area_grid(height, width, 16)  # 32 px of patches of 8
    # It does without random numbers, and so is never mirrored.
    flipped = replace(config, transform=replace(config.transform, flip=1.0))
    assert all(equal(a, b) for a, b in zip(whole, validate(flipped), strict=True))


@pytest.mark.parametrize("area", [6, 16, 41])
def test_validation_at_another_area(config, area):
    batches = validate(config, area=area, limit=10)
    assert sum(map(len, batches)) == 10
    assert all((b.patch_counts() <= area).all() and (b.patch_counts() > area // 2).all() for b in batches)
    # A config of a fixed size can be looked at in strips, too.
    fixed = validate(replace(config, native=None), area=area, limit=10)
    assert all(map(equal, fixed, batches))
    assert equal(validate(config, area=16)[0], validate(config)[0])


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_crop_at_native_resolution_is_refused(config):
    with pytest.raises(ValueError, match=r"transform.crop_scale \(0.4, 1.0\) with native: expected None"):
        replace(config, transform=TransformConfig(image_size=32))


@pytest.mark.parametrize("area", [1, 0, -16])
def test_an_area_of_no_two_patches_is_refused(config, area):
    with pytest.raises(ValueError, match=f"area {area}: expected 2 patches or more"):
        validate(config, area=area)


def test_areas_over_the_budget_are_said_once_by_the_first_rank(config, caplog):
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            batches = load(config, 3, micro_batch=1, rank=rank, world_size=2)
            assert all(b.num_patches <= 40 for b in batches)
    words = "native: images of up to 40 patches, one by one, exceed a micro-batch of 16, 1 images of 32 pixels"
    assert [message for message in caplog.messages if message.startswith("native")] == [words]
    caplog.clear()
    load(config, 1, micro_batch=3)
    assert not [message for message in caplog.messages if message.startswith("native")]


def test_a_source_of_bad_images_ends_with_one_error(config, tmp_path):
    source = Source(name="ruin", shards=write(tmp_path, "ruin", various(5, bad=5)))
    with pytest.raises(ShardError, match=r"no usable sample in 9 tries: .*undecodable"):
        load(replace(config, train=[source], changes=[]), 1)


def test_images_of_the_greatest_aspects_fit(config, tmp_path):
    images = [made("PNG", 330, 33), made("PNG", 33, 330), made("PNG", 33, 33)]
    source = Source(name="v", shards=write(tmp_path, "v", images), captions=None)
    for area in (2, 3, 6, 40):
        (batch,) = validate(replace(config, validation=source), area=area)
        assert batch.grid.tolist() == [list(area_grid(*size, area)) for size in ((33, 330), (330, 33), (33, 33))]
        assert not batch.replaced


def test_a_native_config_survives_json(config):
    entry = json.loads(json.dumps(to_json(config)))
    assert entry["native"] == {"min_patches": 6, "max_patches": 40, "shared_by": 1}
    assert from_json(DataConfig, entry) == config
    assert from_json(DataConfig, {**entry, "native": None}).native is None


def test_a_fixed_size_has_no_grid(config):
    fixed = replace(config, native=None)
    for batch in (*load(fixed, 2), *load(fixed, 2, first_batch=77), *validate(fixed)):
        assert batch.grid is None and batch.real_patches() is None and batch.image.shape[2:] == (32, 32)
    assert all(
        torch.equal(a.image, b.image) for a, b in zip(load(fixed, 3), load(fixed, 3, first_batch=5), strict=True)
    )
