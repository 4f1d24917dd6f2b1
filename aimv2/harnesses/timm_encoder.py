"""A vision encoder of ours by the interface of timm's VisionTransformer, version 1.0.

B images, H x W pixels, P patch side, S side of a square image, h x w patches, N = h*w, D width, C classes.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2.encoder import TABLES, VisionEncoder
from aimv2.positions import SinCosPositions, resize_positions
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import resized, sized
from aimv2.processor import Processor

POOLS = ("avg", "avgmax", "max", "")
_OUTPUT_FORMATS = ("NCHW", "NLC")


class TimmEncoder(nn.Module):
    """A vision encoder by the names timm's models have: no prefix tokens, a mean over the patches, a linear head.

    `encoder` is ours, for `aimv2.exports.export_model` after training, together with `processor.config`.

    Args:
        processing: what prepares images; `processor` does, to the pixel.
        num_classes: C; 0: without a head.
        global_pool: one of POOLS; "": all patches.
        drop_rate: of dropout before the head.
        pad: pad images with zeros, at the right and below, to multiples of P.
    """

    num_prefix_tokens = 0
    has_class_token = False
    in_chans = 3

    def __init__(
        self,
        encoder: VisionEncoder,
        processing: ProcessorConfig,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pad: bool = False,
    ):
        super().__init__()
        c = encoder.config
        self.encoder, self.processor, self.pad = encoder, Processor(processing), pad
        self.pretrained_cfg: dict = {}  # timm's builder sets it: what its transforms prepare images by
        self.num_features = self.head_hidden_size = self.embed_dim = c.width
        self.feature_info = [
            {"module": f"encoder.blocks.{number}", "num_chs": c.width, "reduction": c.patch_size}
            for number in range(c.depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), (B, D) without a head; with N as their second axis where nothing is pooled."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D) after the final norm. Errors are `VisionEncoder`'s."""
        return self.encoder(self._padded(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, C); `pre_logits` stops before the head: (B, D)."""
        x = self.head_drop(global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """(B, 3, H, W) -> (B, N, D) after the final norm, and a map for each block asked for.

        Args:
            indices: blocks from 0, negative from the last; a number: that many, to the last; None: all.
            return_prefix_tokens: changes nothing: there are none.
            norm: apply the final norm to the maps.
            stop_early: run no block above the highest of these, to which the first result then belongs.
            output_fmt: of the maps: "NCHW" (B, D, h, w) or "NLC" (B, N, D).
            intermediates_only: return the maps only.
            output_dict: return {"image_intermediates", "image_features"}.
        """
        if output_fmt not in _OUTPUT_FORMATS:
            raise ValueError(f"output_fmt {output_fmt!r}: expected one of {', '.join(_OUTPUT_FORMATS)}")
        depth = len(self.encoder.blocks)
        numbers, x = _blocks(indices, depth), self._padded(x)
        features, maps = self._run(x, numbers, max(numbers) + 1 if stop_early else depth)
        maps = [self.encoder.norm(one) for one in maps] if norm else maps
        if output_fmt == "NCHW":
            grid = [side // self.encoder.config.patch_size for side in x.shape[-2:]]
            maps = [one.transpose(1, 2).unflatten(2, grid).contiguous() for one in maps]  # (B, D, h, w)
        if output_dict:
            return {"image_intermediates": maps} | ({} if intermediates_only else {"image_features": features})
        return maps if intermediates_only else (features, maps)

    def _run(self, x: Tensor, numbers: Collection[int], depth: int) -> tuple[Tensor, list[Tensor]]:
        """`VisionEncoder.forward` of the first `depth` blocks, which of their outputs keeps those of `numbers` only."""
        encoder, x = self.encoder, self.encoder.embed(x)
        recompute, maps = encoder.config.checkpointing and torch.is_grad_enabled(), []
        for number, block in enumerate(encoder.blocks[:depth]):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if number in numbers:
                maps.append(x)  # in the blocks' order, as timm's
        return encoder.norm(x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks above the highest of `indices`, for good; return these, counted from 0."""
        numbers = _blocks(indices, len(self.encoder.blocks))
        depth = max(numbers) + 1
        self.encoder.blocks = self.encoder.blocks[:depth]
        self.encoder.config = replace(self.encoder.config, depth=depth)
        if prune_norm:
            self.encoder.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return numbers

    def _padded(self, x: Tensor) -> Tensor:
        if not self.pad:
            return x
        p = self.encoder.config.patch_size
        return F.pad(x, (0, -x.shape[-1] % p, 0, -x.shape[-2] % p))

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Take images of another size from now on: positions are interpolated to it once.

        Raises ValueError for a size that is no square of patches, or another P.
        """
        encoder, c = self.encoder, self.encoder.config
        if patch_size is not None and one_side(patch_size) != c.patch_size:
            raise ValueError(f"patch_size {patch_size!r}: expected {c.patch_size}, the encoder's")
        if img_size is None:
            return
        side = one_side(img_size)
        encoder.config = sized(c, side, self.processor.config)
        if c.positions == "sincos":
            encoder.positions = SinCosPositions(c.width, encoder.config.position_scale)
        else:
            old, grid = encoder.positions, (encoder.config.grid, encoder.config.grid)
            encoder.positions = TABLES[c.positions](grid, c.width).train(old.training)
            table = resize_positions(old.weight.detach(), old.grid, grid)
            encoder.positions.weight = nn.Parameter(table, requires_grad=old.weight.requires_grad)
        self.processor = Processor(resized(self.processor.config, side))
        self.pretrained_cfg.update(self.processor.config.to_timm(side))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none with 0 classes; `global_pool` None leaves the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r}: expected one of {POOLS}, as there is no token but patches")
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes}: expected 0 or more")
        self.num_classes, self.global_pool, self.head = num_classes, global_pool, nn.Identity()
        if num_classes:
            weight = self.encoder.patch_embed.weight
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Names in the order of depth, for layer-wise learning rates."""
        stem = r"^encoder\.(?:patch_embed|patch_norm|positions)"
        return {"stem": stem, "blocks": [(r"^encoder\.blocks\.(\d+)", None), (r"^encoder\.norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"encoder.positions.weight"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.encoder.config = replace(self.encoder.config, checkpointing=enable)


def one_side(img_size: int | Sequence[int]) -> int:
    """S of S or (S, S); ValueError for two that differ."""
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise ValueError(f"img_size {img_size!r}: expected one side or two equal ones (dynamic_img_size takes others)")
    return sides.pop()


def _blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Blocks from 0 for timm's indices: a number is that many, to the last; ValueError for one that is not there."""
    wanted = depth if indices is None else indices
    numbers = list(range(-wanted, 0)) if isinstance(wanted, int) else list(wanted)
    if not numbers or not all(-depth <= number < depth for number in numbers):
        raise ValueError(f"out_indices {indices}: expected blocks from {-depth} to {depth - 1}, or how many")
    return [number % depth for number in numbers]
