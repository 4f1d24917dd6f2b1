"""Floating point operations of the models, counted from their shapes, and what devices can do.

A multiplication and its addition are two. Only matrix products are counted, attention in full although half of a causal
one could be left out, as is usual for the MFU (PaLM, arXiv 2204.02311, appendix B). N patches, T caption tokens.
"""

import torch

from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig

# Dense, per second, from the vendor's data sheets. Part of torch's device name -> dtype -> rate.
PEAKS = {
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of a CUDA device, or None if its data sheet isn't in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates.get(dtype) for part, rates in PEAKS.items() if part in name), None)


def trunk_flops(width: int, depth: int, mlp_hidden: int, matrices: int, positions: int) -> float:
    """Blocks of attention (four matrices, and two products of positions) and an MLP of two or three matrices."""
    linear = 2 * positions * (4 * width**2 + matrices * width * mlp_hidden)
    attention = 4 * positions**2 * width
    return depth * (linear + attention)


def encoder_flops(config: VisionConfig) -> float:
    """One forward pass for one image of the configured size."""
    n = config.num_patches
    matrices = 3 if config.mlp == "swiglu" else 2
    patches = 2 * n * 3 * config.patch_size**2 * config.width
    return patches + trunk_flops(config.width, config.depth, config.mlp_hidden, matrices, n)


def decoder_flops(vision: VisionConfig, decoder: DecoderConfig, tokens: float) -> float:
    """One forward pass for one image and a caption of T = `tokens`."""
    n, c = vision.num_patches, decoder
    projection = 2 * n * vision.width * c.width
    trunk = trunk_flops(c.width, c.depth, c.mlp_hidden, 3, n + tokens)
    heads = 2 * c.width * (n * 3 * vision.patch_size**2 + tokens * c.vocab_size)
    return projection + trunk + heads


def training_flops(vision: VisionConfig, decoder: DecoderConfig, tokens: float) -> float:
    """Forward and backward (twice the forward) of AIMv2 for one image and a caption of T = `tokens`."""
    return 3 * (encoder_flops(vision) + decoder_flops(vision, decoder, tokens))
