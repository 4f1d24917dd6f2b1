import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, picture
from PIL import Image, ImageOps
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor, v2

from aimv2.data import images, transforms
from aimv2.data.images import BadImage, decode_image
from aimv2.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    TransformConfig,
    eval_transform,
    normalize,
    normalize_batch,
    random_crop,
    resize_transform,
    training_image,
    validation_image,
)


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Both ways to the same pixels of an ordinary JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


def torchvision_normalize(config: TransformConfig) -> Compose:
    return Compose([ToTensor(), Normalize(config.mean, config.std)])


@pytest.mark.parametrize("config", [TransformConfig(), TransformConfig(mean=CLIP_MEAN, std=CLIP_STD)])
def test_normalisation_is_torchvisions_bit_for_bit(config):
    image = picture(31, 17)
    found = normalize(image, config.mean, config.std)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(found, torchvision_normalize(config)(image))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(32, 200), height=st.integers(32, 200), size=st.sampled_from([32, 56, 65]))
def test_eval_transform_is_torchvisions(width, height, size):
    config, image = TransformConfig(image_size=size), picture(width, height)
    theirs = Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(size), torchvision_normalize(config)])
    assert torch.equal(eval_transform(image, config), theirs(image))


def resized(image: Image.Image, size: int) -> Image.Image:
    """By Pillow, across and then down, as torch does. Left alone, Pillow resizes some tall images down first."""
    across = image.resize((size, image.height), Image.Resampling.BICUBIC)
    return across.resize((size, size), Image.Resampling.BICUBIC)


def pillows(data: bytes, config: TransformConfig, rng: np.random.Generator) -> Image.Image:
    """A training image made of a whole decoded one, by Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    box = random_crop(image.size, config.crop_scale, config.crop_ratio, rng)
    image = resized(image.crop(box), config.image_size)
    return ImageOps.mirror(image) if rng.random() < config.flip else image


def levels(found: torch.Tensor, expected: Image.Image) -> np.ndarray:
    """Absolute differences."""
    assert found.dtype == torch.uint8 and tuple(found.shape[1:]) == (expected.height, expected.width)
    return np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """The hardest to resize alike: everything is clipped somewhere."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_training_images_are_pillows_within_two_levels(decoder):
    """The same crop and flip out of the same draws.

    torch and Pillow both resize in integers, of other precision: each pass may differ by one level in 255, and rarely
    does. Sides are under 2 S, or a JPEG would be decoded at 1/2.
    """
    config = TransformConfig(image_size=40)
    for seed in range(60):
        size, make = np.random.default_rng(seed).integers(32, 80, 2).tolist(), noise if seed % 2 else picture
        data = encode(make(*size, seed), *(("JPEG",) if seed % 3 else ("PNG",)))
        rng, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        found, expected = training_image(data, config, rng), pillows(data, config, theirs)
        assert levels(found, expected).max() <= 2 and levels(found, expected).mean() < 0.1
        assert rng.bit_generator.state == theirs.bit_generator.state  # nothing else was drawn


def test_training_images_are_torchvisions():
    """Whichever way Pillow goes first; only what is clipped between the passes can depend on it."""
    config = TransformConfig(image_size=40, flip=0.0)
    for seed, size in enumerate([(120, 90), (90, 120), (60, 200), (200, 60), (33, 50), (41, 32)]):
        image = picture(*size, seed)
        box = random_crop(size, config.crop_scale, config.crop_ratio, np.random.default_rng(seed))
        left, top, right, bottom = box
        theirs = v2.functional.resized_crop(
            image, top, left, bottom - top, right - left, [40, 40], InterpolationMode.BICUBIC, antialias=True
        )
        found = levels(training_image(encode(image), config, np.random.default_rng(seed)), theirs)
        assert found.max() <= 2 and found.mean() < 0.1


ORDINARY = {
    "baseline": {},
    "progressive": {"progressive": True},
    "no chroma subsampling": {"subsampling": 0},
    "half of it": {"subsampling": 1},
    "restart markers": {"restart_marker_rows": 1},
    "optimized": {"optimize": True},
    "low quality": {"quality": 5},
    "rgb": {"keep_rgb": True},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ORDINARY)
def test_simplejpeg_gives_pillows_pixels(name, mode, monkeypatch):
    """Bit for bit: whether it is installed must not change a run."""
    pytest.importorskip("simplejpeg")
    config = TransformConfig(image_size=97, crop_scale=None, flip=0.0)
    image = noise(97, 97).convert(mode)
    data = encode(image, "JPEG", **({} if mode == "L" and name == "rgb" else ORDINARY[name]))
    found = training_image(data, config, None)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(found, training_image(data, config, None))
    assert levels(found, Image.open(io.BytesIO(data)).convert("RGB")).max() == 0


@settings(max_examples=300, deadline=None)
@given(data=st.data(), progressive=st.booleans())
def test_simplejpeg_and_pillow_refuse_the_same_damage(data, progressive):
    pytest.importorskip("simplejpeg")
    config = TransformConfig(image_size=48, crop_scale=None, flip=0.0)
    content = bytearray(encode(picture(48, 48), "JPEG", progressive=progressive))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    outcomes = []
    for decoder in (images.simplejpeg, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "simplejpeg", decoder)
            try:
                outcomes.append(training_image(content, config, None).tolist())
            except BadImage as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_a_jpeg_cut_anywhere_is_refused(kind, decoder):
    """A decoder that fills what is missing with grey would fail this. The last bytes may be no part of the picture."""
    config = TransformConfig(image_size=32)
    data = encode(noise(100, 80), "JPEG", progressive=kind == "progressive")
    for length in range(0, len(data) - 100, 250):
        with pytest.raises(BadImage):
            training_image(data[:length], config, np.random.default_rng(0))


def odd(name: str) -> bytes:
    image = picture(72, 60)
    if name == "16 bits":
        return encode(Image.fromarray(np.linspace(0, 65535, 72 * 60).astype(np.uint16).reshape(60, 72)))
    if name == "alpha":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return encode(image, "WEBP", lossless=True)
    if name == "palette":
        return encode(image.convert("P", palette=Image.Palette.ADAPTIVE), transparency=3)
    return encode(image.convert("CMYK"), "JPEG")


@pytest.mark.parametrize("name", ["16 bits", "alpha", "palette", "cmyk"])
def test_odd_images_are_trained_on_as_decode_image_gives_them(name):
    config = TransformConfig(image_size=40, flip=0.0)
    image = decode_image(odd(name))
    box = random_crop(image.size, config.crop_scale, config.crop_ratio, np.random.default_rng(3))
    found = training_image(odd(name), config, np.random.default_rng(3))
    assert levels(found, resized(image.crop(box), 40)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_crop_is_of_the_upright_image(kind, orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    config, data = TransformConfig(image_size=40), encode(picture(130, 70), kind, exif=exif)
    found = training_image(data, config, np.random.default_rng(5))
    assert levels(found, pillows(data, config, np.random.default_rng(5))).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_as_small_as_the_crop_allows(orientation, decoder, monkeypatch):
    """At 1/2, 1/4 or 1/8, never below S pixels a side, and the same part of the image.

    It is rounded to whole pixels of that scale. Half of one is 4 pixels at 1/8, and the picture changes by 1 level a
    pixel: 3 on average is what rounding can do. Another crop differs by over 5.
    """
    decoded = []
    resize = transforms._resize_pixels
    monkeypatch.setattr(
        transforms, "_resize_pixels", lambda pixels, s: decoded.append(pixels.shape) or resize(pixels, s)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(1001, 799), "JPEG", quality=95, exif=exif)
    scales = set()
    for seed in range(20):
        size = (48, 96, 192, 384)[seed % 4]
        config = TransformConfig(image_size=size)
        drawn = (1001, 799) if orientation == 1 else (799, 1001)
        left, top, right, bottom = random_crop(drawn, config.crop_scale, config.crop_ratio, np.random.default_rng(seed))
        found = training_image(data, config, np.random.default_rng(seed))
        assert levels(found, pillows(data, config, np.random.default_rng(seed))).mean() < 3
        assert levels(found, pillows(data, config, np.random.default_rng(seed + 1))).mean() > 5
        scale = round((right - left) / decoded[-1][1])
        scales.add(scale)
        assert min(right - left, bottom - top) >= scale * size and min(decoded[-1][:2]) >= size - 1  # rounded
        assert scale == 8 or min(right - left, bottom - top) < 2 * scale * size
    assert scales == {1, 2, 4, 8}


@pytest.mark.parametrize("crop_scale", [None, (0.4, 1.0)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_validation_images_are_those_of_the_eval_transforms(kind, crop_scale):
    """Bit for bit, normalised in a batch: what the Processor gives."""
    config = TransformConfig(image_size=40, crop_scale=crop_scale)
    files = [encode(picture(*size), kind) for size in ((72, 51), (40, 40), (33, 90))]
    batch = normalize_batch([validation_image(data, config) for data in files], config.mean, config.std)
    transform = eval_transform if crop_scale else resize_transform
    assert torch.equal(batch, torch.stack([transform(decode_image(data), config) for data in files]))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of the two empirical distribution functions."""
    at = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("size", [(100, 100), (100, 70), (64, 200), (400, 50)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 1.0)])
def test_crops_are_distributed_as_torchvisions(size, scale):
    """Two-sample Kolmogorov-Smirnov. With 4,000 draws each, 0.047 has probability 0.0003 if they are equal.

    Both streams are fixed, so the outcome is too.
    """
    image, ratio = Image.new("RGB", size), (3 / 4, 4 / 3)
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    ours = np.array([random_crop(size, scale, ratio, rng) for _ in range(4000)])
    ours[:, 2:] -= ours[:, :2]  # left, top, width, height
    theirs = []
    for _ in range(4000):
        p = v2.RandomResizedCrop(32, scale, ratio).make_params([image])
        theirs.append((p["left"], p["top"], p["width"], p["height"]))
    theirs = np.array(theirs)
    for name, get in {
        "left": lambda c: c[:, 0],
        "top": lambda c: c[:, 1],
        "width": lambda c: c[:, 2],
        "height": lambda c: c[:, 3],
        "area": lambda c: c[:, 2] * c[:, 3],
    }.items():
        assert distance(get(ours), get(theirs)) < 0.047, name


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
def test_crops_lie_inside(width, height, seed):
    left, top, right, bottom = random_crop((width, height), (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_flips_come_as_often_as_asked():
    """Binomial, 1,000 draws at 0.3: deviation 14.5, bound 5 deviations."""
    config, image = TransformConfig(image_size=32, crop_scale=None, flip=0.3), picture(32, 32)
    data, plain, rng = encode(image), torch.from_numpy(np.array(image)).permute(2, 0, 1), np.random.default_rng(0)
    flipped = 0
    for _ in range(1000):
        found = training_image(data, config, rng)
        flipped += torch.equal(found, plain.flip(-1))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(-1))
    assert abs(flipped - 300) < 5 * 14.5


def test_without_a_crop_the_whole_image_is_resized():
    config = TransformConfig(image_size=32, crop_scale=None, flip=0.0)
    wide = picture(96, 40)
    expected = wide.resize((32, 32), Image.Resampling.BICUBIC)
    assert levels(training_image(encode(wide), config, None), resized(wide, 32)).max() <= 1
    assert torch.equal(resize_transform(wide, config), normalize(expected, config.mean, config.std))


def test_nothing_is_drawn_from_the_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    training_image(encode(picture(64, 64)), TransformConfig(image_size=32), np.random.default_rng(0))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_a_batch_made_in_a_worker_is_shared():
    """Else it would be copied once more on its way to the main process."""

    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, _):
            batch = normalize_batch([torch.arange(48, dtype=torch.uint8).view(3, 4, 4)] * 2, CLIP_MEAN, CLIP_STD)
            return batch, batch.is_shared()

    load = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=1)
    (batch, shared), (plain, not_shared) = next(iter(load)), Batches()[0]
    assert shared and not not_shared and torch.equal(batch, plain)


CHANGES = [
    {"image_size": 0},
    {"flip": 1.5},
    {"crop_scale": (0.0, 1.0)},
    {"crop_scale": (0.9, 0.4)},
    {"crop_ratio": (2.0, 1.0)},
    {"std": (0.0, 1.0, 1.0)},
]


@pytest.mark.parametrize("change", CHANGES)
def test_refused_configs(change):
    with pytest.raises(ValueError, match="expected"):
        TransformConfig(**change)
