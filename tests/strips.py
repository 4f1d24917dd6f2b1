"""Images of different grids as the strips of a native micro-batch, for tests of what reads them.

B images, h x w patches, n = h w of one image, N the most of the batch, P patch side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aimv2.data.batch import Batch


def random_images(grids: Sequence[tuple[int, int]], patch_size: int, dtype=torch.float64) -> list[Tensor]:
    """(3, h P, w P) each."""
    return [torch.randn(3, h * patch_size, w * patch_size, dtype=dtype) for h, w in grids]


def strips(images: Sequence[Tensor], patch_size: int, n: int = 0, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B, 3, P, N P) and their grids (B, 2). At least `n` patches long; `padding` is what stands behind an image."""
    p = patch_size
    grids = torch.tensor([(image.shape[1] // p, image.shape[2] // p) for image in images])
    n = max(n, int(grids.prod(dim=1).max()))
    out = images[0].new_full((len(images), 3, p, n * p), padding)
    for row, image, (h, w) in zip(out, images, grids.tolist(), strict=True):
        for i in range(h * w):
            y, x = i // w * p, i % w * p
            row[:, :, i * p : (i + 1) * p] = image[:, y : y + p, x : x + p]
    return out, grids


def image_batch(image: Tensor, text: list[int], prefix_length: int, patch_size: int) -> Batch:
    """One image (3, H, W), of any grid, as an ordinary batch."""
    return Batch(
        image=image[None],
        text=torch.tensor([text or [0]]),
        text_length=torch.tensor([len(text)]),
        prefix_length=torch.tensor([prefix_length]),
        sample=torch.tensor([0]),
        num_patches=image[0].numel() // patch_size**2,
    )


def strip_batch(
    images: Sequence[Tensor], texts: Sequence[list[int]], prefix_length: Sequence[int], patch_size: int, **changes
) -> Batch:
    """All of them in one; `changes` go to `strips`."""
    image, grid = strips(images, patch_size, **changes)
    length = max(1, *map(len, texts))
    return Batch(
        image=image,
        text=torch.tensor([text + [0] * (length - len(text)) for text in texts]),
        text_length=torch.tensor([len(text) for text in texts]),
        prefix_length=torch.tensor(prefix_length),
        sample=torch.arange(len(images)),
        num_patches=image.shape[3] // patch_size,
        grid=grid,
    )
