"""What a locked image tower has seen before, in CPU memory."""

import hashlib
import logging
import math

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class PatchCache:
    """Features of images, each (n, D), by the digest of their pixels: the first that come, until it is full.

    Nothing gives way: of data that are read over and over in new orders, a share stays known, while whatever is in the
    place of the oldest would be gone before it is asked for again. It does not know the tower's weights.
    """

    def __init__(self, capacity: int):
        """`capacity` in bytes."""
        self._free = capacity
        self._kept: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._kept

    def __getitem__(self, digest: bytes) -> Tensor:
        return self._kept[digest]

    def keep(self, digest: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if digest in self._kept or self._free < 0:
            return
        if size > self._free:
            logger.info("the feature cache is full, with %d images", len(self._kept))
            self._free = -1
            return
        self._kept[digest] = features.detach().to("cpu", copy=True)
        self._free -= size


def digests_of(images: Tensor, grid: Tensor | None) -> list[bytes]:
    """Of each image of (B, 3, H, W); of strips, which `grid` (B, 2) makes them, without padding."""
    grids = [None] * len(images) if grid is None else [tuple(each) for each in grid.tolist()]
    return [_digest(image, shape) for image, shape in zip(images.cpu(), grids, strict=True)]


def _digest(image: Tensor, grid: tuple[int, int] | None) -> bytes:
    if grid is not None:
        image = image[..., : math.prod(grid) * image.shape[-2]]  # a strip is one patch high
    image = image.contiguous()
    key = repr((tuple(image.shape), image.dtype, grid)).encode()  # strips of other grids may have the same pixels
    return hashlib.blake2b(image.view(torch.uint8).numpy().data, digest_size=16, key=key).digest()
