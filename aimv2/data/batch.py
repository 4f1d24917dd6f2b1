"""What the data path hands to an objective: one micro-batch, and the target counts its losses are divided by.

B samples, N patches (the most of the micro-batch), P patch side, T text positions, g the global sample number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Replaced(NamedTuple):
    """A sample that could not be used, and so was read from another place of the same source."""

    sample: int  # g
    reason: str  # a few words, the same for all samples that fail in the same way
    where: str  # shard and key


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro-batch of one rank.

    Images of different grids lie in it as strips: their patches side by side in raster order, a single row of N, with
    zeros behind the shorter ones. A strip has the patches of its image; `grid` says where they were.
    """

    image: Tensor  # (B, 3, H, W) float32, normalised by the transform's mean and std; strips: (B, 3, P, N P)
    text: Tensor  # (B, T) int64 token ids, padded on the right; T >= 1
    text_length: Tensor  # (B,) int64, EOS included; 0 = no caption
    prefix_length: Tensor  # (B,) int64, uniform on [1, n-1] for an image of n patches, drawn from (seed, g)
    sample: Tensor  # (B,) int64, global sample number g
    num_patches: int  # N
    grid: Tensor | None = None  # (B, 2) int64, rows and columns of patches if the images are strips
    replaced: list[Replaced] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample)

    def patch_counts(self) -> Tensor:
        """(B,) int64, the patches of each image without padding."""
        if self.grid is None:
            return torch.full_like(self.prefix_length, self.num_patches)
        return self.grid.prod(dim=1)

    def real_patches(self) -> Tensor | None:
        """(B, N), True for an image's own patches and not for padding; None if there is none."""
        if self.grid is None:
            return None
        return torch.arange(self.num_patches, device=self.grid.device) < self.patch_counts()[:, None]

    def count_replaced(self) -> int:
        """Samples that were replaced, however many tries each took."""
        return len({replaced.sample for replaced in self.replaced})

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`; asynchronous if this batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory. The data loader calls it by this name."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(slots=True, kw_only=True)
class Counts:
    """Numbers of supervised targets in one optimizer step, over all ranks and micro-batches."""

    patches: Tensor  # () sum of n - prefix_length, at least 1
    tokens: Tensor  # () sum of text_length, at least 1
    samples: Tensor  # (), at least 1
    captions: Tensor  # () samples with a caption, at least 1

    @classmethod
    def of(cls, totals: Tensor) -> Self:
        """From the (4,) sums of `count_targets`; at least 1 each, so that a loss over nothing is finite."""
        patches, tokens, samples, captions = totals.clamp(min=1).unbind()
        return cls(patches=patches, tokens=tokens, samples=samples, captions=captions)


def count_targets(batches: Sequence[Batch]) -> Tensor:
    """(4,) float64 [patches, tokens, samples, captions] of a rank's micro-batches: before any reduction, not clamped.

    float64 counts exactly up to 2^53 and every backend reduces it.
    """
    patches = sum(int((b.patch_counts() - b.prefix_length).sum()) for b in batches)
    tokens = sum(int(b.text_length.sum()) for b in batches)
    captions = sum(int((b.text_length > 0).sum()) for b in batches)
    return torch.tensor([patches, tokens, sum(map(len, batches)), captions], dtype=torch.float64)


def count_padding(batches: Sequence[Batch]) -> tuple[int, int]:
    """Of the patches of these micro-batches, if they are strips, those that are padding, and all."""
    strips = [batch for batch in batches if batch.grid is not None]
    patches = sum(len(b) * b.num_patches for b in strips)
    return patches - sum(int(b.patch_counts().sum()) for b in strips), patches
