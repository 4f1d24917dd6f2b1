"""Images as sequences of patches, in raster order, for any grid of h x w patches.

B images, H x W pixels, P patch side, h x w or r x c patches, N = h*w.
"""

import torch
from einops import rearrange
from torch import Tensor

VARIANCE_EPS = 1e-6  # inside the square root, as in MAE and AIM's training code


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, P*P*3): the pixels of each patch, row by row, channel varying fastest.

    Raises ValueError if H or W is not a multiple of `patch_size`.
    """
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels: both sides must be multiples of the patch size {patch_size}"
        )
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """(B, h*w, P*P*3) -> (B, 3, h*P, w*P), the inverse of `patchify` for a grid of `height` x `width` patches."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=patch_size, q=patch_size)


def to_strip(image: Tensor, patch_size: int) -> Tensor:
    """(..., r P, c P) -> (..., P, r c P): the patches side by side in raster order."""
    return rearrange(image, "... (r p) (c q) -> ... p (r c q)", p=patch_size, q=patch_size)


def from_strip(strip: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """(..., P, N P) -> (..., r P, c P), the inverse of `to_strip`; what is behind the r c patches is padding."""
    own = strip[..., : rows * columns * patch_size]
    return rearrange(own, "... p (r c q) -> ... (r p) (c q)", r=rows, c=columns, q=patch_size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's own mean and deviation, (..., P*P*3) -> two of (..., 1); the variance is unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """The regression target: every patch with its own mean and deviation taken out (AIM v1, section 3.1)."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation
