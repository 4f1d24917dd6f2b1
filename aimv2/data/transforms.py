"""Bytes to an image, and an image to a normalised tensor. S is the side of the result.

Nothing here draws from a global generator: a transform is a function of the image, its config and the given generator.
"""

import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # others may start programs: EPS runs Ghostscript
MOST_PIXELS = 50_000_000  # 17 KB of PNG can hold 144 million
MOST_BYTES = 32 << 20
MOST_ASPECT = 10

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
    if len(data) > MOST_BYTES:
        raise BadImage("over 32 MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that we don't use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.size, min_size, max_aspect)
            if draft_size is not None:
                image.draft(image.mode, (draft_size, draft_size))
            image.load()
            return upright_rgb(image)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not a " + ", ".join(FORMATS)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("over 50 megapixels") from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise BadImage(f"undecodable ({type(error).__name__})") from None


def _check_size(size: tuple[int, int], min_size: int, max_aspect: float) -> None:
    short, long = sorted(size)
    if short * long > MOST_PIXELS:
        raise BadImage("over 50 megapixels")
    if short < min_size:
        raise BadImage(f"a side under {min_size} pixels")
    if long > max_aspect * short:
        raise BadImage(f"an aspect ratio over {max_aspect}")


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


def draft_size(config: TransformConfig) -> int:
    """The shortest side from which no crop of `train_transform` has to be enlarged because of the draft."""
    if config.crop_scale is None:
        return config.image_size
    low, high = config.crop_ratio
    return math.ceil(config.image_size / math.sqrt(config.crop_scale[0] * min(low, 1 / high)))


def train_transform(image: Image.Image, config: TransformConfig, rng: np.random.Generator) -> Tensor:
    """(3, S, S) float32, normalised: random resized crop (bicubic) and flip, drawn from `rng`."""
    if config.crop_scale is not None:
        image = image.crop(random_crop(image.size, config.crop_scale, config.crop_ratio, rng))
    image = _resize(image, (config.image_size, config.image_size))
    if config.flip > 0 and rng.random() < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return normalize(image, config.mean, config.std)


def eval_transform(image: Image.Image, config: TransformConfig) -> Tensor:
    """(3, S, S) float32, normalised: the shortest edge resized to S (bicubic), then the centre."""
    size = config.image_size
    width, height = image.size
    if width < height:
        image = _resize(image, (size, int(size * height / width)))
    else:
        image = _resize(image, (int(size * width / height), size))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return normalize(image.crop((left, top, left + size, top + size)), config.mean, config.std)


def resize_transform(image: Image.Image, config: TransformConfig) -> Tensor:
    """(3, S, S) float32, normalised: the whole image resized to S x S (bicubic), whatever its aspect ratio."""
    return normalize(_resize(image, (config.image_size, config.image_size)), config.mean, config.std)


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


def normalize(image: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(3, H, W) float32: bytes to [0, 1], minus mean, over std."""
    mean, std = _statistics(mean, std)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
