"""The vision encoder of AIM v1, AIMv2 and AIMv2-native: one file, told apart by what `__init__` puts together.

B images, H x W pixels, P patch side, h x w patches, N = h*w, D width.
Sources: AIM (arXiv 2401.08541) section 3, AIMv2 (arXiv 2411.14402) section 2.2 and appendix.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2.layers import MLPS, NORMS, Block, init_trunk
from aimv2.positions import InterpolatedPositions, LearnedPositions, SinCosPositions

TABLES = {"learned": LearnedPositions, "interpolated": InterpolatedPositions}


@dataclass(slots=True, kw_only=True)
class VisionConfig:
    """Shape of a vision encoder; `vision_config` gives the published ones by name."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    image_size: int = 224
    patch_size: int = 14
    mlp: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    position_scale: float = 1.0  # of sincos positions: 2/3 lays a grid of 24 patches over the positions of one of 16
    checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for name, table in (("mlp", MLPS), ("norm", NORMS), ("positions", {*TABLES, "sincos"})):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {sorted(table)}")
        if self.position_scale <= 0 or (self.position_scale != 1 and self.positions != "sincos"):
            raise ValueError(
                f"position_scale {self.position_scale} with positions {self.positions!r}: "
                "expected more than 0, and 1 unless they are 'sincos'"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the square training image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2


def _aimv2(width: int, depth: int, heads: int, mlp_hidden: int) -> VisionConfig:
    return VisionConfig(width=width, depth=depth, heads=heads, mlp_hidden=mlp_hidden)


def _aim(width: int, depth: int, heads: int) -> VisionConfig:
    return VisionConfig(
        width=width, depth=depth, heads=heads, mlp_hidden=4 * width, mlp="gelu", norm="layernorm", positions="sincos"
    )


SIZES = {
    "base": _aimv2(768, 12, 6, 2048),  # in Apple's code, not in the paper
    "large": _aimv2(1024, 24, 8, 2816),
    "huge": _aimv2(1536, 24, 12, 4096),
    "1b": _aimv2(2048, 24, 16, 5632),
    "3b": _aimv2(3072, 24, 24, 8192),
    "aim-0.6b": _aim(1536, 24, 12),
    "aim-1b": _aim(2048, 24, 16),
    "aim-3b": _aim(3072, 24, 24),
    "aim-7b": _aim(4096, 32, 32),
}


def vision_config(size: str, image_size: int = 224, **changes) -> VisionConfig:
    """A published encoder by name (AIMv2 table 1, AIM table 1), with any field changed; a fresh copy each time.

    `positions="sincos"` makes the native one. Raises ValueError for a name that is not in `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"vision encoder {size!r}: expected one of {', '.join(SIZES)}")
    return replace(SIZES[size], image_size=image_size, **changes)


class VisionEncoder(nn.Module):
    """Image -> patch features. No CLS token: every output belongs to a patch, in raster order."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)
        self.patch_norm = NORMS[c.norm](c.width, eps=c.norm_eps)
        if c.positions in TABLES:
            self.positions = TABLES[c.positions]((c.grid, c.grid), c.width)
        else:
            self.positions = SinCosPositions(c.width, c.position_scale)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_hidden, c.mlp, c.norm, c.norm_eps, layer) for layer in range(c.depth)
        )
        self.norm = NORMS[c.norm](c.width, eps=c.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apple's training initialisation; the patch convolution's bias is not published: zero."""
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        init_trunk(self.blocks)

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        grid: Tensor | None = None,
        real: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) -> (B, N, D) after the final norm; with `output_hidden_states` also each block's raw output.

        `mask`, boolean and broadcastable to (B, heads, N, N), is True where attention may look; None is everywhere,
        as downstream, but at padding. Images of several sizes are either strips as in `Batch`, with `grid` (B, 2),
        their rows and columns of patches; or padded to one size, with `real` (B, N), True for an image's own patches,
        its top left corner. A mask that is given must hide padding from patches, which a prefix mask does. Raises
        ValueError for a size the patches or the positions can't serve.
        """
        x = self.embed(image, grid, real)
        if mask is None and grid is not None:
            mask = (torch.arange(x.shape[1], device=x.device) < grid.prod(dim=1)[:, None])[:, None, None]
        elif mask is None and real is not None:  # where nothing is real all is looked at: a softmax over nothing is NaN
            mask = (real | ~real.any(dim=1, keepdim=True))[:, None, None]  # (B, 1, 1, N): keys
        hidden_states = []
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
            if output_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        return (x, hidden_states) if output_hidden_states else x

    def embed(self, image: Tensor, grid: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, N, D), what the first block is given. Arguments and errors as `forward`."""
        p = self.config.patch_size
        height, width = image.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"image of {height}x{width} pixels: both sides must be multiples of the patch size {p}")
        if grid is not None and (height != p or grid.shape != (len(image), 2)):
            raise ValueError(
                f"images {tuple(image.shape)} with a grid {tuple(grid.shape)}: "
                f"expected strips (B, 3, {p}, N * {p}) and (B, 2)"
            )
        image = image.to(self.patch_embed.weight.dtype)  # batches are fp32, the weights may be bf16
        x = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, N, D)
        x = self.patch_norm(x)
        if grid is not None:
            positions = self.positions.of_grids(grid, width // p)
        elif real is not None and self.config.positions == "interpolated":  # others don't depend on the canvas
            positions = self.positions.of_canvas(real.unflatten(1, (height // p, width // p)))
        else:
            positions = self.positions(height // p, width // p, x.device)
        return x + positions.to(x)
