"""Losses as sums over supervised targets, in fp32 at least. The objective divides by global counts.

Sums, so that neither accumulation nor the number of ranks changes the gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.layers import at_least_fp32
from aimv2.patches import normalize_patches, patchify


def pixel(
    pixels: Tensor, image: Tensor, prefix_length: Tensor, patch_size: int, patch_counts: Tensor | None = None
) -> Tensor:
    """Sum over patches S..n-1 of the mean squared error of their 3P^2 normalised values (AIMv2 eq. 3).

    pixels (B, N, 3P^2) with pixels[:, i] predicting patch i+1; image (B, 3, H, W); prefix_length S (B,). Of n patches
    n - S carry loss, each predicted from the position before it. n is N, or given for each image by `patch_counts`
    (B,) where padding follows.
    """
    target = normalize_patches(patchify(at_least_fp32(image), patch_size))[:, 1:]  # (B, N-1, 3P^2)
    error = (at_least_fp32(pixels[:, :-1]) - target).square().mean(dim=-1)  # (B, N-1)
    return _supervised(error, prefix_length, patch_counts)


def _supervised(error: Tensor, prefix_length: Tensor, patch_counts: Tensor | None) -> Tensor:
    """Sum of the errors (B, N-1) of patches 1..N-1 over those that carry loss."""
    patch = torch.arange(1, error.shape[1] + 1, device=error.device)
    free = patch < prefix_length[:, None]
    if patch_counts is not None:
        free |= patch >= patch_counts[:, None]
    return error.masked_fill(free, 0.0).sum()


def caption(logits: Tensor, text: Tensor, text_length: Tensor) -> Tensor:
    """Sum of -log p over each caption's first `text_length` tokens, its EOS included once (AIMv2 eq. 2).

    logits (B, T, V), text (B, T), text_length (B,). Lengths, not ids, say what is padding: EOS may share padding's id.
    """
    position = torch.arange(text.shape[1], device=text.device)
    target = text.masked_fill(position >= text_length[:, None], -100)
    return F.cross_entropy(at_least_fp32(logits).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")


def contrastive(image_logits: Tensor, text_logits: Tensor, own: Tensor) -> Tensor:
    """Sum over n pairs of (-log p(caption | image) - log p(image | caption)) / 2, among M candidates each (CLIP).

    image_logits (n, M): of n images against all captions; text_logits (n, M): of their captions against all images;
    own (n,): which candidate is the pair's.
    """
    by_image = F.cross_entropy(at_least_fp32(image_logits), own, reduction="sum")
    return (by_image + F.cross_entropy(at_least_fp32(text_logits), own, reduction="sum")) / 2


def sigmoid_contrastive(image_logits: Tensor, own: Tensor) -> Tensor:
    """Sum over n images x M captions of -log p(they belong together, or don't) (SigLIP, arXiv 2303.15343).

    Arguments as `contrastive`.
    """
    logits = at_least_fp32(image_logits)
    belongs = torch.arange(logits.shape[1], device=logits.device) == own[:, None]
    return -F.logsigmoid(torch.where(belongs, logits, -logits)).sum()


def features(predicted: Tensor, target: Tensor, patch_counts: Tensor | None = None) -> Tensor:
    """Sum over images of the mean, over their n patches, of the mean squared error of normalised features.

    predicted and target (B, N, D). A target has its own mean and deviation over D taken out, as patches have in
    `pixel`: a teacher's scale, which its weights alone decide, becomes 1. n is N, or `patch_counts` (B,).
    """
    target = F.layer_norm(at_least_fp32(target), target.shape[-1:])
    error = (at_least_fp32(predicted) - target).square().mean(dim=-1)  # (B, N)
    if patch_counts is None:
        return error.mean(dim=1).sum()
    padding = torch.arange(error.shape[1], device=error.device) >= patch_counts[:, None]
    return (error.masked_fill(padding, 0.0).sum(dim=1) / patch_counts).sum()


def teacher_pixel(
    pixels: Tensor, teacher_pixels: Tensor, prefix_length: Tensor, patch_counts: Tensor | None = None
) -> Tensor:
    """`pixel` with a teacher's predictions (B, N, 3P^2), shifted like the student's, in the place of the image."""
    error = (at_least_fp32(pixels[:, :-1]) - at_least_fp32(teacher_pixels[:, :-1])).square().mean(dim=-1)
    return _supervised(error, prefix_length, patch_counts)


def teacher_caption(logits: Tensor, teacher_logits: Tensor, text_length: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over each caption's first `text_length` tokens, its EOS included once.

    Both logits (B, T, V); text_length (B,).
    """
    student, teacher = (at_least_fp32(x).log_softmax(dim=-1) for x in (logits, teacher_logits))
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)  # (B, T)
    padding = torch.arange(logits.shape[1], device=logits.device) >= text_length[:, None]
    return divergence.masked_fill(padding, 0.0).sum()
