import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tars import picture
from PIL import Image

pytest.importorskip("sentencepiece")

from aimv2.data.tokenizer import MOST_CHARACTERS, Tokenizer, clean_caption
from aimv2.ingest.measures import (
    CaptionMeasures,
    MeasureConfig,
    find_caption,
    find_numbers,
    measure_caption,
    measure_image,
    parse_json,
    perceptual_hash,
)


def theirs(image: Image.Image) -> int:
    imagehash = pytest.importorskip("imagehash")
    return int(str(imagehash.phash(image)), 16)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_hashes_are_those_of_imagehash(mode):
    rng = np.random.default_rng(0)
    for seed in range(60):
        width, height = rng.integers(8, 400, 2).tolist()
        image = Image.open(io.BytesIO(picture(seed, (width, height), "PNG"))).convert(mode)
        assert perceptual_hash(image) == theirs(image)


def test_the_hash_of_a_jpeg_that_is_decoded_at_an_eighth_is_nearly_that_of_the_whole():
    """Averages of 8 x 8 blocks are not quite the pixels of the resized whole: bits next to the median may change."""
    differ = []
    for seed in range(40):
        data = picture(seed, (400, 320), quality=90)
        differ.append((measure_image(data).phash ^ theirs(Image.open(io.BytesIO(data)))).bit_count())
    assert max(differ) <= 4 and np.mean(differ) < 1  # of 64; unrelated images differ in 32


def test_images_of_one_colour_have_one_hash():
    images = [
        Image.new("RGB", size, colour) for size in ((40, 50), (300, 33)) for colour in ("red", "white", (3, 4, 5))
    ]
    assert {perceptual_hash(image) for image in images} == {1 << 63}
    assert perceptual_hash(Image.new("L", (64, 64))) == 0  # black has no frequency at all


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (picture(0), None),
        (picture(0, image_format="PNG"), None),
        (picture(0, (200, 200))[:-900], "undecodable"),
        (b"", "not a JPEG"),
        (b"GIF89a and no more", "not a JPEG"),
        (picture(0, (31, 64)), "a side under 32 pixels"),
        (picture(0, (400, 39), "PNG"), "an aspect ratio over 10"),
        (picture(0, image_format="TIFF"), "not a JPEG"),
    ],
)
def test_an_image_is_unusable_for_the_reason_the_reader_gives(data, reason):
    measured = measure_image(data)
    if reason is None:
        assert measured.unusable is None and 0 < measured.phash < 2**64
        assert measure_image(data, phash=False) == (None, None)
    else:
        assert reason in measured.unusable and measured.phash is None


HYGIENE = ("escaped", "tags", "invisible", "not_utf8", "cut", "empty")


@pytest.mark.parametrize(
    ("raw", "flags"),
    [
        (b"A Pomsky dog sitting in a field", ""),
        (b"Women&amp;#39;s shoes &amp;amp; bags", "escaped"),
        (b"AT&T store", ""),
        (b"R&D &amp; more", "escaped"),
        (b"a < b > c", ""),
        (b"<b>bold</b> dog", "tags"),
        (b"&lt;b&gt;bold&lt;/b&gt; dog", "escaped tags"),
        ("zero\u200bwidth".encode(), "invisible"),
        ("\u202eright to left\u202c".encode(), "invisible"),
        (b"tab\tand\nnewline", ""),
        (b"bell\x07 rings", "invisible"),
        (b"caf\xe9 noir", "not_utf8"),
        ("a lone surrogate \ud800 in json", "not_utf8 invisible"),
        (b"dog " * 260, "cut"),
        (b"d" * MOST_CHARACTERS, ""),
        (b"d" * (MOST_CHARACTERS + 1), "cut"),
        ("★★★★★".encode(), "empty"),
        (b"ab", "empty"),
        (b"", "empty"),
        (b"  spaces \r\n  only  ", ""),
    ],
)
def test_what_had_to_be_cleaned(raw, flags):
    measured = measure_caption(raw)
    assert [name for name in HYGIENE if getattr(measured, name)] == sorted(flags.split(), key=HYGIENE.index)
    clean = clean_caption(raw)
    assert (measured.characters, measured.words) == (len(clean), len(clean.split()))
    assert measured.bytes == len(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
    assert measured.tokens is None


def test_tokens_are_those_of_the_reader(pytestconfig):
    tokenizer = Tokenizer(pytestconfig.rootpath / "tokenizers" / "shapes")
    for raw in (b"a big red circle", b"a <b>big</b> red circle", b"!!", b"red " * 400):
        assert measure_caption(raw, tokenizer).tokens == len(tokenizer.encode(raw, 100_000))


@settings(max_examples=300, deadline=None)
@given(raw=st.one_of(st.text(max_size=300), st.binary(max_size=300)))
def test_no_caption_is_too_odd(raw):
    measured = measure_caption(raw)
    assert isinstance(measured, CaptionMeasures)
    assert measured.empty == (clean_caption(raw) == "") == (measured.words == 0)


def test_captions_and_numbers_of_a_json():
    fields = parse_json(
        b'{"long": "a long one", "many": ["first", "second"], "n": 3, "x": 0.5, "ok": true, "not": null}'
    )
    assert find_caption("txt", b"alt", fields) == b"alt" and find_caption("txt", None, fields) is None
    found = [find_caption(f"json:{key}", b"alt", fields) for key in ("long", "many", "n", "not", "nowhere")]
    assert found == ["a long one", "first", None, None, None]
    assert find_numbers(fields) == {"n": 3.0, "x": 0.5, "ok": 1.0}
    for damaged in (None, b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        assert parse_json(damaged) == {}
    assert find_numbers(parse_json(b'{"a": ' + b"9" * 400 + b', "b": 1}')) == {"b": 1.0}
    assert (
        find_caption("json:mixed", None, {"mixed": ["a", 1]}) is None
        and find_caption("json:e", None, {"e": []}) is None
    )


@pytest.mark.parametrize("where", ["text", "json:", "json", "jsn:caption", ""])
def test_captions_are_in_txt_or_json(where):
    with pytest.raises(ValueError, match="expected txt or json:KEY"):
        MeasureConfig(captions=("txt", where))
