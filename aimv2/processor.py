"""Images as users have them -> the tensor an encoder expects, as the preprocessing of its checkpoint says.

B images, S side of a square result, P patch side, h x w patches, N = h*w of the largest grid in the batch.

Pillow resizes, on 8-bit pixels, as in training. timm does the same, and so does transformers' `CLIPImageProcessorPil`:
the pixels are equal. What transformers 5 opens by default resizes with torchvision: the same filters, 8 bits between
the two passes as well, but another rounding. On smooth images one byte in 200 differs by 1 of 255 levels, hardly any by
2. Of tall images Pillow 13 does the vertical pass first, torchvision and older Pillows never. Both clip between passes,
so that noise, which overshoots, differs by 20 to 40 levels there; smooth images still by 2.

Half a pixel of margin in the centre crop is rounded down by transformers, to even by torchvision's own crop, timm and
our training. It moves one image in four by one pixel; `crop_rounding` says which.

What is done here and not there: an EXIF orientation is respected in whatever carries one, 16-bit grey is scaled to 8
bits and not clipped, and what is no image is an error.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.data.images import MOST_BYTES, decode_image, upright_rgb
from aimv2.data.transforms import normalize
from aimv2.preprocessing import INTERPOLATIONS, ProcessorConfig

MOST_ASPECT = 200  # a column of 1 x 100,000 pixels, shortest edge to 224, would be 15 GB

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_HALF_LEVEL = 0.5 / 255


class ProcessedImages(dict):
    """A batch of tensors, by key or by attribute.

    pixel_values    (B, 3, H, W) float32, normalised; a native image smaller than H x W is at the top left, then zeros
    grid            (B, 2) int64, rows and columns of each image's patches
    mask            (B, N) bool in raster order of the whole H x W, True where a patch is the image's own; native only:
                    else the key is absent and the attribute None
    """

    @property
    def pixel_values(self) -> Tensor:
        return self["pixel_values"]

    @property
    def grid(self) -> Tensor:
        return self["grid"]

    @property
    def mask(self) -> Tensor | None:
        return self.get("mask")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ProcessedImages":
        """A copy on another device; `dtype` is for the pixels only."""
        moved = ProcessedImages({key: tensor.to(device=device) for key, tensor in self.items()})
        moved["pixel_values"] = moved["pixel_values"].to(dtype=dtype)
        return moved


class Processor:
    """Images -> `ProcessedImages`, with the attributes that LLaVA and its relatives read off CLIPImageProcessor.

    An image is a PIL image, a path, a file's bytes, or an array of numpy or torch: (H, W), (H, W, C) or (C, H, W) with
    1, 3 or 4 channels, uint8 or float in [0, 1]. Transparency becomes white. Floats are rounded to 8 bits.
    """

    def __init__(self, config: ProcessorConfig):
        self.config = config

    def __call__(self, images, return_tensors: str = "pt") -> ProcessedImages:
        """Process one image, a list with any mix of them, or a batch: an array with one axis more.

        Raises:
            ValueError: which image it is, counted from 0, and what is wrong with it.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors {return_tensors!r}: expected 'pt'")
        c, ready = self.config, []
        for index, source in enumerate(_listed(images)):
            try:
                ready.append(normalize(_resize(read_image(source), c), c.mean, c.std))
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
        if not ready:
            raise ValueError("no images: expected at least one")
        grid = torch.tensor([image.shape[1:] for image in ready]) // c.patch_size  # (B, 2)
        if c.resize == "native":
            return _pad(ready, grid, c.patch_size)
        return ProcessedImages(pixel_values=torch.stack(ready), grid=grid)

    def preprocess(self, images, return_tensors: str = "pt") -> ProcessedImages:
        """The same, under the name that LLaVA calls."""
        return self(images, return_tensors)

    def __getattr__(self, name: str):
        """`size`, `crop_size`, `image_mean`, `do_resize` and so on, as in `to_transformers`; native has no sizes."""
        values = {} if name == "config" or name.startswith("_") else self.config.to_transformers()
        if name not in values:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        if name == "size":  # LLaVA-NeXT reads the shortest edge, also where a whole image becomes a square
            return values[name] | {"shortest_edge": self.config.resize_size}
        return values[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"


def native_grid(height: int, width: int, patch_size: int, min_patches: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns) of an image of height x width pixels: the nearest that the number of patches allows.

    A larger image is first shrunk, and a smaller one enlarged, to the limit it is beyond; then each side changes by
    less than a patch, mostly by half of one at most. What is on the grid and within the limits stays as it is.
    """
    patches = height * width / patch_size**2
    scale = math.sqrt(min(max(patches, min_patches), max_patches) / patches) / patch_size
    exact_rows, exact_columns = height * scale, width * scale
    rows = np.arange(1, max_patches + 1)
    fewest, most = -(-min_patches // rows), max_patches // rows
    columns = np.clip(np.ceil(exact_columns - 0.5), fewest, most)
    distance = np.where(fewest <= most, abs(rows - exact_rows) + abs(columns - exact_columns), np.inf)
    best = int(distance.argmin())
    return int(rows[best]), int(columns[best])


def read_image(source) -> Image.Image:
    """An upright RGB image from whatever `Processor` takes; ValueError for what is none."""
    if isinstance(source, str | Path):
        return _read_file(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source), min_size=1, max_aspect=MOST_ASPECT, most_memory=None)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    image = _from_array(source) if isinstance(source, np.ndarray) else source
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__}: expected a PIL image, path, bytes, numpy array or tensor")
    _check_size(image.height, image.width)
    if image.mode == "F":
        raise ValueError("PIL mode 'F' does not say its range: expected 8 or 16 bits, or an array of floats in [0, 1]")
    try:
        image.load()  # Pillow may read the file only now, and know its orientation only then
        return upright_rgb(image)
    except Exception as error:  # it raises whatever the damage leads to
        raise ValueError(f"unreadable PIL image of mode {image.mode!r} ({error})") from error


def _read_file(path: str | Path) -> Image.Image:
    name = str(path)[:200]  # a string may be anything
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    try:
        return decode_image(data, min_size=1, max_aspect=MOST_ASPECT, most_memory=None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    """The layout is told by which axis has 1, 3 or 4 entries."""
    shape = array.shape
    if 0 in shape:
        raise ValueError(f"shape {shape}: an empty image")
    if array.ndim not in (2, 3):
        raise ValueError(f"shape {shape}: expected (H, W), (H, W, C) or (C, H, W)")
    if array.ndim == 3:
        first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
        if first and last:
            raise ValueError(f"shape {shape} may have its channels first or last: pass a PIL image")
        if not first and not last:
            raise ValueError(f"shape {shape}: expected 1, 3 or 4 channels, first or last")
        array = array.transpose(1, 2, 0) if first else array
        array = array[:, :, 0] if array.shape[2] == 1 else array
    if np.issubdtype(array.dtype, np.floating):
        array = _to_bytes(array)
    if array.dtype != np.uint8:
        raise ValueError(f"dtype {array.dtype}: expected uint8, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to the nearest of 256 levels."""
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinite pixels")
    low, high = float(array.min()), float(array.max())
    if low < -_HALF_LEVEL or high > 1 + _HALF_LEVEL:
        raise ValueError(f"floats from {low:.6g} to {high:.6g}: expected [0, 1], or uint8")
    return np.rint(array.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"{height}x{width} pixels: an empty image")
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ValueError(f"{height}x{width} pixels: an aspect ratio over {MOST_ASPECT}")


def _listed(images) -> list:
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, list | tuple) else [images]


def _resize(image: Image.Image, config: ProcessorConfig) -> Image.Image:
    if config.resize == "native":
        p = config.patch_size
        rows, columns = native_grid(image.height, image.width, p, config.min_patches, config.max_patches)
        return _scale(image, (columns * p, rows * p), config)
    width = height = config.resize_size
    if config.resize == "shortest_edge" and image.width < image.height:
        height = int(height * image.height / image.width)
    elif config.resize == "shortest_edge":
        width = int(width * image.width / image.height)
    size = config.image_size
    left, top = (_offset(margin, config.crop_rounding) for margin in (width - size, height - size))
    return _scale(image, (width, height), config).crop((left, top, left + size, top + size))


def _scale(image: Image.Image, size: tuple[int, int], config: ProcessorConfig) -> Image.Image:
    return image if image.size == size else image.resize(size, INTERPOLATIONS[config.interpolation])


def _offset(margin: int, rounding: str) -> int:
    return margin // 2 if rounding == "down" else round(margin / 2)


def _pad(images: list[Tensor], grid: Tensor, patch_size: int) -> ProcessedImages:
    """Images of different sizes in one tensor, at the top left."""
    rows, columns = grid.amax(0).tolist()
    pixels = torch.zeros(len(images), 3, rows * patch_size, columns * patch_size)
    for padded, image in zip(pixels, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    inside = torch.arange(rows)[:, None] < grid[:, 0, None, None]  # (B, h, 1)
    mask = inside & (torch.arange(columns) < grid[:, 1, None, None])  # (B, h, w)
    return ProcessedImages(pixel_values=pixels, grid=grid, mask=mask.flatten(1))
