"""Positions of patches on their grid: (h, w, device) -> (h*w, D). They check the grid, not the count of patches.

`of_grids` gives them to a batch of strips, images of different grids as rows of patches: B images, N patches of the
longest, `grids` (B, 2) their rows and columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, h*w, D) -> (1, h'*w', D): bicubic, anti-aliased where it shrinks, with the corners of the images aligned."""
    if grid == new_grid:
        return table
    image = table.float().unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2).contiguous().to(table.dtype)


class LearnedPositions(nn.Module):
    """One learned vector for each cell of a fixed grid (AIMv2 at 224, 336 and 448 px)."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """(h*w, D), where the parameter lives; raises ValueError for another grid, were its count of cells the same."""
        if (height, width) != self.grid:
            raise ValueError(
                f"image of {height}x{width} patches, but the learned positions are for "
                f"{self.grid[0]}x{self.grid[1]}: resize the image, or interpolate the positions when loading"
            )
        return self.weight[0]

    def of_grids(self, grids: Tensor, n: int) -> Tensor:
        """(B, N, D), each image's own and then zeros; raises ValueError for a grid that isn't served or doesn't fit."""
        rows = [tuple(grid) for grid in grids.tolist()]
        for height, width in rows:
            if height * width > n:
                raise ValueError(f"grid of {height}x{width} patches in a strip of {n}")
        tables = {grid: F.pad(self(*grid), (0, 0, 0, n - grid[0] * grid[1])) for grid in set(rows)}
        return torch.stack([tables[grid] for grid in rows])


class InterpolatedPositions(LearnedPositions):
    """Learned positions of one grid, resized to that of each image: any size at inference, at the table's own cost."""

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """(h*w, D), where the parameter lives, for any grid."""
        return resize_positions(self.weight, self.grid, (height, width))[0]


class SinCosPositions(nn.Module):
    """Fixed 2-D sines and cosines for any grid (AIM v1, AIMv2-native), without parameters.

    Laid out [sin w | cos w | sin h | cos h]: the first half encodes the column. Temperature 10000. `scale` multiplies
    rows and columns: 2/3 lays a grid of 24 patches over the positions of one of 16.
    """

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        if width % 4:
            raise ValueError(f"2-D sincos positions need a width that is a multiple of 4, not {width}")
        self.width, self.scale = width, scale

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        row = torch.arange(height, device=device).repeat_interleave(width)
        column = torch.arange(width, device=device).repeat(height)
        return self._at(row, column, max(height, width))

    def of_grids(self, grids: Tensor, n: int) -> Tensor:
        """(B, N, D), each image's own; behind its patches its grid goes on."""
        columns = grids[:, 1:]  # (B, 1)
        patch = torch.arange(n, device=grids.device)
        return self._at(patch // columns, patch % columns, n)

    def _at(self, row: Tensor, column: Tensor, length: int) -> Tensor:
        """Rows and columns (...) below `length` -> (..., D)."""
        quarter = self.width // 4
        frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=row.device) / quarter)
        place = torch.arange(length, dtype=torch.float32, device=row.device) * self.scale
        angle = place[:, None] * frequency  # (length, D/4)
        table = torch.cat([angle.sin(), angle.cos()], dim=1)
        return torch.cat([table[column], table[row]], dim=-1)
