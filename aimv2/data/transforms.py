"""From an image to a normalised tensor: cropped, resized, flipped. B images, S the side of the result; at
native resolution r x c patches of side P.

Nothing here draws from a global generator: a transform is a function of the image, its config and the given generator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from aimv2.data.images import EncodedImage, decode_image
from aimv2.data.native import area_grid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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


def training_image(data: bytes, config: TransformConfig, rng: np.random.Generator) -> Tensor:
    """(3, S, S) uint8: a random crop of the image, resized (bicubic, anti-aliased) and perhaps flipped.

    The crop is drawn from the header's size and decides at which scale a JPEG is decoded: at 1/2, 1/4 or 1/8 if the
    crop keeps S pixels a side, then rounded to whole pixels of that scale. Resized by torch, which takes a fifth of
    Pillow's time for the same sums, rounded elsewhere: one level in 255 a pass, 0.02 on average over photographs.

    Raises:
        BadImage: as `decode_image`.
    """
    image = EncodedImage(data, min_size=config.min_size)
    width, height = image.size
    box, size = (0, 0, width, height), (config.image_size, config.image_size)
    if config.crop_scale is not None:
        box = random_crop(image.size, config.crop_scale, config.crop_ratio, rng)
    pixels = image.decode(_shrinkage(box, size))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)
    return _flip(_resize_pixels(pixels[top:bottom, left:right], size), config, rng)


def native_training_image(
    data: bytes, config: TransformConfig, area: int, patch_size: int, rng: np.random.Generator
) -> Tensor:
    """(3, r P, c P) uint8: the whole image resized to the grid of `area_grid` and perhaps flipped.

    Decoded and resized as by `training_image`.

    Raises:
        BadImage: as `decode_image`.
    """
    image = EncodedImage(data, min_size=config.min_size)
    size = _native_size(image.size, area, patch_size)
    pixels = image.decode(_shrinkage((0, 0, *image.size), size))
    return _flip(_resize_pixels(pixels, size), config, rng)


def validation_image(data: bytes, config: TransformConfig) -> Tensor:
    """(3, S, S) uint8: `resize_transform` without a crop_scale, else `eval_transform`, before the normalisation."""
    image = decode_image(data, min_size=config.min_size)
    whole = config.crop_scale is None
    return _to_tensor(_squash(image, config.image_size) if whole else _centre(image, config.image_size))


def native_validation_image(data: bytes, config: TransformConfig, area: int, patch_size: int) -> Tensor:
    """(3, r P, c P) uint8: the whole image, resized to the grid of `area_grid` by Pillow as `validation_image` does."""
    image = decode_image(data, min_size=config.min_size)
    return _to_tensor(_resize(image, _native_size(image.size, area, patch_size)))


def _native_size(size: tuple[int, int], area: int, patch_size: int) -> tuple[int, int]:
    """(width, height) in pixels, of both."""
    rows, columns = area_grid(size[1], size[0], area)
    return columns * patch_size, rows * patch_size


def _shrinkage(box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """The scale, as a divisor, at which a JPEG can be decoded so that the crop keeps `size` pixels, (width, height)."""
    width, height = box[2] - box[0], box[3] - box[1]
    return max((n for n in (2, 4, 8) if width >= n * size[0] and height >= n * size[1]), default=1)


def _resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) to (3, height, width) of `size` = (width, height), uint8."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] == (size[1], size[0]):
        return image.contiguous()
    return interpolate(image[None], (size[1], size[0]), mode="bicubic", antialias=True)[0]


def _flip(image: Tensor, config: TransformConfig, rng: np.random.Generator) -> Tensor:
    return image.flip(-1) if config.flip > 0 and rng.random() < config.flip else image


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
    """(B, 3, H, W) float32 of B uint8 (3, H, W), as `normalize`; zeros on the right of those that are less wide.

    Image by image, in the memory where they stay: touching new memory for the first time costs more than all the rest.
    In a worker of a data loader that is memory shared with the main process, which is where the batch has to go.
    """
    shape = (len(images), *images[0].shape[:2], max(image.shape[2] for image in images))
    if get_worker_info() is None:
        batch = torch.from_numpy(np.empty(shape, np.float32))  # in huge pages: torch does not ask for them
    else:
        batch = torch.empty(shape).share_memory_()
    for row, image in zip(batch, images, strict=True):
        _normalize(image, mean, std, row[..., : image.shape[2]])
        row[..., image.shape[2] :] = 0
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
