import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor, v2

from aimv2.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    BadImage,
    TransformConfig,
    decode_image,
    draft_size,
    eval_transform,
    normalize,
    random_crop,
    resize_transform,
    train_transform,
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that JPEG and resampling keep it, and different in every corner and channel."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return float(np.abs(np.asarray(a).astype(float) - np.asarray(b)).mean())


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_decodes_what_pillow_decodes(kind):
    data = encode(picture(70, 50), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert difference(decode_image(data), expected) == 0


def test_progressive_grey_and_palette_images():
    image = picture(70, 50)
    assert difference(decode_image(encode(image, "JPEG", progressive=True, quality=95)), image) < 2
    assert difference(decode_image(encode(image.convert("L"))), image.convert("L").convert("RGB")) == 0
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert difference(decode_image(encode(palette)), palette.convert("RGB")) == 0


def test_cmyk():
    """Pillow's own conversion there and back is exact; JPEG costs a little."""
    image = picture(70, 50)
    assert difference(decode_image(encode(image.convert("CMYK"), "JPEG", quality=95)), image) < 3


def test_16_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    found = np.asarray(decode_image(encode(Image.fromarray(ramp))))
    assert np.array_equal(found[..., 0], (ramp >> 8).astype(np.uint8))
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_white(mode):
    image, see_through = picture(64, 48), (slice(0, 24), slice(0, 64))
    options = {}
    if mode in ("RGBA", "LA"):
        alpha = np.full((48, 64), 255, np.uint8)
        alpha[see_through] = 0
        image = image.convert(mode[:-1])
        image.putalpha(Image.fromarray(alpha))
    else:  # one colour is transparent
        ImageDraw.Draw(image).rectangle((0, 0, 63, 23), fill=(1, 2, 3))
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
        options["transparency"] = image.getpixel((0, 0))
    found = np.asarray(decode_image(encode(image, **options)))
    assert (found[:23] == 255).all()
    opaque = np.asarray(image.convert("RGB"))[25:]
    assert np.abs(found[25:].astype(int) - opaque).mean() < 1


def test_half_transparency_is_mixed_with_white():
    grey = Image.new("RGBA", (40, 40), (100, 0, 200, 128))
    found = decode_image(encode(grey)).getpixel((20, 20))
    assert found == pytest.approx([255 - (255 - c) * 128 / 255 for c in (100, 0, 200)], abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind, orientation):
    """The oracle is Pillow's own exif_transpose."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(72, 40), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert difference(decode_image(data), expected) == 0


def test_broken_exif_of_a_good_image():
    data = encode(picture(72, 40), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert decode_image(data).size == (72, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((20, 20)) == pytest.approx((255, 0, 0), abs=2)


def test_draft_shrinks_large_jpegs_and_only_as_far_as_asked():
    image = picture(1600, 1200)
    data = encode(image, "JPEG", quality=95)
    drafted = decode_image(data, draft_size=256)
    assert drafted.size == (400, 300)  # 1/8 would leave 150
    assert difference(drafted, image.resize(drafted.size, Image.Resampling.BOX)) < 1.5
    assert decode_image(data).size == (1600, 1200)
    assert decode_image(data, draft_size=1201).size == (1600, 1200)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side: int) -> bytes:
    """A PNG of a kilobyte that says it is large."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
NOISE = np.random.default_rng(0).bytes(5000)

HOSTILE = {
    "64 megapixels": (lambda: bomb(8_000), "over 50 megapixels"),
    "144 megapixels": (lambda: bomb(12_000), "over 50 megapixels"),
    "3600 megapixels": (lambda: bomb(60_000), "over 50 megapixels"),
    "eps": (lambda: EPS, "not a JPEG, PNG, WEBP, GIF, BMP"),
    "tiff": (lambda: encode(picture(64, 48), "TIFF"), "not a JPEG"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>", "not a JPEG"),
    "empty": (lambda: b"", "not a JPEG"),
    "noise": (lambda: NOISE, "not a JPEG"),
    "noise after a jpeg's start": (lambda: b"\xff\xd8\xff\xe0" + NOISE, "not a JPEG|undecodable"),
    "truncated jpeg": (lambda: encode(picture(200, 200), "JPEG")[:-400], "undecodable"),
    "truncated png": (lambda: encode(picture(200, 200))[:-4000], "undecodable"),
    "truncated webp": (lambda: encode(picture(200, 200), "WEBP")[:-200], "undecodable|not a JPEG"),
    "truncated gif": (lambda: encode(picture(200, 200), "GIF")[:-4000], "undecodable"),
    "small": (lambda: encode(picture(64, 31)), "a side under 32 pixels"),
    "long": (lambda: encode(picture(400, 39)), "an aspect ratio over 10"),
    "large file": (lambda: bytes((32 << 20) + 1), "over 32 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_with_a_reason(name):
    make, reason = HOSTILE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=f"^({reason})"):
            decode_image(make())


def test_limits_are_inclusive():
    assert decode_image(encode(picture(320, 32))).size == (320, 32)
    assert decode_image(encode(picture(8, 8)), min_size=8).size == (8, 8)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
def test_any_damage_gives_an_image_or_a_reason(data, kind):
    content = bytearray(encode(picture(48, 40), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 400)))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    try:
        image = decode_image(bytes(content), draft_size=16)
    except BadImage as error:
        assert str(error)
    else:
        assert image.mode == "RGB"


# --- transforms -----------------------------------------------------------------------------------------------------


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


def test_train_transform_is_torchvisions_for_the_crop_that_was_drawn():
    config, image = TransformConfig(image_size=40, flip=1.0), picture(120, 90)
    left, top, right, bottom = random_crop(image.size, config.crop_scale, config.crop_ratio, np.random.default_rng(5))
    cropped = v2.functional.resized_crop(
        image, top, left, bottom - top, right - left, [40, 40], InterpolationMode.BICUBIC, antialias=True
    )
    theirs = torchvision_normalize(config)(v2.functional.horizontal_flip(cropped))
    assert torch.equal(train_transform(image, config, np.random.default_rng(5)), theirs)


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
    plain, rng = normalize(image, config.mean, config.std), np.random.default_rng(0)
    flipped = 0
    for _ in range(1000):
        found = train_transform(image, config, rng)
        flipped += torch.equal(found, plain.flip(-1))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(-1))
    assert abs(flipped - 300) < 5 * 14.5


def test_without_a_crop_the_whole_image_is_resized():
    config = TransformConfig(image_size=32, crop_scale=None, flip=0.0)
    wide = picture(96, 40)
    expected = normalize(wide.resize((32, 32), Image.Resampling.BICUBIC), config.mean, config.std)
    assert torch.equal(train_transform(wide, config, np.random.default_rng(0)), expected)
    assert torch.equal(resize_transform(wide, config), expected)


def test_the_draft_never_makes_a_crop_smaller_than_the_result():
    config = TransformConfig(image_size=64)
    shortest = draft_size(config)
    assert shortest == math.ceil(64 / math.sqrt(0.4 * 0.75))
    for seed in range(500):
        size = (shortest, shortest + seed % 60)
        left, top, right, bottom = random_crop(size, config.crop_scale, config.crop_ratio, np.random.default_rng(seed))
        assert min(right - left, bottom - top) >= 64


def test_nothing_is_drawn_from_the_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train_transform(picture(64, 64), TransformConfig(image_size=32), np.random.default_rng(0))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


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
