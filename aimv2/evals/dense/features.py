"""What patch features look like: principal components as colours, and where a block looks.

B images, N patches, D width, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aimv2.encoder import VisionEncoder
from aimv2.evals.encoders.taps import tap
from aimv2.evals.harness import at_rest

COLOURS = 3
OUTER = 0.01  # share of the patches beyond either end of a colour's range


@dataclass(frozen=True, slots=True)
class PatchPCA:
    """Principal components of the patches of several images, which thereby share their colours.

    mean (D,), components (3, D) of length 1, the most variance first; each one's largest entry is positive. low, high
    (3,): the range of colours. outline: None, or (direction (D,), threshold) of `foreground`.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor
    outline: tuple[Tensor, float] | None = None

    def transform(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3)"""
        return (patches.double() - self.mean) @ self.components.T

    def foreground(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N) bool; everything, if the foreground was not looked for."""
        if self.outline is None:
            return torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        direction, threshold = self.outline
        return patches.double() @ direction > threshold

    def colours(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3) in [0, 1] float32; what is not foreground is black."""
        spread = self.high - self.low
        scaled = (self.transform(patches) - self.low) / torch.where(spread > 0, spread, 1)
        scaled = torch.where(spread > 0, scaled, 0.5).clamp(0, 1)
        return (scaled * self.foreground(patches)[..., None]).float()


def fit_pca(patches: Tensor, grid: tuple[int, int], *, foreground_first: bool = False) -> PatchPCA:
    """Components of (B, N, D) patches in raster order on a grid (h, w), in float64.

    Args:
        foreground_first: as DINOv2 (arXiv 2304.07193, figure 1) does it: the first component of all patches parts the
            foreground from the rest, the colours are the components of the foreground alone. Where DINOv2 sets
            threshold and side by hand, the threshold is Otsu's, and the background the side that more of the patches
            at the images' edges are on. Where that leaves fewer patches than there are colours, as of a flat image,
            nothing is parted and all is foreground.

    Raises:
        ValueError: other shapes, or fewer patches or dimensions than there are colours.
    """
    if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1] or patches.shape[2] < COLOURS:
        raise ValueError(f"patches {tuple(patches.shape)}: expected (B, {grid[0]} * {grid[1]}, at least {COLOURS})")
    flat = patches.double().flatten(0, 1)  # (BN, D)
    if len(flat) < COLOURS:
        raise ValueError(f"{len(flat)} patches of all images: expected at least {COLOURS}")
    outline = _outline(patches.double(), grid) if foreground_first else None
    if outline is not None:
        flat = flat[flat @ outline[0] > outline[1]]
    mean, components = _components(flat, COLOURS)
    projected = (flat - mean) @ components.T
    low, high = torch.quantile(_some(projected), torch.tensor([OUTER, 1 - OUTER]).to(projected), dim=0)
    return PatchPCA(mean, components, low, high, outline)


def attention_probabilities(encoder: VisionEncoder, images: Tensor, block: int) -> Tensor:
    """(B, 3, height, width) -> (B, H, N, N) float32: how much each patch (row) looks at each other (column).

    Computed anew from the block's own queries and keys, since the fused kernel of the forward pass keeps none. Blocks
    above are not run. It takes 4 B H N^2 bytes.

    Raises ValueError for a block that is not there.
    """
    if not 0 <= block < len(encoder.blocks):
        raise ValueError(f"block {block}: expected 0 to {len(encoder.blocks) - 1}")
    layer = encoder.blocks[block]
    with at_rest(encoder):
        (x,), _ = tap(lambda: encoder(images), [layer.norm1], [0], stop=True)  # what the attention gets (B, N, D)
        b, n, d = x.shape
        heads = layer.attention.heads
        q, k, _ = (part.view(b, n, heads, d // heads).transpose(1, 2) for part in layer.attention.qkv(x).chunk(3, -1))
        scores = q.float() @ k.float().transpose(-1, -2) * (d // heads) ** -0.5
        return scores.softmax(dim=-1)


def received(probabilities: Tensor) -> Tensor:
    """(B, H, N, N) -> (B, H, N): how much a patch is looked at, the mean over who looks; 1/N if all are equal."""
    return probabilities.mean(dim=-2)


def looked_at(probabilities: Tensor, patch: int) -> Tensor:
    """(B, H, N, N) -> (B, H, N): what one patch looks at. Raises ValueError for a patch that is not there."""
    if not 0 <= patch < probabilities.shape[-2]:
        raise ValueError(f"patch {patch}: expected 0 to {probabilities.shape[-2] - 1}")
    return probabilities[:, :, patch]


def _components(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the directions (number, D) of most variance of (n, D)."""
    mean = x.mean(dim=0)
    centred = x - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # (D, D), the variances rise
    components = vectors.T.flip(0)[:number]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return mean, components * torch.where(largest < 0, -1.0, 1.0)


def _outline(patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, float] | None:
    """(direction, threshold): patches whose projection is above are foreground. None if there would be too few."""
    flat = patches.flatten(0, 1)
    mean, (direction,) = _components(flat, 1)
    scores = (patches - mean) @ direction  # (B, N)
    threshold = _otsu(scores.flatten())
    edge = torch.zeros(grid, dtype=torch.bool, device=patches.device)
    edge[[0, -1]], edge[:, [0, -1]] = True, True
    above = scores > threshold
    if above[:, edge.flatten()].double().mean() > above.double().mean():
        direction, threshold = -direction, -threshold
    threshold = float(threshold + mean @ direction)
    return (direction, threshold) if (flat @ direction > threshold).sum() >= COLOURS else None


def _otsu(values: Tensor) -> float:
    """The threshold between values (n,) that parts them into the two groups whose means are furthest apart.

    Weighted by the groups' sizes (N. Otsu, 1979), over all places between two values instead of a histogram.
    """
    values = values.sort().values
    n = len(values)
    below = torch.arange(1, n, device=values.device, dtype=values.dtype)
    sums = values.cumsum(0)
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    cut = int((below * (n - below) * apart**2).argmax())
    return float(values[cut] + values[cut + 1]) / 2


def _some(values: Tensor, most: int = 1 << 24) -> Tensor:
    """`torch.quantile` takes no more."""
    return values[:: -(-values.numel() // most)]
