"""What a locked image tower has seen before, in CPU memory."""

import hashlib
import logging
from collections.abc import Sequence

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


def digests_of(images: Tensor, widths: Sequence[int]) -> list[bytes]:
    """Of each image of (B, 3, H, W), so many columns of it."""
    digests = []
    for image, width in zip(images.cpu(), widths, strict=True):
        pixels = image[..., :width].contiguous()
        key = repr((tuple(pixels.shape), pixels.dtype)).encode()
        digests.append(hashlib.blake2b(pixels.view(torch.uint8).numpy().data, digest_size=16, key=key).digest())
    return digests
