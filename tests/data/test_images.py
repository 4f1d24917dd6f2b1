import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import difference, encode, picture
from PIL import Image, ImageDraw, ImageOps

from aimv2.data import transforms
from aimv2.data.images import BadImage, decode_image
from aimv2.data.transforms import (
    TransformConfig,
    training_image,
)


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


# Pixels times the bytes that Pillow needs for each, against 290 MB. Measured: 24.7 a pixel for a WebP with alpha, 18.3
# without, 16 for a PNG.
LARGE = {
    "png": (bomb(3_910), "over 300 MB to decode"),
    "a smaller png": (bomb(3_900), None),
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
