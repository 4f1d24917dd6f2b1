"""A loaded encoder as others use it: images in, the features of the layers they asked for out.

B images, N patches, D width, L layers chosen.
"""

import operator
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.processor import Processor

COMBINE = ("concat", "mean")


def block_numbers(layer: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks counted from 0 for `layer`, whose negative numbers count from the last one, -1.

    Raises ValueError for a block that is not there, one given twice, or none at all.
    """
    try:
        layers = tuple(map(operator.index, layer if isinstance(layer, Iterable) else (layer,)))
    except TypeError:
        raise ValueError(f"layer {layer!r}: expected an int or several") from None
    numbers = tuple(number + depth if number < 0 else number for number in layers)
    if not numbers or any(not 0 <= number < depth for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"layer {layer}: expected one or several different blocks from {-depth} to {depth - 1}")
    return numbers


class FeatureEncoder(nn.Module):
    """`aimv2.load_encoder` returns this. No CLS token: every output belongs to a patch, in raster order.

    Args:
        encoder: its blocks go at least as far as the highest of `layers`.
        layers: blocks counted from 0.
        norm: whether the encoder's final norm is applied to what a block puts out; for each layer by itself.
        combine: what becomes of several layers: "concat" along D, in the given order, or their "mean".
        frozen: no gradients, and eval mode whatever `train()` is told, until a parameter is made to require one.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        processor: Processor,
        *,
        layers: tuple[int, ...],
        norm: bool = True,
        combine: str = "concat",
        frozen: bool = True,
    ):
        super().__init__()
        if combine not in COMBINE:
            raise ValueError(f"combine {combine!r}: expected one of {', '.join(COMBINE)}")
        self.encoder, self.processor = encoder, processor
        self.layers, self.norm, self.combine = layers, norm, combine
        self.requires_grad_(not frozen).train(not frozen)
        encoder.norm.requires_grad_(not frozen and norm)  # unused it gets no gradient, for which DDP would wait

    @property
    def frozen(self) -> bool:
        """While no parameter requires a gradient: unfreezing one, or adding adapters, ends it."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def config(self) -> VisionConfig:
        return self.encoder.config

    @property
    def hidden_size(self) -> int:
        """Length of a feature."""
        return self.config.width * (len(self.layers) if self.combine == "concat" else 1)

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Of the square image the encoder is made for."""
        return self.config.num_patches

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.patch_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.patch_embed.weight.device

    def train(self, mode: bool = True) -> "FeatureEncoder":
        return super().train(mode and not self.frozen)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W), normalised as `processor` does -> (B, N, hidden_size), in the weights' dtype.

        Args:
            mask: (B, N), True where a patch is real, for smaller images at the top left of a common size. Each gives
                what it would alone; the padding's features are 0.
            output_hidden_states: return also each block's raw output, up to the highest layer chosen.

        Raises:
            ValueError: other shapes, or a size that the patches or the positions don't allow.
        """
        with torch.no_grad() if self.frozen else nullcontext():
            self._check(images, mask)
            top = self.layers == (len(self.encoder.blocks) - 1,) and self.norm
            if top and not output_hidden_states:  # without keeping every block's output
                features = self.encoder(images, real=mask)
            else:
                features, hidden_states = self.encoder(images, real=mask, output_hidden_states=True)
            if not top:
                chosen = [hidden_states[layer] for layer in self.layers]
                chosen = [self.encoder.norm(states) for states in chosen] if self.norm else chosen
                features = torch.cat(chosen, dim=-1) if self.combine == "concat" else torch.stack(chosen).mean(dim=0)
            if mask is not None:
                features = features.masked_fill(~mask[..., None], 0)
        return (features, hidden_states) if output_hidden_states else features

    def _check(self, images: Tensor, mask: Tensor | None) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"images of shape {tuple(images.shape)} and {images.dtype}: "
                "expected floats of shape (B, 3, H, W), none of them 0"
            )
        if mask is None:
            return
        patches = images.shape[2] // self.patch_size * (images.shape[3] // self.patch_size)
        if mask.dtype != torch.bool or mask.shape != (len(images), patches):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} and {mask.dtype}: "
                f"expected {(len(images), patches)} and torch.bool, True for real patches"
            )
