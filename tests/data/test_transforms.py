import io
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

from aimv2.data import transforms
from aimv2.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    BadImage,
    TransformConfig,
    decode_image,
    eval_transform,
    normalize,
    normalize_batch,
    random_crop,
    resize_transform,
    training_image,
    validation_image,
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


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Both ways to the same pixels of an ordinary JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr(transforms, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


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


def header(width: int, height: int, mode: str) -> bytes:
    """A JPEG of this mode that says it is large, and ends after a few blocks."""
    data = bytearray(encode(Image.new(mode, (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(count: int) -> bytes:
    """The last scan of a progressive JPEG, again and again: each passes over all pixels, and adds none."""
    data = encode(picture(64, 48), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def bmp_of_runs() -> bytes:
    """Pillow decodes runs in Python: 50 megapixels in minutes."""
    data = bytearray(encode(picture(64, 48).convert("P"), "BMP"))
    data[30:34] = struct.pack("<I", 1)  # BI_RLE8
    return bytes(data)


def many_texts(count: int) -> bytes:
    """Each inflates to a megabyte as soon as the file is opened."""
    data, text = encode(picture(64, 48)), chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))
    return data[:33] + text * count + data[33:]


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
    "scans": (lambda: many_scans(100), "over 100 scans"),
    "runs": (bmp_of_runs, "a BMP of runs"),
    "texts": (lambda: many_texts(11), "over 10 compressed texts"),
}


@pytest.mark.parametrize("read", [decode_image, lambda data: training_image(data, TransformConfig(), None)])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_with_a_reason(name, read, monkeypatch):
    """In training before a number is drawn (there is no generator), but for those that are cut off."""
    make, reason = HOSTILE[name]
    monkeypatch.setattr(transforms, "random_crop", lambda size, *_: (0, 0, *size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=f"^({reason})"):
            read(make())


def test_a_few_scans_and_texts_are_usual():
    for data in (many_scans(20), many_texts(9)):
        assert decode_image(data).size == (64, 48)


# Pixels times the bytes that Pillow needs for each (measured: 22.5 for a WebP with alpha, the most) against 290 MB.
LARGE = {
    "png": (bomb(3_480), "over 300 MB to decode"),
    "a smaller png": (bomb(3_470), None),
    "cmyk jpeg": (header(6_100, 6_100, "CMYK"), "over 300 MB to decode"),
    "a smaller cmyk jpeg": (header(6_000, 6_000, "CMYK"), None),
    "jpeg": (header(7_000, 7_000, "RGB"), "over 300 MB to decode"),
    "a jpeg of a camera": (header(8_000, 6_000, "RGB"), None),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_a_training_image_may_cost(name):
    """None has most of its pixels, and so none needs the memory to say so."""
    data, reason = LARGE[name]
    try:
        training_image(data, TransformConfig(crop_scale=None, image_size=16, flip=0.0), None)
    except BadImage as error:
        assert str(error) == reason or (reason is None and str(error).startswith("undecodable"))
    else:
        assert reason is None


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
    monkeypatch.setattr(transforms, "simplejpeg", None)
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
    for decoder in (transforms.simplejpeg, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transforms, "simplejpeg", decoder)
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
