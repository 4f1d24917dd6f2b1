"""What is measured of one sample: whether its image can be used and what it looks like, how clean its caption is."""

import html
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aimv2.data.images import BadImage, decode_image
from aimv2.data.tokenizer import INVISIBLE, MOST_CHARACTERS, TAG, Tokenizer, clean_caption

HASHED = 32  # side of the image that is hashed; a JPEG is decoded at 1/8 as long as it is not smaller
_FREQUENCIES = 8  # kept of each axis

# DCT-II, unnormalised: (8, 32), row k is frequency k.
_COSINES = 2 * np.cos(np.pi / (2 * HASHED) * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(HASHED) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """What to measure."""

    decode: bool = True  # every image, whole; else its header only
    phash: bool = True  # needs decode
    tokenizer: str | None = None  # path; without one captions have no length in tokens
    captions: tuple[str, ...] = ("txt",)  # "txt" or "json:KEY"; the first is measured, the others counted

    def __post_init__(self):
        for where in self.captions:
            if not re.fullmatch("txt|json:.+", where, re.DOTALL):
                raise ValueError(f"captions {where!r}: expected txt or json:KEY")


class ImageMeasures(NamedTuple):
    """Of one image."""

    unusable: str | None  # why the reader would not use it
    phash: int | None  # 64 bits


class CaptionMeasures(NamedTuple):
    """Of one caption. Lengths are those of the clean caption, the rest says what the raw one was like."""

    bytes: int  # raw
    characters: int
    words: int
    tokens: int | None  # with the end of the caption; None without a tokenizer
    escaped: bool  # HTML entities
    tags: bool
    invisible: bool  # control, zero-width and bidirectional characters
    not_utf8: bool
    cut: bool  # longer than MOST_CHARACTERS
    empty: bool  # fewer than three alphanumerics: a sample of pixels only


def measure_image(data: bytes, phash: bool = True) -> ImageMeasures:
    """Decode an image as the reader would, JPEGs at 1/8, and hash it."""
    try:
        image = decode_image(data, draft_size=HASHED)
    except BadImage as error:
        return ImageMeasures(str(error), None)
    return ImageMeasures(None, perceptual_hash(image) if phash else None)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, one each for the lowest 8 x 8 frequencies of the 32 x 32 grey image: whether it is above their median.

    The same bits as `imagehash.phash`, first bit highest. An image of one colour has no noise in them here: all its
    frequencies but the first are 0.
    """
    small = image.convert("L").resize((HASHED, HASHED), Image.Resampling.LANCZOS)
    frequencies = (_COSINES @ np.asarray(small, np.float64) @ _COSINES.T).round(6).ravel()  # (64,)
    middle = np.sort(frequencies)[31:33].mean()
    return int.from_bytes(np.packbits(frequencies > middle).tobytes(), "big")


def measure_caption(raw: str | bytes, tokenizer: Tokenizer | None = None) -> CaptionMeasures:
    """The length of a caption after cleaning, and what had to be cleaned. Never raises on any content."""
    text, not_utf8 = _decode(raw)
    unescaped = text[: 4 * MOST_CHARACTERS]
    if escaped := "&" in unescaped and html.unescape(unescaped) != unescaped:
        unescaped = html.unescape(html.unescape(unescaped))  # web captions are often escaped twice
    clean = clean_caption(raw)
    return CaptionMeasures(
        bytes=len(raw) if isinstance(raw, bytes) else len(raw.encode("utf-8", "surrogatepass")),
        characters=len(clean),
        words=len(clean.split()),
        tokens=None if tokenizer is None else len(tokenizer.encode(raw, limit=1 << 30)),
        escaped=escaped,
        tags="<" in unescaped and TAG.search(unescaped) is not None,
        invisible=not unescaped.isprintable() and any(map(_is_invisible, unescaped)),
        not_utf8=not_utf8,
        cut=len(text) > len(clean) >= MOST_CHARACTERS - 1,  # the cut may leave a space at the end, which goes too
        empty=not clean,
    )


def _decode(raw: str | bytes) -> tuple[str, bool]:
    """(text, whether it was not UTF-8). JSON can spell lone surrogates, which no UTF-8 has."""
    try:
        return (raw.decode("utf-8"), False) if isinstance(raw, bytes) else (raw.encode("utf-8").decode(), False)
    except UnicodeError:
        return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw, True


def _is_invisible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) in INVISIBLE


def parse_json(data: bytes | None) -> Mapping[str, Any]:
    """The object that a KEY.json holds; empty if there is none, or it is damaged or something else."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def find_caption(where: str, text: bytes | None, fields: Mapping[str, Any]) -> str | bytes | None:
    """The caption that `where` ("txt" or "json:KEY") names, the first of a list; None if the sample has none there."""
    if where == "txt":
        return text
    value = fields.get(where.removeprefix("json:"))
    if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
        value = next(iter(value), None)
    return value if isinstance(value, str) else None


def find_numbers(fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers, true and false at the top level of a KEY.json."""
    numbers = {}
    for name, value in fields.items():
        if isinstance(value, int | float) and name.isprintable():  # a lone surrogate is no name of a column
            try:
                numbers[name] = float(value)
            except OverflowError:  # an int beyond any float
                continue
    return numbers
