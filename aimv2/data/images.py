"""From bytes to pixels, or to the reason why not: header first, few formats, every limit before anything is decoded.

H and W are height and width in pixels, after the rotation that EXIF asks for.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # optional: Pillow gives the same pixels, a little later
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # others may start programs: EPS runs Ghostscript
MOST_PIXELS = 50_000_000  # 17 KB of PNG can hold 144 million
MOST_BYTES = 32 << 20
MOST_ASPECT = 10
MOST_SCANS = 100  # of a JPEG; progressive ones have about 10, and each costs a pass over all pixels
MOST_TEXTS = 10  # chunks of a PNG that Pillow inflates, each to a megabyte at most, before anything is decoded
MOST_MEMORY = 290_000_000  # bytes to decode an image; 300 MB with what is smaller

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_INFLATED = (b"zTXt", b"iTXt", b"iCCP")
_RUNS = (1, 2)  # a BMP's compression: RLE8 and RLE4
_JPEG = ("JPEG", "MPO")  # MPO: of several pictures, such as a phone's with a depth map


class BadImage(ValueError):
    """An image that is not used. The message is a reason of a few words, without numbers, so that it can be counted."""


def decode_image(
    data: bytes,
    *,
    min_size: int = 32,
    max_aspect: float = MOST_ASPECT,
    most_memory: int | None = MOST_MEMORY,
    draft_size: int | None = None,
) -> Image.Image:
    """An upright RGB image: transparency over white, 16 bits scaled to 8, the first frame of an animation.

    Args:
        min_size: the shortest side allowed, in pixels.
        max_aspect: the longest side allowed, in shortest ones.
        most_memory: bytes that decoding it may take, about; None: as many as MOST_PIXELS take.
        draft_size: a JPEG may be decoded at 1/2, 1/4 or 1/8, as long as no side gets shorter than this.

    Raises:
        BadImage: not one of FORMATS, too large, too small, too elongated, cut off or damaged.
    """
    with _reasons():
        image = _open(data, min_size, max_aspect, most_memory)
        if draft_size is not None:
            image.draft(image.mode, (draft_size, draft_size))
        image.load()
        return upright_rgb(image)


class EncodedImage:
    """An image whose header is within the limits, and which is not decoded yet.

    Raises:
        BadImage: as `decode_image`.
    """

    def __init__(self, data: bytes, *, min_size: int = 32):
        self._data = data
        with _reasons():
            self._image = _open(data, min_size)
            if self._image.format not in _JPEG:
                self._image.load()  # the orientation may come after the pixels
            self._orientation = _orientation(self._image)

    @property
    def size(self) -> tuple[int, int]:
        """(W, H)."""
        width, height = self._image.size
        return (height, width) if self._orientation in _SIDEWAYS else (width, height)

    def decode(self, shrinkage: int = 1) -> np.ndarray:
        """(H, W, 3) uint8; a JPEG's sides are divided by `shrinkage` (1, 2, 4 or 8), rounded up.

        Raises:
            BadImage: cut off or damaged.
        """
        image = self._image
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and self._orientation not in _UPRIGHT
        with _reasons():
            if simplejpeg and plain and shrinkage == 1:
                try:
                    height, width, *_ = simplejpeg.decode_jpeg_header(self._data)
                    if (width, height) == image.size:  # the one that was checked
                        return simplejpeg.decode_jpeg(self._data, "RGB")
                except ValueError:  # it refuses any irregularity, Pillow only what costs pixels
                    return np.array(_to_rgb(image))
            image.draft(image.mode, (image.width // shrinkage, image.height // shrinkage))
            return np.array(_upright(_to_rgb(image), self._orientation))


def image_format(data: bytes, *, min_size: int = 32) -> str:
    """One of FORMATS, by the header.

    Raises:
        BadImage: as `decode_image` for the header.
    """
    with _reasons():
        kind = _open(data, min_size).format
    return "JPEG" if kind in _JPEG else kind


def image_header(data: bytes) -> tuple[str, int, int] | None:
    """(one of FORMATS, width, height) of an image of any size, as stored, of which this is the beginning; or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is what is asked for
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow's parsers raise whatever the damage leads to
        return None
    return ("JPEG" if image.format in _JPEG else image.format), *image.size


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever goes wrong with an image becomes a BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that we don't use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not a " + ", ".join(FORMATS)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("over 50 megapixels") from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise BadImage(f"undecodable ({type(error).__name__})") from None


def _open(
    data: bytes, min_size: int, max_aspect: float = MOST_ASPECT, most_memory: int | None = MOST_MEMORY
) -> Image.Image:
    """The header, within the limits; nothing is decoded yet."""
    if len(data) > MOST_BYTES:
        raise BadImage("over 32 MiB")
    if data.startswith(b"\x89PNG") and sum(map(data.count, _INFLATED)) > MOST_TEXTS:
        raise BadImage(f"over {MOST_TEXTS} compressed texts")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    short, long = sorted(image.size)
    if short * long > MOST_PIXELS:
        raise BadImage("over 50 megapixels")
    if short < min_size:
        raise BadImage(f"a side under {min_size} pixels")
    if long > max_aspect * short:
        raise BadImage(f"an aspect ratio over {max_aspect}")
    if image.format == "BMP" and image.info.get("compression") in _RUNS:  # Pillow decodes them in Python, in minutes
        raise BadImage("a BMP of runs")
    if image.format in _JPEG and _scans(data) > MOST_SCANS:
        raise BadImage(f"over {MOST_SCANS} scans")
    if most_memory is not None and short * long * _bytes_per_pixel(image) > most_memory:
        raise BadImage("over 300 MB to decode")
    return image


def _scans(data: bytes) -> int:
    """Start-of-scan markers in a JPEG, those of its thumbnails too. In numpy: `bytes.count` takes six times as long."""
    data = np.frombuffer(data, np.uint8)
    return np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == 0xDA))


def _bytes_per_pixel(image: Image.Image) -> int:
    """The most that Pillow was seen to need, with the copies of transparency over white."""
    if image.format in _JPEG:  # the coefficients of one with several scans
        return 2 * len(image.getbands())
    return 25 if (image.format, image.mode) == ("WEBP", "RGBA") else 19


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency over white, turned as its EXIF orientation says."""
    return _upright(_to_rgb(image), _orientation(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a grey pixel: the high byte, as for 16-bit RGB; Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and "xmp" not in image.info and "Raw profile type exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata of a good image: shown as stored, as viewers do
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
