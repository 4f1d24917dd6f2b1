"""Bytes to an image, and an image to a normalised tensor. B images, S the side of the result.

Nothing here draws from a global generator: a transform is a function of the image, its config and the given generator.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

try:
    import simplejpeg
except ImportError:  # optional: Pillow gives the same pixels, a little later
    simplejpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # others may start programs: EPS runs Ghostscript
MOST_PIXELS = 50_000_000  # 17 KB of PNG can hold 144 million
MOST_BYTES = 32 << 20
MOST_ASPECT = 10
MOST_SCANS = 100  # of a JPEG; progressive ones have about 10, and each costs a pass over all pixels
MOST_TEXTS = 10  # chunks of a PNG that Pillow inflates, each to a megabyte at most, before anything is decoded
MOST_MEMORY = 290_000_000  # bytes, for a training image: 300 MB with what is smaller

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


@dataclass(slots=True, kw_only=True)
class TransformConfig:
    """Random resized crop, flip and normalisation. The defaults are AIM's and AIMv2's (paper, pre-training)."""

    image_size: int = 224  # S
    crop_scale: tuple[float, float] | None = (0.4, 1.0)  # share of the area; None: no crop, the whole image resized
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5  # probability
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    min_size: int = 32  # images with a shorter side are not used

    def __post_init__(self):
        if self.image_size < 1 or self.min_size < 1:
            raise ValueError(f"image_size {self.image_size}, min_size {self.min_size}: expected 1 or more")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip}: expected a probability")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale}: expected 0 < low <= high <= 1, or None")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio}: expected 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: expected positive numbers")


def decode_image(
    data: bytes, *, min_size: int = 32, max_aspect: float = MOST_ASPECT, draft_size: int | None = None
) -> Image.Image:
    """An upright RGB image: transparency over white, 16 bits scaled to 8, the first frame of an animation.

    Args:
        min_size: the shortest side allowed, in pixels.
        max_aspect: the longest side allowed, in shortest ones.
        draft_size: a JPEG may be decoded at 1/2, 1/4 or 1/8, as long as no side gets shorter than this.

    Raises:
        BadImage: not one of FORMATS, too large, too small, too elongated, cut off or damaged.
    """
    with _reasons():
        image = _open(data, min_size, max_aspect)
        if draft_size is not None:
            image.draft(image.mode, (draft_size, draft_size))
        image.load()
        return upright_rgb(image)


def training_image(data: bytes, config: TransformConfig, rng: np.random.Generator) -> Tensor:
    """(3, S, S) uint8: a random crop of the image, resized (bicubic, anti-aliased) and perhaps flipped.

    The crop is drawn from the header's size and decides at which scale a JPEG is decoded: at 1/2, 1/4 or 1/8 if the
    crop keeps S pixels a side, then rounded to whole pixels of that scale. Resized by torch, which takes a fifth of
    Pillow's time for the same sums, rounded elsewhere: one level in 255 a pass, 0.02 on average over photographs.

    Raises:
        BadImage: as `decode_image`; or over 300 MB would be needed to decode it.
    """
    with _reasons():
        image = _open(data, config.min_size, MOST_ASPECT)
        _check_memory(image)
        if image.format not in _JPEG:
            image.load()  # the orientation may come after the pixels
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
        box = (0, 0, width, height)
        if config.crop_scale is not None:
            box = random_crop((width, height), config.crop_scale, config.crop_ratio, rng)
        pixels = _decode(data, image, orientation, _shrinkage(box, config.image_size))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)
    pixels = _resize_pixels(pixels[top:bottom, left:right], config.image_size)
    return pixels.flip(-1) if config.flip > 0 and rng.random() < config.flip else pixels


def validation_image(data: bytes, config: TransformConfig) -> Tensor:
    """(3, S, S) uint8: `resize_transform` without a crop_scale, else `eval_transform`, before the normalisation."""
    image = decode_image(data, min_size=config.min_size)
    whole = config.crop_scale is None
    return _to_tensor(_squash(image, config.image_size) if whole else _centre(image, config.image_size))


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


def _open(data: bytes, min_size: int, max_aspect: float) -> Image.Image:
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
    return image


def _scans(data: bytes) -> int:
    """Start-of-scan markers in a JPEG, those of its thumbnails too. In numpy: `bytes.count` takes six times as long."""
    data = np.frombuffer(data, np.uint8)
    return np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == 0xDA))


def _check_memory(image: Image.Image) -> None:
    """By the most that Pillow was seen to need: a progressive JPEG's coefficients, a WebP's canvases and alpha."""
    bytes_per_pixel = 2 * len(image.getbands()) if image.format in _JPEG else 24
    if image.width * image.height * bytes_per_pixel > MOST_MEMORY:
        raise BadImage("over 300 MB to decode")


def _decode(data: bytes, image: Image.Image, orientation: int, shrinkage: int) -> np.ndarray:
    """(H, W, 3) uint8, upright; a JPEG's sides divided by `shrinkage`, rounded up."""
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in _UPRIGHT
    if simplejpeg and plain and shrinkage == 1:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if (width, height) == image.size:  # the one that was checked
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:  # it refuses any irregularity, Pillow only what costs pixels
            return np.array(_to_rgb(image))
    image.draft(image.mode, (image.width // shrinkage, image.height // shrinkage))
    return np.array(_upright(_to_rgb(image), orientation))


def _shrinkage(box: tuple[int, int, int, int], size: int) -> int:
    """The scale, as a divisor, at which a JPEG can be decoded so that the crop keeps `size` pixels a side."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    return max((n for n in (2, 4, 8) if shortest >= n * size), default=1)


def _resize_pixels(pixels: np.ndarray, size: int) -> Tensor:
    """(H, W, 3) to (3, S, S), uint8."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] == (size, size):
        return image.contiguous()
    return interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]


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


def eval_transform(image: Image.Image, config: TransformConfig) -> Tensor:
    """(3, S, S) float32, normalised: the shortest edge resized to S (bicubic), then the centre."""
    return normalize(_centre(image, config.image_size), config.mean, config.std)


def resize_transform(image: Image.Image, config: TransformConfig) -> Tensor:
    """(3, S, S) float32, normalised: the whole image resized to S x S (bicubic), whatever its aspect ratio."""
    return normalize(_squash(image, config.image_size), config.mean, config.std)


def _centre(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if width < height:
        image = _resize(image, (size, int(size * height / width)))
    else:
        image = _resize(image, (int(size * width / height), size))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _squash(image: Image.Image, size: int) -> Image.Image:
    return _resize(image, (size, size))


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), distributed as torchvision's RandomResizedCrop draws it.

    Ten tries of a uniform share of the area and a log-uniform aspect ratio; then the largest centre crop whose ratio is
    allowed.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalize(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) float32: bytes to [0, 1], minus mean, over std."""
    return _normalize(_to_tensor(image), mean, std, torch.empty(3, image.height, image.width))


def normalize_batch(images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) float32 of B uint8 (3, H, W), as `normalize`.

    Image by image, in the memory where they stay: touching new memory for the first time costs more than all the rest.
    In a worker of a data loader that is memory shared with the main process, which is where the batch has to go.
    """
    shape = (len(images), *images[0].shape)
    if get_worker_info() is None:
        batch = torch.from_numpy(np.empty(shape, np.float32))  # in huge pages: torch does not ask for them
    else:
        batch = torch.empty(shape).share_memory_()
    for row, image in zip(batch, images, strict=True):
        _normalize(image, mean, std, row)
    return batch


def _normalize(image: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> Tensor:
    mean, std = _statistics(tuple(mean), tuple(std))
    return out.copy_(image).div_(255).sub_(mean).div_(std)


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
