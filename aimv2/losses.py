"""Losses as sums over supervised targets, in fp32 at least. The objective divides by global counts.

Sums, so that neither accumulation nor the number of ranks changes the gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.patches import normalize_patches, patchify


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pixel(pixels: Tensor, image: Tensor, prefix_length: Tensor, patch_size: int) -> Tensor:
    """Sum over patches S..N-1 of the mean squared error of their 3P^2 normalised values (AIMv2 eq. 3).

    pixels (B, N, 3P^2) with pixels[:, i] predicting patch i+1; image (B, 3, H, W); prefix_length S (B,). Of N patches
    N - S carry loss, each predicted from the position before it.
    """
    target = normalize_patches(patchify(_at_least_fp32(image), patch_size))[:, 1:]  # (B, N-1, 3P^2)
    error = (_at_least_fp32(pixels[:, :-1]) - target).square().mean(dim=-1)  # (B, N-1)
    patch = torch.arange(1, pixels.shape[1], device=pixels.device)
    return error.masked_fill(patch < prefix_length[:, None], 0.0).sum()


def caption(logits: Tensor, text: Tensor, text_length: Tensor) -> Tensor:
    """Sum of -log p over each caption's first `text_length` tokens, its EOS included once (AIMv2 eq. 2).

    logits (B, T, V), text (B, T), text_length (B,). Lengths, not ids, say what is padding: EOS may share padding's id.
    """
    position = torch.arange(text.shape[1], device=text.device)
    target = text.masked_fill(position >= text_length[:, None], -100)
    return F.cross_entropy(_at_least_fp32(logits).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
